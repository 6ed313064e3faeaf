"""One process at a time: a lock file that the kernel lets go of when its holder ends, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from remint.core.errors import ArtefactError


@contextlib.contextmanager
def held(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file at `path`, which is removed afterwards. Raises ArtefactError if another process holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file between our two steps.
            free = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except OSError:
            free = False
        if not free:
            raise ArtefactError(f"{path}: another process {doing}; wait for it or end it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
