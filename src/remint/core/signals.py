"""How a process handles the signals that ask it to stop."""

import contextlib
import signal
from collections.abc import Callable, Iterator

# A user sends SIGINT by Ctrl-C, a system SIGTERM, a terminal that is closed SIGHUP.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. Raised like Ctrl-C's exception, so that what was started is ended and cleared away."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"ended by {signal.Signals(number).name}")


def raise_on_termination() -> None:
    """Raise Terminated in the main thread on SIGTERM and SIGHUP, unless they are ignored (as by nohup).

    Without this, Python would end at once: a draft folder would stay, and a program that it waits for would go on.
    """

    def receive(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise Terminated(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, receive)


@contextlib.contextmanager
def handled(receive: Callable[[int, object], None]) -> Iterator[None]:
    """Handle the signals of STOPPING with `receive(number, frame)`, then restore the old handlers. Main thread only.

    A signal that is ignored, as SIGHUP under nohup, stays ignored.
    """
    numbers = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
