"""A process ends with the one that started it, even if that one died first."""

import os
import signal
import subprocess
import sys

import pytest

from remint.core import process
from tests.conftest import ROOT

# A parent that dies before its child looks: the child is started by docker/run, which knows the parent.
CHILD = """
import sys, time
if sys.stdin.readline() != "look\\n":
    sys.exit("no input")
from remint.core import process
process.end_with_parent(process.known_parent())
print("lives", flush=True)
time.sleep(30)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux")
def test_a_parent_that_died_before_the_first_look_is_noticed(tmp_path):
    reader, writer = os.pipe()
    out, back = os.pipe()
    command = f'"{ROOT}/docker/run" sh -c \'touch up; exec "$0" -c "$CHILD"\' "{sys.executable}"'
    starter = subprocess.Popen(
        ["sh", "-c", f"exec 3<&0; {command} <&3 & while [ ! -e up ]; do sleep 0.05; done"],
        env={**os.environ, "CHILD": CHILD, "DVC_ROOT": str(ROOT)},
        cwd=tmp_path,
        stdin=reader,
        stdout=back,
    )
    starter.wait()
    os.close(reader)
    os.close(back)
    os.write(writer, b"look\n")
    with os.fdopen(out) as answers:
        said = answers.read()
    os.close(writer)
    assert "lives" not in said


def test_the_parent_is_known_only_to_the_process_that_docker_run_became(monkeypatch):
    monkeypatch.setenv("REMINT_STARTED", f"{os.getpid()}:17")
    assert process.known_parent() == 17
    assert process.known_parent() is None
    monkeypatch.setenv("REMINT_STARTED", f"{os.getpid() + 1}:17")
    assert process.known_parent() is None


def test_the_right_parent_ends_nothing(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "kill", lambda *what: ended.append(what))
    process.end_with_parent(os.getppid())
    process.end_with_parent()
    assert ended == []
    process.end_with_parent(os.getppid() + 1)
    assert ended == [(os.getpid(), signal.SIGTERM)]
