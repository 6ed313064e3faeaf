"""`remint ui` prints an address that answers, and leaves no process behind."""

import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.conftest import ROOT
from tests.workplace import free_port, processes_in, wait_for


@pytest.fixture
def port():
    return free_port()


def start(folder, port):
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder)
    return subprocess.Popen(
        [sys.executable, "-m", "remint", "ui", "--port", port],
        cwd=folder,
        # A proxy from the environment must not be used for loopback.
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "http_proxy": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_it_says_its_address_once_it_answers_and_ends_without_a_word(tmp_path, port):
    with start(tmp_path, port) as process:
        heard = []
        for line in iter(process.stdout.readline, ""):
            heard.append(line)
            if line.startswith("the runs: "):
                break
        address = f"http://127.0.0.1:{port}/"
        assert address in heard[-1], heard
        page = urllib.request.urlopen(address, timeout=20)  # not read to its end: no browser may keep the server alive
        assert page.status == 200
        process.send_signal(signal.SIGINT)
        assert (process.stdout.read(), process.wait()) == ("", 0)
        page.close()
    wait_for(lambda: not processes_in(tmp_path), seconds=20)


@pytest.mark.slow
def test_a_killed_command_takes_its_server_along(tmp_path, port):
    with start(tmp_path, port) as process:
        for line in iter(process.stdout.readline, ""):
            if line.startswith("the runs: "):
                break
        assert len(processes_in(tmp_path)) > 1
        process.kill()
    wait_for(lambda: not processes_in(tmp_path), seconds=20)


@pytest.mark.slow
def test_a_server_that_is_stopped_before_it_answers_leaves_no_traceback(tmp_path, port):
    with start(tmp_path, port) as process:
        wait_for(lambda: len(processes_in(tmp_path)) > 1, seconds=30)
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate()[0]
        assert process.returncode == 0
    wait_for(lambda: not processes_in(tmp_path), seconds=20)
