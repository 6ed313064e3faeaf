"""Says which limit of the machine an error comes from, and what to do about it. Each cause has its own sentence."""

import errno
import os
import re
import resource
import shutil
from pathlib import Path

from remint.core.errors import lacks_permission, lacks_space, one_line, out_of_memory

_UNLIMITED = resource.RLIM_INFINITY
# What the dynamic linker and torch say if the address space is too small for a library.
_UNMAPPED = ("failed to map segment", "cannot allocate memory", "cannot apply additional memory protection")
_NO_THREAD = ("can't start new thread", "resource temporarily unavailable", "thread_create")


def explain(error: BaseException, folder: Path = Path()) -> tuple[str, str] | None:
    """(what is wrong, what to do) if a limit of the machine or of this process caused `error`, else None.

    `folder` is where something was to be written; it may not exist yet.
    """
    return _of_writing(error, folder) or _of_memory(error) or _of_the_process(error)


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def _of_writing(error: BaseException, folder: Path) -> tuple[str, str] | None:
    number = _errno(error)
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit == _UNLIMITED:
            return "a file is larger than its file system allows", "use a disk with another file system"
        return (
            f"a file is larger than this process may write, {limit} bytes (ulimit -f)",
            "raise the limit with `ulimit -f unlimited`",
        )
    if number == errno.EDQUOT:
        return "the quota of this user on the disk is used up", "remove files of your own, or ask for a larger quota"
    if number == errno.EROFS:
        return "the disk is mounted read-only", "mount it so that it can be written"
    if number == errno.EIO:
        return "the disk reports an input/output error", "check the disk (`dmesg` shows more), or use another one"
    if lacks_space(error):
        found = os.statvfs(_existing(folder))
        if found.f_files and not found.f_favail:
            return "the disk has no inodes left, so it can take no further file", "remove files that you do not need"
        return f"the disk is full ({free_bytes(folder) >> 20} MiB free)", "free space and run again"
    if isinstance(error, OSError) and lacks_permission(error):
        return _of_permission(error, folder)
    return None


def _of_permission(error: OSError, folder: Path) -> tuple[str, str]:
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    where = f": {name}" if name else ""
    effective = os.access in os.supports_effective_ids
    if os.path.lexists(name) and not os.access(name, os.R_OK, effective_ids=effective):
        return f"cannot be read ({error.strerror}){where}", f"make {name} readable"
    return f"cannot be written ({error.strerror}){where}", f"make {_existing(folder)} writable"


def _of_memory(error: BaseException) -> tuple[str, str] | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    unmapped = isinstance(error, (ImportError, OSError)) and any(text in str(error).lower() for text in _UNMAPPED)
    if limit != _UNLIMITED and (unmapped or out_of_memory(error) or _errno(error) == errno.ENOMEM):
        return (
            f"the address space of this process is limited to {limit >> 20} MiB (ulimit -v), which is too little",
            "raise the limit with `ulimit -v unlimited`",
        )
    if unmapped or _errno(error) == errno.ENOMEM:
        return "the machine has too little memory", "end other programs and run again"
    return None


def _of_the_process(error: BaseException) -> tuple[str, str] | None:
    if _errno(error) == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"this process may open only {limit} files (ulimit -n)", "raise the limit with `ulimit -n 4096`"
    if _errno(error) == errno.ENFILE:
        return "the machine has too many open files", "end other programs and run again"
    in_text = isinstance(error, (RuntimeError, OSError)) and any(text in str(error).lower() for text in _NO_THREAD)
    if in_text or _errno(error) == errno.EAGAIN:
        return (
            "no further process or thread may be started (ulimit -u, or the container's limit of processes)",
            "raise the limit, or end other programs",
        )
    if _errno(error) in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"a path cannot be followed ({one_line(error)[-80:]})", "use a shorter path without a loop of links"
    return None


def _errno(error: BaseException) -> int | None:
    """The errno of an error. Libraries that are written in Rust report it only as text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
