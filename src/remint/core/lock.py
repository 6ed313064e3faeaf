"""A lock file that one process can hold at a time. The kernel releases it when the holder ends, even if killed."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from remint.core.errors import ArtefactError


@contextlib.contextmanager
def held(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file at `path` and remove it afterwards.

    Raises ArtefactError if another process holds it. `doing` describes the work for the message, like "is making
    data/model".
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file after we opened it and before we locked it.
            free = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except OSError:
            free = False
        if not free:
            raise ArtefactError(f"{path}: another process {doing}; wait for it or end it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
