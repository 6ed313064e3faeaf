"""Errors that a user can cause and mend. Everything else is a bug and keeps its traceback."""

from collections.abc import Iterable

_SHOWN = 30


class RemintError(Exception):
    """A user's mistake. Each line of its text reads `where: what is wrong, got VALUE; do this`."""

    def __init__(self, *faults: str):
        self.faults = faults
        super().__init__("\n".join(faults))


class SettingsError(RemintError):
    """A setting in params.yaml, conf/ or on the command line is unknown, of the wrong type or out of range."""


class DataError(RemintError):
    """A source file does not hold what its format promises."""


class ArtefactError(RemintError):
    """An artefact is missing, damaged, or was made from something else than the one it is used with."""


class Stopped(RemintError):  # noqa: N818  (a word for what happened, not a fault)
    """The work was stopped by a signal and can be continued; `status` is the exit status to leave with."""

    def __init__(self, fault: str, status: int):
        self.status = status
        super().__init__(fault)


def got(value: object) -> str:
    """`got VALUE` with the value cut to a readable length."""
    text = repr(value)
    return f"got {text if len(text) <= 80 else text[:77] + '...'}"


def listed(faults: Iterable[str]) -> list[str]:
    """The faults, cut to a screenful with a count of what is left out."""
    faults = list(faults)
    if len(faults) <= _SHOWN:
        return faults
    return [*faults[:_SHOWN], f"... and {len(faults) - _SHOWN} more"]
