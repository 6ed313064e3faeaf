"""Only one process holds the lock, and a killed process releases it."""

import subprocess
import sys

import pytest

from remint.core.errors import ArtefactError
from remint.core.lock import held


def test_a_second_holder_is_refused_and_the_file_goes(tmp_path):
    again = held(tmp_path / "lock", "is at it")
    with held(tmp_path / "lock", "is at it"), pytest.raises(ArtefactError, match="another process is at it"), again:
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_holder_holds_nothing(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from remint.core.lock import held\n"
        "with held(Path(sys.argv[1]), 'x'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "lock"])
    assert done.returncode == -9
    assert (tmp_path / "lock").exists()
    with held(tmp_path / "lock", "is at it"):
        pass
