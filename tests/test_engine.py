"""The image with a real engine: the same bytes as without it, whatever is stopped or killed on the way."""

import json
import os
import shutil
import signal
import subprocess
from functools import partial

import pytest

from tests.workplace import ARTEFACTS, STAGES, Workplace, wait_for, with_tiny_model

pytestmark = pytest.mark.engine

DOCKER = os.environ.get("DOCKER", "docker")
ENGINE = {"RUNNER": "docker", "DOCKER": DOCKER, "REMINT_IMAGE": os.environ.get("REMINT_IMAGE", "remint")}
TRAIN = ("docker/run", "python", "-m", "remint", "train")


def docker(*arguments):
    done = subprocess.run([DOCKER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def containers(place):
    return docker("container", "ls", "--all", "--format", "{{.Names}}", "--filter", f"label=remint.root={place.root}")


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """The pipeline run without a container."""
    place = with_tiny_model(tmp_path_factory.mktemp("outside") / "a folder with spaces")
    place.record_checksums("tiny")
    assert place.repro() == STAGES
    return place


def copy(outside, root, **variables):
    """The same project, with nothing built."""
    left_out = shutil.ignore_patterns("data", ".scratch", "dvc.lock", "mlflow.db", "mlruns", "cache", "tmp")
    shutil.copytree(outside.root, root, symlinks=True, ignore=left_out)
    shutil.copytree(outside.root / "data/source", root / "data/source")
    return Workplace(root, **ENGINE, **variables)


@pytest.fixture(scope="module")
def inside(outside, tmp_path_factory):
    """The pipeline run with each stage in a container of its own."""
    place = copy(outside, tmp_path_factory.mktemp("inside") / "a folder with spaces", REMINT_NETWORK="none")
    assert place.repro() == STAGES
    return place


def same(one, other):
    """Whether lock file and artefacts of two places agree in every byte."""
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


def stop_by(how, place, process, name):
    """One way to end a run; what SIGKILL leaves is ended by what watches the client."""
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "docker stop":
        docker("stop", name)
    elif how == "make stop":
        place.run("make", "stop")
    else:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["Ctrl-C", "docker stop", "make stop", "SIGKILL"])
def test_what_was_stopped_is_gone_and_goes_on_to_the_same_bytes(inside, how):
    whole = inside.bytes("checkpoint")
    shutil.rmtree(inside.root / "data/checkpoint")
    log = inside.root / ".scratch/stopped.log"
    with log.open("w") as file:
        process = inside.start("dvc", "repro", "train", stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        steps = partial((inside.root / ".scratch/train").glob, "*/steps/step-0*")
        wait_for(lambda: list(steps()), process)
        name = containers(inside)
        assert name.startswith("remint-train-")
        refused = inside.run(*TRAIN, status=1)
        assert f"the container {name} is at it already (running)" in refused
        stop_by(how, inside, process, name)
        assert process.wait(timeout=120) != 0
    wait_for(lambda: containers(inside) == "", seconds=60)
    assert list(steps()), log.read_text()
    assert not (inside.root / "data/checkpoint").exists()
    assert "continuing after step" in inside.run("dvc", "repro", "train")
    assert inside.bytes("checkpoint") == whole


def test_an_experiment_in_a_copy_and_in_the_queue_runs_in_the_image(inside):
    inside.run("git", "add", "-A")
    inside.run("git", "commit", "-q", "-m", "built")
    inside.run("dvc", "exp", "run", "--temp", "--name", "apart", "-S", "convert.checkpoint=best")
    assert "apart" in inside.run("dvc", "exp", "list", "--name-only")
    assert inside.run("git", "status", "--porcelain") == ""


def test_nothing_of_the_machine_can_be_written(inside):
    for place in ("/usr/x", "/opt/remint/x", "/etc/x"):
        assert "Read-only file system" in inside.run("docker/run", "sh", "-c", f"touch {place}", status=1)
    assert "0000000000000000" in inside.run("docker/run", "sh", "-c", "grep CapEff /proc/self/status")
    status = inside.run("docker/run", "sh", "-c", "exit 7", status=7)
    assert status == ""


def test_the_image_says_what_it_is():
    (config,) = json.loads(docker("image", "inspect", ENGINE["REMINT_IMAGE"]))
    assert config["Config"]["User"] == "remint"
    assert config["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", ENGINE["REMINT_IMAGE"])
    assert not [name for name in ("index-url", "PIP_INDEX", "find-links") if name in history]
