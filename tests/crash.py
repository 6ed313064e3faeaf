"""A simulated crash during file-system work: from the n-th operation on, the process does nothing.

Python reports each change of a file to an audit hook in advance, from anywhere in the standard library. Only
fsync has no audit event and is wrapped here. After the crash every file whose bytes were not yet forced to the disk
loses its second half, as after a power cut.
"""

import contextlib
import os
import sys
from pathlib import Path

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.truncate", "open"}
_active = None


class Crash(BaseException):
    """Nothing catches it, just as nothing runs after a kill."""


class _Disk:
    def __init__(self, root, at):
        self.root, self.at, self.done, self.safe = root, at, 0, {_inode(path) for path in _files(root)}

    def operation(self):
        """Called before each change. After the crash none is made, not even one in a `finally` block."""
        self.done += 1
        if self.done >= self.at:
            raise Crash

    def lose_what_was_not_synced(self):
        for path in _files(self.root):
            if _inode(path) not in self.safe:
                os.truncate(path, path.stat().st_size // 2)


def _files(root):
    return [path for path in root.rglob("*") if path.is_file()]


def _inode(path):
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _hook(event, arguments):
    if _active is None or event not in _CHANGES:
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    # rmtree passes names relative to the folder that it has opened, so relative names belong to this root as well.
    path = Path(arguments[0])
    if path.is_relative_to(_active.root) or not path.is_absolute():
        _active.operation()


sys.addaudithook(_hook)


@contextlib.contextmanager
def crashing(root, at, monkeypatch):
    """Crash at the `at`-th change under `root`, and swallow the crash. Yields an object that counts them in `done`."""
    global _active
    disk = _Disk(root, at)

    def synced(descriptor):
        disk.operation()
        facts = os.fstat(descriptor)
        disk.safe.add((facts.st_dev, facts.st_ino))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        _active = disk
        try:
            yield disk
        except Crash:
            _active = None
            disk.lose_what_was_not_synced()
        finally:
            _active = None
