"""What every contestant of `peers.py` is given, and how it tells of its steps. Needs no package, as each brings its own."""

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
    """The same work for all. `documents` are ids and labels (the id where a token is learned, else IGNORED).

    `pad` is an id that no document holds, so that whatever is not it is a token; a step is `rows` × `length` tokens.
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
        """As many as have the tokens of a step between them: the batch of those that do not pack."""
        mean = sum(len(ids) for ids, _ in self.documents) / len(self.documents)
        return max(1, round(self.rows * self.length / mean))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def load(path: Path) -> Job:
    """The job that `Job.save` wrote."""
    return Job(**json.loads(path.read_text(encoding="utf-8")))


class Channel:
    """The contestant's end of two pipes: it says what it did, and begins a step when it is told to."""

    def __init__(self) -> None:
        # Whatever libraries print belongs into the log.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, kind: str, **facts: Any) -> None:
        """One line."""
        self._out.write(json.dumps({"kind": kind, **facts}) + "\n")
        self._out.flush()

    def turn(self) -> None:
        """Wait until it is this contestant's turn. Ends the process when nobody is there to say so."""
        if not sys.stdin.readline():
            raise SystemExit("peers: the benchmark has ended")


class Clock:
    """Times the steps of one contestant. A step lasts from the turn to its end, so making the batch is a part of it."""

    def __init__(self, channel: Channel):
        self._channel = channel

    def begin(self) -> None:
        """Everything is loaded: the first step comes next."""
        self._channel.say("ready")
        self._next()

    def end_step(self, counts: Iterable[Any]) -> None:
        """A step has ended, over so many tokens, learned ones among them, and places for tokens in its batches."""
        self._say(time.monotonic() - self._started, counts)
        self._next()

    def close(self) -> None:
        """Nothing comes any more."""

    def _say(self, seconds: float, counts: Iterable[Any]) -> None:
        tokens, learned, places = map(int, counts)
        self._channel.say("step", seconds=seconds, tokens=tokens, learned=learned, places=places)

    def _next(self) -> None:
        self._channel.turn()
        self._started = time.monotonic()


class DeviceClock(Clock):
    """For a GPU, which a contestant has for itself: it runs on without a pause, and what its steps took is told afterwards.

    To ask after each step would make the GPU wait for whoever gives it the next one in time.
    """

    def begin(self) -> None:
        """Everything is loaded: the first step comes next."""
        self._steps: list[tuple[Any, Iterable[Any]]] = []
        super().begin()
        self._first = self._mark()

    def end_step(self, counts: Iterable[Any]) -> None:
        """A step was given to the GPU."""
        self._steps.append((self._mark(), counts))

    def close(self) -> None:
        """Tell of all steps."""
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
    """The last two thirds: compiling and filling caches is over."""
    return steps[len(steps) // 3 :]
