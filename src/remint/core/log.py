"""How a stage reports numbers: it calls a function and does not know which tool stores them."""

from collections.abc import Mapping
from typing import Protocol


class Log(Protocol):
    """Record the metrics of one step. A step that is logged again, after a restart, is recorded once.

    `again` says that this step was logged before the restart: it does not show by itself that anything is computed.
    """

    def __call__(self, metrics: Mapping[str, float], step: int = 0, again: bool = False) -> None: ...


def silent(metrics: Mapping[str, float], step: int = 0, again: bool = False) -> None:
    """A Log that discards everything."""
