"""The image with a real engine: the same bytes as without it, after any stop or kill."""

import json
import os
import shutil
import signal
import subprocess
from functools import partial

import pytest

from remint.core.paths import ARTEFACTS
from tests.engine.conftest import ENGINE, copy, docker
from tests.workplace import wait_for

pytestmark = pytest.mark.engine

IMAGE = ENGINE["REMINT_IMAGE"]
# Runs the stage although DVC's run cache already has its result.
AGAIN = ("dvc", "repro", "--force", "--no-run-cache", "--single-item", "train")
TRAIN = ("docker/run", "python", "-m", "remint", "train")


def containers(place):
    return docker("container", "ls", "--all", "--format", "{{.Names}}", "--filter", f"label=remint.root={place.root}")


def same(one, other):
    """Whether the lock files and artefacts of two places are equal in every byte."""
    assert (one.root / "dvc.lock").read_text() == (other.root / "dvc.lock").read_text()
    expected, found = one.bytes(*ARTEFACTS), other.bytes(*ARTEFACTS)
    assert [name for name in {*expected, *found} if expected.get(name) != found.get(name)] == []
    return True


def test_each_stage_in_a_container_leaves_the_bytes_of_a_run_without(outside, inside):
    assert same(outside, inside)
    assert {path.stat().st_uid for path in inside.root.rglob("*")} == {os.getuid()}
    assert containers(inside) == ""


def test_the_whole_pipeline_in_one_container_does_so_too_and_as_any_user(outside, tmp_path):
    user = os.getuid() or 4321
    place = copy(outside, tmp_path / "whole", REMINT_NETWORK="none", REMINT_OPTIONS=f"--user={user}:{user}")
    (place.root / ".scratch/home").mkdir(parents=True, exist_ok=True)
    if user != os.getuid():
        for path in (place.root, *place.root.rglob("*")):
            os.chown(path, user, user, follow_symlinks=False)
    assert "pipeline run" in place.run("make", "inside")
    assert same(outside, place)
    assert {path.stat().st_uid for path in (place.root / "data").rglob("*")} == {user}


def stop_by(how, process, name):
    """One way to end a run. After SIGKILL, the watcher of the client ends the container."""
    if how == "docker stop":
        docker("stop", name)
    else:
        os.killpg(process.pid, {"Ctrl-C": signal.SIGINT, "SIGKILL": signal.SIGKILL}[how])


@pytest.mark.parametrize("how", ["Ctrl-C", "docker stop", "SIGKILL"])
def test_what_was_stopped_is_gone_and_goes_on_to_the_same_bytes(inside, how):
    whole = inside.bytes("checkpoint")
    shutil.rmtree(inside.root / "data/checkpoint")
    log = inside.root / ".scratch/stopped.log"
    with log.open("w") as file:
        process = inside.start(*AGAIN, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        steps = partial((inside.root / ".scratch/train").glob, "*/steps/step-0*")
        wait_for(lambda: list(steps()), process)
        name = containers(inside)
        assert name.startswith("remint-train-")
        refused = inside.run(*TRAIN, status=1)
        assert f"the container {name} is already running this (running)" in refused
        stop_by(how, process, name)
        assert process.wait(timeout=120) != 0
    wait_for(lambda: containers(inside) == "", seconds=60)
    assert list(steps()), log.read_text()
    assert not (inside.root / "data/checkpoint").exists()
    assert "continuing after step" in inside.run(*AGAIN)
    assert inside.bytes("checkpoint") == whole


def test_an_experiment_in_a_copy_runs_in_the_image(inside):
    inside.run("git", "add", "-A")
    inside.run("git", "commit", "-q", "-m", "built")
    changed = ("-S", "eval_chat.max_new_tokens=5")
    assert "Running stage 'eval_chat'" in inside.run("dvc", "exp", "run", "--temp", "--name", "apart", *changed)
    assert "apart" in inside.run("dvc", "exp", "list", "--name-only")
    assert inside.run("git", "status", "--porcelain") == ""


def test_make_stop_ends_what_runs_here_and_nothing_else(inside, tmp_path):
    other = copy(inside, tmp_path / "other")
    processes = [place.start("docker/run", "sleep", "300") for place in (inside, other)]
    wait_for(lambda: containers(inside) and containers(other))
    inside.run("make", "stop")
    assert processes[0].wait(timeout=30) != 0
    assert containers(inside) == ""
    assert containers(other) != ""
    other.run("make", "stop")
    assert processes[1].wait(timeout=30) != 0


def test_nothing_of_the_machine_can_be_written(inside):
    for place in ("/usr/x", "/opt/remint/x", "/etc/x"):
        assert "Read-only file system" in inside.run("docker/run", "sh", "-c", f"touch {place}", status=1)
    assert "0000000000000000" in inside.run("docker/run", "sh", "-c", "grep CapEff /proc/self/status")
    status = inside.run("docker/run", "sh", "-c", "exit 7", status=7)
    assert status == ""


def test_the_image_says_what_it_is():
    (config,) = json.loads(docker("image", "inspect", IMAGE))
    assert config["Config"]["User"] == "remint"
    assert config["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    assert not [name for name in ("index-url", "PIP_INDEX", "find-links") if name in history]
