"""Real containers: the pipeline without and with them, and a team's servers; each is set up once for all tests here."""

import os
import shutil
import subprocess

import pytest

from remint.core.paths import ARTEFACTS
from tests.workplace import STAGES, Workplace, free_port, with_tiny_model

DOCKER = os.environ.get("DOCKER", "docker")
ENGINE = {"RUNNER": "docker", "DOCKER": DOCKER, "REMINT_IMAGE": os.environ.get("REMINT_IMAGE", "remint")}


def docker(*arguments):
    """The engine's output."""
    done = subprocess.run([DOCKER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Stack:
    """The project's own compose file, with ports and volumes only for these tests."""

    def __init__(self, folder):
        self.folder, self.name = folder, f"remint-test-{os.getpid()}"
        self.port, self.chat_port = free_port(), free_port()
        own = {"COMPOSE_PROJECT_NAME": self.name, "PORT": self.port, "CHAT_PORT": self.chat_port}
        self.variables = {**os.environ, "DOCKER": DOCKER, **own}

    def __call__(self, *arguments, status=0, **variables):
        done = subprocess.run(
            [self.folder / "docker/stack", *arguments],
            env={**self.variables, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == status, done.stdout[-3000:]
        return done.stdout

    def wipe(self):
        """Stop it and delete its volumes."""
        self("down")
        for volume in ("db", "artifacts"):
            docker("volume", "rm", f"{self.name}_{volume}")


def copy(outside, root, **variables):
    """The same project before its first run; its stages run in containers."""
    built = {str(outside.root / "data"): ARTEFACTS, str(outside.root): (".scratch", "dvc.lock", "mlflow.db", "mlruns")}
    built |= {str(outside.root / ".dvc"): ("cache", "tmp"), str(outside.root / "docker"): ("secrets",)}
    shutil.copytree(outside.root, root, symlinks=True, ignore=lambda folder, names: built.get(folder, ()))
    return Workplace(root, **ENGINE, **variables)


@pytest.fixture(scope="session")
def outside(tmp_path_factory):
    """The pipeline run without a container."""
    place = with_tiny_model(tmp_path_factory.mktemp("outside") / "a folder with spaces")
    place.record_checksums("tiny")
    assert place.repro() == STAGES
    return place


@pytest.fixture(scope="session")
def inside(outside, tmp_path_factory):
    """The pipeline with each stage in a container; only MLFLOW_TRACKING_URI makes it log to the stack."""
    place = copy(outside, tmp_path_factory.mktemp("inside") / "a folder with spaces")
    place.stack = Stack(place.root)
    place.stack("up")
    place.variables["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{place.stack.port}"
    try:
        assert place.repro() == STAGES
        place.run("docker/run", "python", "-m", "remint", "sync")
        yield place
    finally:
        place.stack.wipe()
