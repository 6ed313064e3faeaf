"""How a stage reports numbers: it calls a function and does not know which tool stores them."""

from collections.abc import Mapping
from typing import Protocol


class Log(Protocol):
    """Record the metrics of one step. A step that is logged again, after a restart, is recorded once."""

    def __call__(self, metrics: Mapping[str, float], step: int = 0) -> None: ...


def silent(metrics: Mapping[str, float], step: int = 0) -> None:
    """A Log that discards everything."""
