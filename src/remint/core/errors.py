"""Errors that a user can cause and fix. Every other exception is a bug and keeps its traceback."""

import errno
import re
import reprlib
import unicodedata
from collections.abc import Iterable

_SHOWN = 30
# Shown values can come from files that others wrote. Limit their depth and length, so that they fit on one line.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EROFS, errno.EPERM)


class RemintError(Exception):
    """A problem that the user can fix. Each line of the message reads `where: what is wrong, got VALUE; do this`."""

    def __init__(self, *faults: str):
        self.faults = tuple(visible(fault) for fault in faults)
        super().__init__("\n".join(self.faults))


class SettingsError(RemintError):
    """A setting in params.yaml, conf/ or on the command line is unknown, has the wrong type or is out of range."""


class DataError(RemintError):
    """A source file does not follow its format."""


class ArtefactError(RemintError):
    """An artefact is missing or damaged, or was made from other inputs than those it is used with."""


class Stopped(RemintError):  # noqa: N818  (an event, not an error)
    """A signal or the end of another process stopped the work, which can be resumed. `status` is the exit status."""

    def __init__(self, fault: str, status: int):
        self.status = status
        super().__init__(fault)


class GpuTooSmall(Exception):  # noqa: N818  (a caller that knows the settings turns it into a RemintError)
    """Training needs `needed` bytes of GPU memory, but only `free` bytes are free."""

    def __init__(self, needed: int, free: int):
        self.needed, self.free = needed, free
        super().__init__(f"about {needed / 2**30:.1f} GiB of GPU memory are needed, {free / 2**30:.1f} GiB are free")


def visible(text: str) -> str:
    """Text without control characters, because a terminal would act on them. Line breaks and tabs stay.

    A byte of a file name that is not UTF-8 is written like \\xff.
    """
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else _escaped(char)
        for char in text
    )


def _escaped(char: str) -> str:
    return f"\\x{ord(char) - 0xDC00:02x}" if 0xDC80 <= ord(char) <= 0xDCFF else ""


def one_line(error: BaseException | str) -> str:
    """The message of a library's error, on one line of at most 300 characters; the class name if it is empty."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def lacks_space(error: BaseException) -> bool:
    """Whether a write failed for lack of space (disk, quota, file size). Rust libraries report it only as text."""
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    return (error.errno if isinstance(error, OSError) else in_text and int(in_text[1])) in _NO_ROOM


def lacks_permission(error: BaseException) -> bool:
    """Whether the process lacks the permission to read or write a file or folder."""
    return isinstance(error, OSError) and error.errno in _NO_RIGHT


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of a GPU ran out. torch raises a RuntimeError for both."""
    from_torch = "can't allocate memory" in str(error) or gpu_out_of_memory(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and from_torch)


def gpu_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU ran out. The check goes by the class name, because torch is not imported here."""
    return isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError"


def got(value: object) -> str:
    """`got VALUE`, with the value cut to a readable length."""
    return f"got {brief(value)}"


def brief(value: object) -> str:
    """The value as Python writes it, cut to a readable length."""
    try:
        text = _BRIEF.repr(value)
    except ValueError:  # Python refuses to print an integer of more than 4300 digits
        text = f"an {type(value).__name__} too long to show"
    return text if len(text) <= 80 else text[:77] + "..."


def listed(faults: Iterable[str]) -> list[str]:
    """At most 30 faults, about a screenful, and then the number of those left out."""
    faults = list(faults)
    if len(faults) <= _SHOWN:
        return faults
    return [*faults[:_SHOWN], f"... and {len(faults) - _SHOWN} more"]
