"""A lock file that one process can hold at a time. The kernel releases it when the holder ends, even if killed."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from remint.core.errors import ArtefactError
from remint.core.files import kind_of

_POLL_S = 0.2
_WAITING = "waiting"
# A lock file gets its holder's folder right after it was locked. An empty one for longer than this is not ours.
_UNNAMED_S = 5.0


@contextlib.contextmanager
def held(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file at `path` and remove it afterwards.

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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file after we opened it and before we locked it.
            free = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except OSError:
            free = False
        if not free:
            raise ArtefactError(taken)
        file.truncate(0)
        file.write(str(Path.cwd()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def in_turn(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file at `path`. While a process of another working tree holds it, wait for it.

    DVC runs experiments in working trees of their own, which share .scratch. Raises ArtefactError if a process of this
    working tree holds the lock: both would write the same artefact.
    """
    with contextlib.ExitStack() as stack:
        announced, since = None, time.monotonic()
        while True:
            try:
                stack.enter_context(held(path, doing))
                break
            except ArtefactError:
                holder = _holder(path)
                if holder == str(Path.cwd()) or (holder is None and time.monotonic() - since > _UNNAMED_S):
                    raise
            if holder and announced is None:
                print(f"waiting for {holder}, which {doing}", flush=True)
                announced = stack.enter_context(path.with_name(_WAITING).open("a"))
                fcntl.flock(announced, fcntl.LOCK_SH)
            time.sleep(_POLL_S)
        if announced:
            fcntl.flock(announced, fcntl.LOCK_UN)
        yield


def is_awaited(path: Path) -> bool:
    """Whether another process waits `in_turn` for the lock file at `path`. To be asked by the holder."""
    try:
        with path.with_name(_WAITING).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    path.with_name(_WAITING).unlink(missing_ok=True)
    return False


def _holder(path: Path) -> str | None:
    """The folder in which the holder of a lock file works; None if it is not known."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8") or None
    return None
