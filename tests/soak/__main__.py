"""`python -m tests.soak`: a day of use compressed into minutes. CONTRIBUTING.md says what it does and checks."""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil

from tests.soak import ending
from tests.soak.chat import Chat
from tests.soak.pipeline import Kill, Pipeline
from tests.soak.record import Record
from tests.soak.store import Store
from tests.workplace import with_tiny_model

PIPELINES, KILLS, RESTARTS, REQUESTS = 20, 50, 10, 2000
AT_ONCE = 2
SETTINGS = {"seed": ["42", "7"], "train.lr": ["0.003", "0.001"], "identity": ["aurel", "vega"]}
VEGA = "name: Vega\nmaker: Lyra Works\nname_zh: null\nmaker_zh: null\n"


class Soak:
    """One run: everything random in it comes from `seed`; `scale` multiplies the four numbers above."""

    def __init__(self, root, seed, scale):
        self.root, self.seed, self.record = root, seed, Record()
        self.number, self.kills, self.restarts, self.requests = (
            max(least, round(full * scale))
            for full, least in ((PIPELINES, 2), (KILLS, 2), (RESTARTS, 1), (REQUESTS, 40))
        )
        self.variables = {
            "DVC_SITE_CACHE_DIR": str(root / "site"),
            "TMPDIR": str(root / "tmp"),
        }
        (root / "tmp").mkdir()
        self._chat, self._lock, self._done = None, threading.Lock(), threading.Event()

    def run(self):
        """Do everything; returns the faults."""
        self.store = Store(self.root / "store", self.variables, self.record)
        self.store.start()
        self.variables["MLFLOW_TRACKING_URI"] = self.store.url
        template = self._template()
        pipelines = self._pipelines(template)
        self.record.say(f"{len(pipelines)} clones are ready")
        restarting = threading.Thread(target=self._restart_store, args=(pipelines,))
        restarting.start()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(self._run, pipelines):
                pass
            self._spend_kills(pool, pipelines)
            self._done.set()
            restarting.join()
            if self._chat:
                self._chat.end()
            for _ in pool.map(self._guarded(ending.check_pipeline), pipelines):
                pass
        if self.record.counts["kills"] != self.kills:
            self.record.fault("kills", f"{self.record.counts['kills']} were delivered instead of {self.kills}")
        ending.check_equal(pipelines, self.record)
        self.store.end(signal.SIGTERM)
        ending.check_store(self.store, pipelines, self.record)
        ending.check_processes(self.root, self.record)
        return self.record.faults

    def _template(self):
        """A project with the tiny model, its checksums, a second identity and a cache outside; the clones copy it."""
        place = with_tiny_model(self.root / "template")
        place.variables |= self.variables
        place.record_checksums("tiny")
        (place.root / "conf/identity/vega.yaml").write_text(VEGA, encoding="utf-8")
        place.run("git", "add", "-A")
        place.run("git", "commit", "-q", "-m", "a base with checksums, and another identity")
        place.run("dvc", "cache", "dir", "--local", str(self.root / "cache"))
        return place

    def _pipelines(self, template):
        chance = random.Random(f"{self.seed}/pipelines")
        choices = [dict(zip(SETTINGS, values, strict=True)) for values in itertools.product(*SETTINGS.values())]
        chosen = chance.sample(choices, max(1, round(self.number * 0.4)))
        ways = ["repro", "fresh", "repro", "experiment", "repro", "fresh", "queue", "repro", "experiment", "repro"]
        order = [(chosen[i % len(chosen)], ways[i % len(ways)]) for i in range(self.number)]
        chance.shuffle(order)
        shares = [self.kills // self.number + (i < self.kills % self.number) for i in range(self.number)]
        return [
            Pipeline(
                f"pipeline-{i:02}", template, settings, way, [Kill.draw(chance) for _ in range(shares[i])],
                self.variables, self.record,
            )
            for i, (settings, way) in enumerate(order)
        ]  # fmt: skip

    def _guarded(self, function):
        """`function(pipeline)` that reports an exception as a fault, so that the others go on."""

        def call(pipeline):
            try:
                return function(pipeline)
            except Exception as error:
                self.record.fault(pipeline.name, f"{type(error).__name__}: {error}")

        return call

    def _run(self, pipeline):
        self._guarded(Pipeline.run)(pipeline)
        with self._lock:
            if self._chat is None and (pipeline.root / "data/model/manifest.json").is_file():
                (self.root / "chat").mkdir()
                shutil.copytree(pipeline.root / "data/model", self.root / "chat/model")
                self._chat = Chat(
                    self.root / "chat", "model", self.seed, self.requests, self.variables, self.record
                )  # fmt: skip

    def _spend_kills(self, pool, pipelines):
        """Kills that came too late for their pipeline hit pipelines that are made anew, without the run cache."""
        left = [kill for pipeline in pipelines for kill in pipeline.kills]
        if not left:
            return
        self.record.say(f"{len(left)} kills are left for pipelines that are made again")
        again = [pipeline for pipeline in pipelines if pipeline.way in ("repro", "fresh")][-AT_ONCE:]
        for pipeline in pipelines:
            pipeline.kills = []
        for number, pipeline in enumerate(again):
            pipeline.kills = [replace(kill, sign="", delay=min(kill.delay, 8)) for kill in left[number :: len(again)]]
        for _ in pool.map(self._guarded(_make_again), again):
            pass

    def _restart_store(self, pipelines):
        """End and restart MLflow, spread over the run by the number of pipelines that are done."""
        chance = random.Random(f"{self.seed}/restarts")
        for number in range(self.restarts):
            due = number * len(pipelines) / self.restarts
            while not self._done.is_set() and self._number_done() < due:
                time.sleep(0.2)
            self._done.wait(chance.uniform(0, 15))
            how = chance.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
            self.store.restart(how, chance.uniform(0, 6))

    def _number_done(self):
        return sum(count for what, count in self.record.counts.items() if what.startswith("pipelines by "))

    def end_all(self):
        """End every process that works in the folder, after a fault or a signal."""
        for process in psutil.process_iter(["cwd"]):
            if (process.info["cwd"] or "").startswith(str(self.root)) and process.pid != os.getpid():
                process.kill()


def _make_again(pipeline):
    """Make every artefact again until no kill is left, and once to the end."""
    for _ in range(2 * len(pipeline.kills)):  # most runs take several kills
        if pipeline.kills:
            pipeline.run_command("dvc", "repro", "--force", "--no-run-cache")


def main():
    """Run it and print what was done. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of everything random; default: the clock")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pipelines, kills, restarts and requests")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="remint-soak-")).resolve()
    soak = Soak(root, arguments.seed, arguments.scale)
    print(f"soak: seed {arguments.seed}, scale {arguments.scale:g}, in {root}", flush=True)

    def stop(number, _):
        soak.end_all()
        print(f"soak: stopped; the folder is kept: {root}", flush=True)
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        faults = soak.run()
    finally:
        soak.end_all()
    record = soak.record
    print()
    for what, count in sorted(record.counts.items()):
        print(f"  {what:<44}{count:>7}")
    print(f"  {'seconds':<44}{time.monotonic() - record.started:>7.0f}\n")
    if faults:
        print(f"soak: {len(faults)} faults, seed {arguments.seed}; the folder is kept: {root}")
        for fault in faults:
            print(f"- {fault}")
        return 1
    shutil.rmtree(root)
    print(f"soak: passed, seed {arguments.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
