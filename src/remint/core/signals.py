"""What a process does when it is asked to end."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(receive: Callable[[int, object], None]) -> Iterator[None]:
    """Let `receive` have SIGTERM and SIGINT, by number and frame, in place of what had them before. Main thread alone."""
    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
