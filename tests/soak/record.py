"""What a soak run did and what went wrong, collected from all its threads."""

import collections
import threading
import time


class Record:
    """Counts of what was done, and a list of faults. Threads may write to it at the same time."""

    def __init__(self):
        self.started = time.monotonic()
        self.counts = collections.Counter()
        self.faults = []
        self._lock = threading.Lock()

    def count(self, what, number=1):
        """Add to the count of `what`."""
        with self._lock:
            self.counts[what] += number

    def fault(self, where, what):
        """Note a fault and print it at once, so that a long run shows it early."""
        with self._lock:
            self.faults.append(f"{where}: {what}")
        self.say(f"FAULT {where}: {what}")

    def say(self, text):
        """Print a line with the seconds since the start."""
        print(f"{time.monotonic() - self.started:7.1f} s  {text}", flush=True)


def end_of(path, lines=25):
    """The last lines of a text file, to be shown with a fault."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
