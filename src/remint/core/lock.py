"""A lock file that one process can hold at a time. The kernel releases it when the holder ends, even if killed."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from remint.core.errors import ArtefactError
from remint.core.files import kind_of

_POLL_S = 0.2
_WAITING = "waiting"
# A lock file gets its holder's folder right after it was locked. An empty one for longer than this is not ours.
_UNNAMED_S = 5.0


@contextlib.contextmanager
def held(path: Path, doing: str, keep: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold the lock file at `path` and remove it afterwards, unless `keep()` is true then.

    Raises ArtefactError if another process holds it. `doing` describes the work for the message, like "is making
    data/model".
    """
    taken = f"{path}: another process {doing}; wait for it or end it"
    cure = "remove it: this program locks a file of that name"
    if (found := kind_of(path, cure, ArtefactError)) not in (None, "a file"):  # opening a pipe would block
        raise ArtefactError(f"{path}: must be a file, got {found}; {cure}")
    try:
        file = path.open("a")
    except FileNotFoundError:  # the previous holder has just removed the folder of the lock
        raise ArtefactError(taken) from None
    with file:
        if not (_locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_at(file, path)):
            raise ArtefactError(taken)
        file.truncate(0)
        file.write(str(Path.cwd()))
        file.flush()
        try:
            yield
        finally:
            if not keep():
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def in_turn(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file at `path`. While a process of another working tree holds it, wait for it.

    DVC runs experiments in working trees of their own, which share .scratch. Raises ArtefactError if a process of this
    working tree holds the lock: both would write the same artefact. The holder may remove the folder of the lock.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as waiting:
            announced, unnamed_since = False, None
            while True:
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(held(path, doing))
                    break
                except ArtefactError:
                    holder = _holder(path)
                    if holder == str(Path.cwd()):
                        raise
                    # An empty file is named in a moment. Else it belongs to somebody who locks it for another reason.
                    unnamed_since = (unnamed_since or time.monotonic()) if holder == "" else None
                    if unnamed_since and time.monotonic() - unnamed_since > _UNNAMED_S:
                        raise
                if holder and not announced:
                    print(f"waiting for {holder}, which {doing}", flush=True)
                    announced = True
                    waiting.enter_context(_announced(path.with_name(_WAITING)))
                if holder is not None:  # else the lock has just been released
                    time.sleep(_POLL_S)
        yield


def is_awaited(path: Path) -> bool:
    """Whether another process waits `in_turn` for the lock file at `path`. To be asked by the holder."""
    waiting = path.with_name(_WAITING)
    try:
        with waiting.open("r+") as file:
            if not _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return True
            waiting.unlink(missing_ok=True)  # who opened it and has no lock yet sees that and makes a new one
    except FileNotFoundError:
        pass
    except OSError:
        return True
    return False


def is_free(path: Path) -> bool:
    """Whether there is a lock file at `path` that no process holds."""
    try:
        with path.open("r+") as file:
            return _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False


def _announced(waiting: Path) -> IO[str]:
    """The file that tells the holder of a lock that somebody waits, locked until it is closed."""
    while True:
        waiting.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            file = waiting.open("a")
            if _locked(file, fcntl.LOCK_SH) and _is_at(file, waiting):
                return file
            file.close()
        time.sleep(_POLL_S)  # its holder removes it; where a file system knows no locks, this lasts


def _locked(file: IO[str], how: int) -> bool:
    """Lock an open file. False if another process holds it."""
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at `path`: its holder may have removed it before it was locked."""
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except OSError:
        return False


def _holder(path: Path) -> str | None:
    """The folder in which the holder of a lock file works, "" if it is not known; None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""
