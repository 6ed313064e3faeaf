"""The job for every contestant of `peers.py`, and the reports of its steps. Imports no packages: each has its own."""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

IGNORED = -100


@dataclass(frozen=True)
class Job:
    """The same work for all contestants. Each document is a pair of ids and labels.

    A label is the token's id if the token is supervised, else IGNORED. `pad` is an id that no document contains, so
    every other id is a document token. A step has `rows` × `length` tokens.
    """

    base: str
    pad: int
    length: int
    rows: int
    rank: int
    alpha: int
    dropout: float
    targets: list[str]
    lr: float
    precision: str
    device: str
    seed: int
    documents: list[list[list[int]]]
    held_out: list[list[list[int]]]

    @property
    def documents_a_step(self) -> int:
        """Number of documents that together have the tokens of a step: the batch size without packing."""
        mean = sum(len(ids) for ids, _ in self.documents) / len(self.documents)
        return max(1, round(self.rows * self.length / mean))

    def save(self, path: Path) -> None:
        """Write the job to `path` as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def load(path: Path) -> Job:
    """The job that `Job.save` wrote."""
    return Job(**json.loads(path.read_text(encoding="utf-8")))


class Channel:
    """The contestant's end of two pipes: it reports its steps, and waits for its turn before each one."""

    def __init__(self) -> None:
        # stdout is the message pipe. What libraries print goes to stderr, which is the log.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, kind: str, **facts: Any) -> None:
        """Send one message: a line of JSON."""
        self._out.write(json.dumps({"kind": kind, **facts}) + "\n")
        self._out.flush()

    def turn(self) -> None:
        """Wait until it is this contestant's turn. Ends the process if the benchmark has ended."""
        if not sys.stdin.readline():
            raise SystemExit("peers: the benchmark has ended")


class Clock:
    """Times the steps of one contestant. A step starts with its turn, so it includes building the batch."""

    def __init__(self, channel: Channel):
        self._channel = channel

    def begin(self) -> None:
        """Report that everything is loaded, then wait for the first step."""
        self._channel.say("ready")
        self._next()

    def end_step(self, counts: Iterable[Any]) -> None:
        """Report a finished step. `counts`: document tokens, supervised tokens among them, positions in the batches."""
        self._say(time.monotonic() - self._started, counts)
        self._next()

    def close(self) -> None:
        """Finish the reports. Here there is nothing left to do."""

    def _say(self, seconds: float, counts: Iterable[Any]) -> None:
        tokens, learned, places = map(int, counts)
        self._channel.say("step", seconds=seconds, tokens=tokens, learned=learned, places=places)

    def _next(self) -> None:
        self._channel.turn()
        self._started = time.monotonic()


class DeviceClock(Clock):
    """For a GPU, which one contestant uses alone: it runs without pauses, and the step times are reported afterwards.

    Reading the time after each step would be a host-device sync and would stall the GPU.
    """

    def begin(self) -> None:
        """Report that everything is loaded, then wait for the first step."""
        self._steps: list[tuple[Any, Iterable[Any]]] = []
        super().begin()
        self._first = self._mark()

    def end_step(self, counts: Iterable[Any]) -> None:
        """Record a step that was queued on the GPU."""
        self._steps.append((self._mark(), counts))

    def close(self) -> None:
        """Report all steps."""
        before = self._first
        for mark, counts in self._steps:
            mark.synchronize()
            self._say(before.elapsed_time(mark) / 1000, counts)
            self._next()
            before = mark

    def _mark(self) -> Any:
        import torch

        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark


def steady(steps: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The last two thirds of the steps, when compiling and filling caches is over."""
    return steps[len(steps) // 3 :]
