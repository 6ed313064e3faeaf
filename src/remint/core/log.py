"""How a stage reports numbers: it is given a function and never knows what keeps them."""

from collections.abc import Mapping
from typing import Protocol


class Log(Protocol):
    """Take metrics of one step; a step that was logged before is logged once."""

    def __call__(self, metrics: Mapping[str, float], step: int = 0) -> None: ...


def silent(metrics: Mapping[str, float], step: int = 0) -> None:
    """A Log that keeps nothing."""
