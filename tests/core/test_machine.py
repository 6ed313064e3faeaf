"""Each cause of a failed write or start has its own sentence and cure."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from remint.core import machine


def failed(number):
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "what", "cure"),
    [
        (failed(errno.ENOSPC), "the disk is full (", "free space and run again"),
        (failed(errno.EDQUOT), "the quota of this user", "remove files of your own"),
        (failed(errno.EFBIG), "a file is larger than its file system allows", "another file system"),
        (failed(errno.EROFS), "the disk is mounted read-only", "mount it"),
        (failed(errno.EIO), "input/output error", "check the disk"),
        (failed(errno.EACCES), "cannot be written (Permission denied)", "make "),
        (failed(errno.EMFILE), "this process may open only", "ulimit -n"),
        (failed(errno.ENFILE), "the machine has too many open files", "end other programs"),
        (failed(errno.EAGAIN), "no further process or thread", "raise the limit"),
        (RuntimeError("can't start new thread"), "no further process or thread", "raise the limit"),
        (failed(errno.ENOMEM), "the machine has too little memory", "end other programs"),
        (ImportError("libx.so: failed to map segment from shared object"), "too little memory", "end other programs"),
        (failed(errno.ENAMETOOLONG), "a path cannot be followed", "shorter path"),
        (Exception("I/O error: No space left on device (os error 28)"), "the disk is full (", "free space"),
        (Exception("File too large (os error 27)"), "larger than its file system allows", "another file system"),
    ],
)
def test_a_cause_has_its_own_sentence(error, what, cure, tmp_path):
    found = machine.explain(error, tmp_path / "not/there/yet")
    assert what in found[0]
    assert cure in found[1]


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("errno"), ImportError("no module named x"), failed(errno.ENOENT)]
)
def test_any_other_error_is_none_of_the_machine(error):
    assert machine.explain(error) is None


def test_no_inodes_are_not_a_full_disk(monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=100, f_favail=0))
    assert "no inodes left" in machine.explain(failed(errno.ENOSPC))[0]


LIMITED = """
import resource, sys
from pathlib import Path
from remint.core import machine
resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]),) * 2)
try:
    exec(sys.argv[3])
except BaseException as error:
    print(*machine.explain(error), sep="; ")
"""


@pytest.mark.parametrize(
    ("limit", "value", "action", "said"),
    [
        (
            "RLIMIT_FSIZE",
            1000,
            "Path('x').write_bytes(bytes(5000))",
            "may write, 1000 bytes (ulimit -f); raise the limit",
        ),
        ("RLIMIT_NOFILE", 12, "files = [open('x', 'w') for _ in range(50)]", "may open only 12 files (ulimit -n)"),
        ("RLIMIT_AS", 200 << 20, "bytearray(1 << 30)", "is limited to 200 MiB (ulimit -v)"),
    ],
)
def test_a_limit_of_the_process_is_named_with_its_value(tmp_path, limit, value, action, said):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, limit, str(value), action], cwd=tmp_path, capture_output=True, text=True
    )
    assert said in done.stdout, done.stderr
    assert resource.getrlimit(getattr(resource, limit))[0] != value


def test_free_space_is_that_of_the_nearest_folder(tmp_path):
    assert machine.free_bytes(tmp_path / "a/b") >> 24 == machine.free_bytes(Path(tmp_path)) >> 24
