"""Only one process holds the lock, and a killed process releases it."""

import fcntl
import os
import shutil
import subprocess
import sys

import pytest

from remint.core import lock as lock_module
from remint.core.errors import ArtefactError
from remint.core.lock import held, in_turn, is_awaited, is_free
from tests.workplace import wait_for


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


WAITER = """
import sys
from pathlib import Path
from remint.core.lock import in_turn, is_awaited
with in_turn(Path(sys.argv[1]), "is at it"):
    print("done", is_awaited(Path(sys.argv[1])), flush=True)
"""


def waiter(lock, folder):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", WAITER, lock], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_another_working_tree_waits_its_turn(tmp_path):
    lock = tmp_path / "scratch/lock"
    lock.parent.mkdir()
    with in_turn(lock, "is at it"):
        assert not is_awaited(lock)
        process = waiter(lock, tmp_path / "other")
        assert process.stdout.readline() == f"waiting for {os.getcwd()}, which is at it\n"  # noqa: PTH109
        wait_for(lambda: is_awaited(lock), process)
        assert process.poll() is None
    assert process.communicate() == ("done False\n", "")
    assert not list(lock.parent.iterdir())


def test_a_waiting_process_that_was_killed_is_not_waited_for(tmp_path):
    lock = tmp_path / "lock"
    with in_turn(lock, "is at it"):
        process = waiter(lock, tmp_path / "other")
        wait_for(lambda: is_awaited(lock), process)
        process.kill()
        process.communicate()
        assert not is_awaited(lock)


def test_the_same_working_tree_does_not_wait(tmp_path):
    lock = tmp_path / "lock"
    again = in_turn(lock, "is at it")
    with in_turn(lock, "is at it"), pytest.raises(ArtefactError, match="another process is at it; wait for it"), again:
        pass
    with in_turn(lock, "is at it"):
        pass


def test_a_lock_that_vanishes_with_its_folder_is_free_at_once(tmp_path, monkeypatch):
    lock = tmp_path / "scratch/lock"
    lock.parent.mkdir()
    slept = []
    monkeypatch.setattr(lock_module.time, "sleep", slept.append)
    real = lock_module.held

    def vanishing(path, doing):
        monkeypatch.setattr(lock_module, "held", real)
        shutil.rmtree(path.parent)  # as the holder does when it has ended
        raise ArtefactError("taken")

    monkeypatch.setattr(lock_module, "held", vanishing)
    with in_turn(lock, "is at it"):
        assert lock.exists()
    assert slept == []


def test_a_file_that_somebody_else_locks_is_waited_for_some_seconds_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "_UNNAMED_S", 0.5)
    lock = tmp_path / "lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ArtefactError, match="another process is at it"), in_turn(lock, "is at it"):
            pass


def test_a_waiter_that_opened_the_removed_file_announces_itself_again(tmp_path):
    lock = tmp_path / "lock"
    stale = (tmp_path / "waiting").open("a")
    assert not is_awaited(lock)  # removes it
    assert not lock_module._is_at(stale, tmp_path / "waiting")
    stale.close()
    with lock_module._announced(tmp_path / "waiting"):
        assert is_awaited(lock)


def test_a_free_lock_is_one_that_nobody_holds(tmp_path):
    lock = tmp_path / "lock"
    assert not is_free(lock)
    with held(lock, "is at it"):
        assert not is_free(lock)
    lock.touch()
    assert is_free(lock)
