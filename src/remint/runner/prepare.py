"""Create the repository's MLflow database, or bring it to the schema of the installed MLflow: `make setup` runs this.

MLflow only observes. So a database that is broken is reported, with the cure, and does not stop the set-up.
"""

import subprocess
import sys

from remint.core.errors import one_line
from remint.runner import sqlite_store, store
from remint.runner.store_faults import Fault

_LIMIT_S = 300.0


def main() -> None:
    """Prints one line if the database cannot be used. A tracking server has its own database."""
    if not store.is_own():
        return
    address = store.uri()
    fault = store.check(address)
    if fault is None or fault.what == sqlite_store.IS_OLD:
        fault = _upgrade(address)
    if fault:
        print(f"warning: {store.line(fault, 'the next run logs to it')}", file=sys.stderr)


def _upgrade(address: str) -> Fault | None:
    """Let MLflow create or upgrade the database. Returns what failed, or None."""
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return store.describe_fault(address, TimeoutError())
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return store.describe_fault(address, RuntimeError(one_line(lines[-1] if lines else "it gave no reason")))


if __name__ == "__main__":
    main()
