"""Errors that a user can cause and mend. Everything else is a bug and keeps its traceback."""

import errno
import re
import reprlib
import unicodedata
from collections.abc import Iterable

_SHOWN = 30
# Values come from foreign files: shown only as deep and as long as a line can hold.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EROFS, errno.EPERM)


class RemintError(Exception):
    """A user's mistake. Each line of its text reads `where: what is wrong, got VALUE; do this`."""

    def __init__(self, *faults: str):
        self.faults = tuple(visible(fault) for fault in faults)
        super().__init__("\n".join(self.faults))


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


class GpuTooSmall(Exception):  # noqa: N818  (a word for what is so; it becomes a line where settings are known)
    """A training would take `needed` bytes of a GPU that has `free` ones."""

    def __init__(self, needed: int, free: int):
        self.needed, self.free = needed, free
        super().__init__(f"about {needed / 2**30:.1f} GiB of GPU memory are needed, {free / 2**30:.1f} GiB are free")


def visible(text: str) -> str:
    """Text without control characters, which could drive a terminal; line breaks and tabs stay."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def one_line(error: BaseException | str) -> str:
    """What an error of a library says, short enough for a line of ours; its name where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def no_room(error: BaseException) -> bool:
    """Whether a write failed because the disk, the quota or a file is full; libraries in Rust tell it as text."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return (error.errno if isinstance(error, OSError) else told and int(told[1])) in _NO_ROOM


def no_right(error: BaseException) -> bool:
    """Whether a file or folder may not be read or written."""
    return isinstance(error, OSError) and error.errno in _NO_RIGHT


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU; torch says so by a RuntimeError."""
    told = "can't allocate memory" in str(error) or gpu_out_of_memory(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and told)


def gpu_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU ran out; torch's error is known by its name here, where torch is not imported."""
    return isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError"


def got(value: object) -> str:
    """`got VALUE` with the value cut to a readable length."""
    try:
        text = _BRIEF.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = f"an {type(value).__name__} too long to show"
    return f"got {text if len(text) <= 80 else text[:77] + '...'}"


def listed(faults: Iterable[str]) -> list[str]:
    """The faults, cut to a screenful with a count of what is left out."""
    faults = list(faults)
    if len(faults) <= _SHOWN:
        return faults
    return [*faults[:_SHOWN], f"... and {len(faults) - _SHOWN} more"]
