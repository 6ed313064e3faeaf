"""The soak at a small scale: `make soak` runs all of it."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.soak
def test_a_short_soak_passes(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.soak", "--seed", "1", "--scale", "0.04"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.endswith("soak: passed, seed 1\n")
    assert not list(tmp_path.iterdir())
