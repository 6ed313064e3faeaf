"""What every contestant of `peers.py` is given, and how it tells of its steps. Needs no package, as each brings its own."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
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

    def __init__(self, channel: Channel, wait: Callable[[], None]):
        """`wait` returns when the device has finished what it was given."""
        self._channel, self._wait = channel, wait

    def begin(self) -> None:
        """Everything is loaded: the first step comes next."""
        self._wait()
        self._channel.say("ready")
        self._next()

    def end_step(self, tokens: int, learned: int, places: int) -> None:
        """A step over so many tokens has ended, `learned` of them with a target, in batches with room for `places`."""
        self._wait()
        seconds = time.monotonic() - self._started
        self._channel.say("step", seconds=seconds, tokens=tokens, learned=learned, places=places)
        self._next()

    def _next(self) -> None:
        self._channel.turn()
        self._started = time.monotonic()


def steady(steps: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The last two thirds: compiling and filling caches is over."""
    return steps[len(steps) // 3 :]
