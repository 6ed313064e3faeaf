"""One pipeline in a clone of its own, run to its end however often it is killed."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil

from tests.soak.record import end_of
from tests.workplace import Workplace

_RUN_S = 1800  # no command takes longer, even on a machine that is busy with other work
# A command that is given again while the killed one still saves its state may be told to wait.
_BUSY = re.compile(r"another process|is busy|Unable to acquire lock|already running")
# Files whose appearance starts the time to a kill: a checkpoint, a draft of an artefact, a new artefact.
SIGNS = (".scratch/train/*/steps/step-*", "data/.*.draft", "data/.*.draft/*", "data/model")


@dataclass(frozen=True)
class Kill:
    """A signal to `dvc`, the `stage` or the `group` of both, `delay` seconds after the start or after a sign."""

    number: int
    target: str
    sign: str
    delay: float
    at_once: bool  # whether the command is given again at once, or when every process has ended

    @classmethod
    def draw(cls, chance):
        """A random kill."""
        sign = chance.choice(SIGNS) if chance.random() < 0.5 else ""
        return cls(
            chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]),
            chance.choice(["dvc", "stage", "group"]),
            sign,
            chance.uniform(0, 0.6) if sign else chance.uniform(0.3, 14),
            chance.random() < 0.5,
        )


class Pipeline:
    """A clone with settings of its own. `way` is how it is run: repro, fresh (no run cache), experiment or queue."""

    def __init__(self, name, template, settings, way, kills, variables, record):
        self.name, self.settings, self.way, self.kills, self.record = name, settings, way, list(kills), record
        self.root = template.root.with_name(name)
        subprocess.run(["git", "clone", "-q", template.root, self.root], check=True, env=template.environment())
        (self.root / ".venv").symlink_to(sys.prefix)
        shutil.copy(template.root / ".dvc/config.local", self.root / ".dvc/config.local")
        self.place = Workplace(self.root, **variables)
        self.log = self.root.with_name(f"{name}.log")
        if way in ("repro", "fresh"):
            self._edit()

    def _edit(self):
        params = self.root / "params.yaml"
        text = params.read_text(encoding="utf-8")
        for setting, value in self.settings.items():
            text, changed = re.subn(rf"(?m)^( *{setting.rpartition('.')[2]}: )[\w.-]+", rf"\g<1>{value}", text, count=1)
            assert changed, setting
        params.write_text(text, encoding="utf-8")

    def run(self):
        """Run the pipeline to its end."""
        if self.way == "queue":
            self._run_queue()
        else:
            self.run_command(*self._command())
        self.record.count(f"pipelines by {self.way}")
        self.record.say(f"{self.name} ({self.way}, {self.settings}) is done")

    def _command(self):
        if self.way == "experiment":
            return ("dvc", "exp", "run", *self._overrides())
        return ("dvc", "repro", *(["--no-run-cache"] if self.way == "fresh" else []))

    def _overrides(self):
        return [word for setting, value in self.settings.items() for word in ("-S", f"{setting}={value}")]

    def run_command(self, *command):
        """Give the command again and again until it ends by itself, with status 0. Each time a kill may hit it."""
        for _ in range(20 + len(self.kills)):
            kill = self.kills.pop(0) if self.kills else None
            status, said, killed = self._attempt(command, kill)
            if status == 0:
                return
            if killed:
                if not kill.at_once:
                    self.wait_until_gone()
            elif _BUSY.search(said):
                self.record.count("told to wait for the killed command")
                self.wait_until_gone()
            else:
                break
            if "Traceback" in said:
                self.record.count("tracebacks of killed commands")
        self.record.fault(self.name, f"`{' '.join(command)}` ends with {status}; its output ends\n{end_of(self.log)}")

    def _attempt(self, command, kill):
        """Run the command once; returns exit status, output, and whether the kill hit it."""
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}  ({kill})\n".encode())
            log.flush()
            process = self.place.start(*command, stdout=log, stderr=log, start_new_session=True)
        killed = kill is not None and self._kill(process, kill)
        if kill and not killed:
            self.kills.append(kill)
        try:
            status = process.wait(_RUN_S)
        except subprocess.TimeoutExpired:
            self.record.fault(self.name, f"`{' '.join(command)}` takes more than {_RUN_S} s; it is ended")
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        said = self.log.read_bytes()[start:].decode(errors="replace")
        if "Traceback" in said and not killed and not _BUSY.search(said):
            self.record.fault(self.name, f"a traceback\n{said[-3000:]}")
        return status, said, killed

    def _kill(self, process, kill):
        """Send the signal of a kill when its moment comes; whether there was a process to receive it."""
        since = time.time_ns()
        while kill.sign and process.poll() is None and not self._appeared(kill.sign, since):
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(kill.delay)
        targets = {"dvc": [process.pid], "stage": self.stages(), "group": [-process.pid]}[kill.target]
        while kill.target == "stage" and not targets and process.poll() is None:
            time.sleep(0.05)
            targets = self.stages()
        if process.poll() is not None:
            return False
        for pid in targets[:1]:
            try:
                os.killpg(-pid, kill.number) if pid < 0 else os.kill(pid, kill.number)
            except ProcessLookupError:
                return False
        self._count(kill)
        return True

    def _count(self, kill):
        self.record.count("kills")
        self.record.count(f"kills by {signal.Signals(kill.number).name}")
        self.record.count(f"kills of the {kill.target}")

    def _appeared(self, sign, since):
        for path in self.root.glob(sign):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime_ns > since:
                    return True
        return False

    def _processes(self):
        found = []
        for process in psutil.process_iter(["cwd", "cmdline", "status"]):
            cwd = process.info["cwd"] or ""
            if (cwd == str(self.root) or cwd.startswith(f"{self.root}/")) and process.info["status"] != "zombie":
                found.append((process.pid, process.info["cmdline"] or []))
        return found

    def stages(self):
        """Ids of the stage processes of this pipeline."""
        return [pid for pid, words in self._processes() if "remint" in words]

    def wait_until_gone(self, seconds=180, leave=()):
        """Wait until no process of this pipeline is left, except those with a word of `leave` in their command."""
        deadline = time.monotonic() + seconds
        while left := [words for _, words in self._processes() if not set(leave) & set(words)]:
            if time.monotonic() > deadline:
                self.record.fault(self.name, f"still running after {seconds} s: {' '.join(left[0])[:200]}")
                return
            time.sleep(0.1)

    def _run_queue(self):
        """Queue an experiment, start the queue, wait for it; a kill of the stage fails it, and it is queued again."""
        for attempt in range(10):
            name = f"soak-{attempt}"
            self._must("dvc", "exp", "run", "--queue", "--name", name, *self._overrides())
            self._must("dvc", "queue", "start")
            killed = self._kill_queued() if self.kills else False
            state = self._wait_for_queue(name)
            if state == "Success":
                self._must("dvc", "exp", "apply", name)
                self.wait_until_gone()
                return
            if not killed:
                break
        self.record.fault(self.name, f"the queued experiment ended as {state}; the log ends\n{end_of(self.log)}")

    def _kill_queued(self):
        kill = self.kills.pop(0)
        deadline = time.monotonic() + 180
        time.sleep(kill.delay)
        while not (targets := self.stages()):
            if time.monotonic() > deadline:
                self.kills.append(kill)
                return False
            time.sleep(0.05)
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, kill.number)
        self._count(Kill(kill.number, "stage", "", 0, False))
        return True

    def _wait_for_queue(self, name):
        deadline = time.monotonic() + _RUN_S
        while time.monotonic() < deadline:
            rows = [line.split() for line in self._must("dvc", "queue", "status").splitlines() if name in line.split()]
            state = next((word for word in rows[0] if word in ("Success", "Failed")), None) if rows else None
            if state:
                return state
            time.sleep(1)
        return "no result"

    def _must(self, *command):
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.place.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_RUN_S,
        )
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n{done.stdout}")
        if done.returncode:
            self.record.fault(self.name, f"`{' '.join(command)}` ends with {done.returncode}\n{done.stdout[-2000:]}")
        return done.stdout
