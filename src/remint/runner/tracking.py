"""Logs to MLflow: `train` and `eval_chat` log live, and every state of the pipeline becomes one complete run.

DVC owns the artefacts, MLflow only observes them. A process of its own talks to the store (`runner/recorder.py`): a
store that is slow, broken or away can neither delay nor change a stage. A failure here prints one line.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from remint.core.errors import RemintError, Stopped
from remint.core.log import Log, silent
from remint.core.paths import MADE_BY
from remint.runner import recorded, store
from remint.runner.store_faults import Fault

_LIVE = ("train", "eval_chat")
_COMMAND = (sys.executable, "-m", "remint.runner.recorder")
# Bytes of metrics that wait for the recorder. It reads at once, so they are only used up if it hangs.
_ROOM = 2**20
# Seconds: for the recorder's imports; in all for what is left to log when a stage has ended; the same if it failed.
_IMPORT_S, _END_S, _FAILED_S = 60.0, 30.0, 5.0


@contextlib.contextmanager
def stage_run(stage: str, fingerprint: str, config: DictConfig) -> Iterator[Log]:
    """A Log for one run of a stage. It continues an unfinished run of the same fingerprint and repeats no step."""
    if stage not in _LIVE:
        yield silent
        return
    settings: Any = OmegaConf.to_container(config, resolve=True)
    dataset = settings.pop("paths", {}).get("dataset") if stage == "train" else None
    sink = _Sink({"stage": stage, "fingerprint": fingerprint, "settings": settings, "dataset": dataset})
    status = "FAILED"
    try:
        yield sink.log
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    finally:
        sink.close(status)


def sync() -> None:
    """Log the pipeline's present state as one run, unless the store already has it. Prints the run's name.

    Raises RemintError if MLflow cannot be reached or written.
    """
    _check_recorded()
    fault = store.check(store.uri()) or _synced()
    if fault:
        raise RemintError(store.line(fault, "run `remint sync`"))


def _check_recorded() -> None:
    """Refuse a state whose artefacts were made with other settings than params.yaml has: the row would mix both.

    The figures come from two artefacts, whose files are verified. A damaged report must not become a row.
    """
    faults: list[str] = []
    for stage in MADE_BY:
        try:
            recorded.check(stage)
            if stage in _LIVE:
                recorded.verify(stage)
        except RemintError as error:
            faults += error.faults
    if faults:
        raise RemintError(*faults)


def _synced() -> Fault | None:
    """Let the recorder log the pipeline's state. Returns what is wrong with the store, or None."""
    with _Recorder({"stage": None}) as recorder:
        if fault := store.probe(store.uri()):  # while the recorder imports MLflow
            return fault
        for message in recorder.messages():
            if "said" in message:
                print(message["said"])
                return None
            if "errors" in message:
                raise RemintError(*message["errors"])
            if "bug" in message:
                raise RuntimeError(f"the recorder failed:\n{message['bug']}")
            if "fault" in message:
                return Fault(*message["fault"])
        return recorder.fault()


class _Sink:
    """Passes the metrics of a stage to the recorder. Prints at most one warning, whatever happens to the store."""

    def __init__(self, task: Mapping[str, Any]):
        self._recorder: _Recorder | None = None
        self._dropped, self._warned = 0, False
        try:
            self._recorder = _Recorder(task)
        except OSError as error:  # no memory for another process, for example
            self._warn(Fault(f"the process that logs to it cannot be started ({error.strerror})", "end others"))

    def log(self, metrics: Mapping[str, float], step: int = 0, again: bool = False) -> None:
        """Pass on the metrics of a step. Returns at once."""
        if self._recorder is None:
            return
        values = {key: float(value) for key, value in metrics.items()}
        row = {"metrics": values, "step": step, "time": time.time_ns() // 10**6, "again": again}
        self._dropped += not self._recorder.send(row)
        for message in self._recorder.heard():
            self._note(message)

    def close(self, status: str) -> None:
        """End the run with one of MLflow's statuses, such as FINISHED. Waits some seconds for what is left to log."""
        if self._recorder is None:
            return
        with self._recorder as recorder:
            recorder.send({"status": status})
            done = False
            for message in recorder.messages(_END_S if status == "FINISHED" else _FAILED_S):
                self._note(message)
                done = "done" in message
            if not done or self._dropped:
                self._warn(recorder.fault())

    def _note(self, message: Mapping[str, Any]) -> None:
        if "fault" in message:
            self._warn(Fault(*message["fault"]))

    def _warn(self, fault: Fault) -> None:
        if not self._warned:
            self._warned = True
            fault = Fault(f"{fault.what}, going on without it", fault.cure)
            print(f"warning: {store.line(fault, '`remint sync` logs the result')}", flush=True)


class _Recorder:
    """The process that talks to MLflow, as a context manager that ends it. `recorder.py` describes the messages."""

    def __init__(self, task: Mapping[str, Any]):
        # Its own session: Ctrl-C must not reach it before the stage has sent the last step.
        self._process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._unsent, self._partial = bytearray(), b""
        self._patience, self._ready, self._ended = _IMPORT_S, False, False
        self.send(task)

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with contextlib.suppress(OSError):
                pipe.close()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send a message without waiting. False if there is no room for it."""
        line = json.dumps(message, default=str).encode() + b"\n"
        if len(self._unsent) + len(line) > _ROOM:
            return False
        self._unsent += line
        self._flush()
        return True

    def heard(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """The messages that arrived, after a wait of at most `wait_s` for the first."""
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        if self._unsent:
            poll.register(self._to, select.POLLOUT)
        if not self._ended and poll.poll(wait_s * 1000):
            self._flush()
            with contextlib.suppress(BlockingIOError):
                received = os.read(self._from, 2**20)
                self._ended = not received
                self._partial += received
        *lines, self._partial = self._partial.split(b"\n")
        messages = [json.loads(line) for line in lines]
        for message in messages:
            self._ready = True  # the first message follows the imports
            self._patience = message.get("patience", self._patience)
        return messages

    def messages(self, limit_s: float = float("inf")) -> Iterator[dict[str, Any]]:
        """The messages until the process ends, is silent for longer than it announced, or `limit_s` has passed.

        The limit starts after the imports, which are slow only on a busy machine.
        """
        now = time.monotonic()
        start, last = now if self._ready else None, now
        while not self._ended:
            end = min(last + self._patience, start + limit_s if start else float("inf"))
            if (left := end - time.monotonic()) <= 0:
                return
            for message in self.heard(left):
                last = time.monotonic()
                start = start or last
                yield message

    def fault(self) -> Fault:
        """Why the process did not do its task, for a process that sent no fault."""
        if self._ended and (status := self._process.wait()):
            return Fault(f"the process that logs to it ended with status {status}", "free memory")
        fault = store.describe_fault(store.uri(), TimeoutError())
        return fault if self._ready else Fault("the process that logs to it hangs", "end other programs")

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                del self._unsent[: os.write(self._to, self._unsent)]
