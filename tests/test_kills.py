"""Every stage is killed again and again, at any moment: the same command always ends in the same bytes.

A start costs seconds of imports in which nothing can be harmed, so most stages here are forked off a server that has
imported everything already; they are processes of their own all the same, and SIGKILL ends them as it ends any other.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from remint.core import manifest
from tests.workplace import STAGES, imported, processes_in, wait_for, with_tiny_model

pytestmark = pytest.mark.slow

ARTEFACT = dict(zip(STAGES, ("dataset", "base", "checkpoint", "adapter", "model", "report"), strict=True))
PRELOADED = [f"remint.stages.{stage}.run" for stage in STAGES] + [
    "tests.test_kills",
    "remint.fingerprint",
    "mlflow",
    "mlflow.system_metrics.system_metrics_monitor",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.llama.modeling_llama",
]


def stage_process(root, stage, log):
    """What `python -m remint STAGE` does, in a process that has finished its imports."""
    os.chdir(root)
    os.environ["HF_HUB_OFFLINE"] = "0" if stage == "stage_base" else "1"
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["remint", stage]
    from remint.__main__ import main

    sys.exit(main())


@pytest.fixture(scope="module")
def server():
    with imported(*PRELOADED, threads=1) as context:
        # The first process waits for the imports. No test may count that as the time of a stage.
        first = context.Process(target=int)
        first.start()
        first.join()
        yield context


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The workplace with all artefacts, built by the commands that a user types and without interruption."""
    place = with_tiny_model(tmp_path_factory.mktemp("kills") / "place")
    place.record_checksums("tiny")
    for stage in STAGES:
        place.run("docker/run", "python", "-m", "remint", stage)
    return place


class Victim:
    """One stage of a workplace that is started again and again."""

    def __init__(self, server, place, stage, log):
        self.server, self.place, self.stage, self.log = server, place, stage, log
        self.name = ARTEFACT[stage]
        self.target = place.root / "data" / self.name
        self.kills = 0

    def start(self):
        process = self.server.Process(target=stage_process, args=(str(self.place.root), self.stage, str(self.log)))
        process.start()
        return process

    def run(self):
        """Run it to its end; returns the seconds that it took."""
        started = time.monotonic()
        process = self.start()
        process.join()
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        return time.monotonic() - started

    def kill(self, sign="", delay=0.0):
        """Start it, wait until a file like `sign` was made or changed and then `delay` seconds, kill it.

        A machine that is busy may see the sign too late: a process that ended by itself is not counted.
        """
        started = time.time_ns()
        process = self.start()
        wait_for(lambda: not process.is_alive() or not sign or self.made(sign, started), pause=0.0005)
        process.join(delay)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        self.kills += process.exitcode != 0
        self.check_what_is_left()

    def made(self, sign, since):
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_mtime_ns > since for path in self.place.root.glob(sign))
        return False

    def check_what_is_left(self):
        """No process is left, and the artefact is complete or absent."""
        wait_for(lambda: not processes_in(self.place.root), seconds=20)
        if self.target.exists():
            manifest.verify(self.target, self.name)

    def check_the_end(self, whole):
        """The same bytes, and no unfinished work is left."""
        assert self.place.bytes(self.name) == whole
        assert {path.name for path in (self.place.root / "data").iterdir()} == {
            "source",
            ".gitignore",
            *ARTEFACT.values(),
        }
        assert not list((self.place.root / ".scratch").glob("train/*"))
        assert "damaged" not in self.log.read_text()


def test_a_training_that_is_killed_twenty_times_ends_in_the_same_bytes(server, built, tmp_path):
    whole = built.bytes("checkpoint")
    shutil.rmtree(built.root / "data/checkpoint")
    victim = Victim(server, built, "train", tmp_path / "log")
    chance = random.Random(20)
    command = ("docker/run", "python", "-m", "remint", "train")
    for _ in range(2):  # the entire command, during its imports
        process = built.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.1, 3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        victim.kills += 1
        victim.check_what_is_left()
    for _ in range(3):  # while it loads, quantizes and measures the untrained model
        victim.kill(delay=chance.uniform(0, 1.5))
    steps = ".scratch/train/*/steps"
    signs = ["step-*", ".draft-*", ".draft-*/state.safetensors", ".draft-*/manifest.json", ".removed-*"]
    for sign in chance.choices(signs, k=11):  # in a step, a write, a removal; each third step is measured
        victim.kill(f"{steps}/{sign}", delay=chance.choice([0, chance.uniform(0, 0.3)]))
    publishing = [
        "data/.checkpoint.draft",
        "data/.checkpoint.draft/history.jsonl",
        "data/.checkpoint.draft/manifest.json",
    ]
    for sign in [*publishing, "data/checkpoint", ".scratch/train/*/.steps.removed", *publishing]:
        if victim.kills < 20:
            victim.kill(sign)
    assert victim.kills == 20
    built.run(*command)
    victim.check_the_end(whole)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "train"])
def test_a_stage_that_is_killed_five_times_ends_in_the_same_bytes(server, built, tmp_path, stage):
    victim = Victim(server, built, stage, tmp_path / "log")
    whole = built.bytes(victim.name)
    length = victim.run()
    assert built.bytes(victim.name) == whole
    chance = random.Random(stage)
    for share in (0.1, 0.4, 0.7, 0.9):  # with the old artefact in place, then without one
        victim.kill(delay=length * chance.uniform(share - 0.1, share))
        if share == 0.4:
            shutil.rmtree(victim.target)
    for sign in ("*", "manifest.json", "*"):
        if victim.kills < 5:
            victim.kill(f"data/.{victim.name}.draft/{sign}")
    assert victim.kills == 5
    victim.run()
    victim.check_the_end(whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_its_own_status(server, built, tmp_path, number, status):
    victim = Victim(server, built, "train", tmp_path / "log")
    whole = built.bytes("checkpoint")
    shutil.rmtree(victim.target)
    process = built.start(
        *("docker/run", "python", "-m", "remint", "train"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for(lambda: victim.made(".scratch/train/*/steps/step-*", 0), process)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == status, said[-3000:]
    assert "the same command continues there" in said
    assert "Traceback" not in said
    assert not victim.target.exists()
    victim.run()
    assert "continuing after step" in victim.log.read_text()
    victim.check_the_end(whole)


SHARED = ("docker/run", "python", "-m", "remint", "train", "train.processes=2", "train.accumulation=4")


def only_results(files):
    """The artefact's files without the manifests, which record the settings."""
    return {name: data for name, data in files.items() if not name.endswith("manifest.json")}


def workers_of(process):
    """The processes that a training has started, as soon as they train."""
    return sorted(psutil.Process(process.pid).children(), key=lambda worker: worker.create_time())


@pytest.mark.parametrize(
    ("number", "victim", "status", "said"),
    [
        (signal.SIGTERM, "starter", 143, "the same command continues there"),
        (signal.SIGINT, "starter", 130, "the same command continues there"),
        (signal.SIGTERM, "all", 143, "the same command continues there"),
        (signal.SIGKILL, "second", 1, "error: train: process 2 of 2 was ended by SIGKILL; the same command continues"),
        (signal.SIGKILL, "starter", -9, "the same command continues there"),
    ],
)
def test_processes_that_share_a_training_end_together_and_go_on_together(built, number, victim, status, said):
    whole = only_results(built.bytes("checkpoint"))
    shutil.rmtree(built.root / "data/checkpoint")
    process = built.start(*SHARED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: list(built.root.glob(".scratch/train/*/steps/step-00000002")), process)
    workers = workers_of(process)
    assert len(workers) == 2
    for target in {"starter": [process], "second": workers[1:], "all": [process, *workers]}[victim]:
        target.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output[-3000:]
    assert said in output
    assert "Traceback" not in output
    wait_for(lambda: not processes_in(built.root), seconds=20)
    assert not (built.root / "data/checkpoint").exists()
    assert "continuing after step" in built.run(*SHARED)
    assert only_results(built.bytes("checkpoint")) == whole


def test_torchrun_may_start_the_processes_too(built):
    whole = only_results(built.bytes("checkpoint"))
    shutil.rmtree(built.root / "data/checkpoint")
    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    built.run("docker/run", *torchrun, "-m", "remint", *SHARED[4:])
    assert only_results(built.bytes("checkpoint")) == whole


def test_a_mistake_that_only_the_training_finds_is_reported_once(built):
    said = built.run(*SHARED, "train.lora.targets=[nothing]", status=1)
    assert said.count("params: train.lora.targets: the base has no layer of that name") == 1
    assert "Traceback" not in said
