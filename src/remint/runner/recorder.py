"""The process that talks to MLflow for a stage or for `remint sync`: python -m remint.runner.recorder.

It reads messages from its standard input, one JSON object a line: first the task, then rows of metrics, at last the
status that the run ends with. It writes messages to its standard output:

The run is opened with the first row. A stage that still waits for another process that computes the same may not touch
that one's run.

- `ready`: the imports are done.
- `patience`: the seconds until the next message, at most. A recorder that is silent for longer hangs and can be killed.
- `fault`: what is wrong with the store, and the cure. A stage's recorder tries again while the stage runs.
- `done`: everything is logged. `said`: what `sync` did. `errors`: mistakes that have nothing to do with the store.

What MLflow and its libraries print is discarded.
"""

import json
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from remint.core.errors import RemintError
from remint.core.process import end_with_parent
from remint.runner import store

# Rows of metrics that are kept while the store is away.
_KEPT = 200_000
# Rows in one request.
_ROWS = 100
# Seconds until the next attempt: doubled after each failure.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
# Seconds that the store has for its first answer and for each later one. MLflow's own limits are below: two attempts of
# five seconds. A database file that passed `store.check` is only slow, while it is made for example.
_FIRST_ANSWER_S, _MAKING_S, _ANSWER_S, _SYNC_ANSWER_S = 12.0, 60.0, 8.0, 45.0
_LIMITS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # a server may ask for an hour
}

Report = Callable[..., None]


def main() -> None:
    """Do one task, then exit without waiting for any thread of MLflow."""
    end_with_parent()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def report(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    task = json.loads(sys.stdin.readline())
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    if store.is_own():
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # may be blank, which MLflow would take for a folder
    try:
        if task["stage"]:
            _record(task, _Inbox(), report)
        else:
            _sync(report)
    except BrokenPipeError:  # the stage has ended
        os._exit(1)
    os._exit(0)


class _Inbox:
    """The rows and the status that arrive on standard input. A thread reads them, so that the sender never waits."""

    def __init__(self) -> None:
        self._rows: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._status: str | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            with self._changed:
                if "status" in message:
                    self._status = message["status"]
                else:
                    self._rows.append(message)
                self._changed.notify()
            if "status" in message:
                return
        # The stage was killed. A stage that continues it logs its own record, so nothing may be sent any more.
        os._exit(1)

    def take(self, rows: list[dict[str, Any]], wait_s: float | None, for_rows: bool) -> str | None:
        """Move what arrived to `rows`; returns the final status, or None if the stage still runs.

        Waits at most `wait_s` seconds for the status, and with `for_rows` for a row, too.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._status or (for_rows and self._rows), wait_s)
            rows.extend(self._rows)
            self._rows.clear()
            return self._status


def _record(task: Mapping[str, Any], inbox: _Inbox, report: Report) -> None:
    """Log the rows of a stage until its status arrives. After a failure, try again later: the store may come back."""
    run: Any = None
    rows: list[dict[str, Any]] = []
    ready = False
    wait_s: float | None = 0.0
    pause_s = _FIRST_PAUSE_S
    while True:
        status = inbox.take(rows, wait_s, for_rows=ready)
        try:
            if not ready:
                _check_and_import(report)
                ready = True
            if rows and not run:
                run = _opened(task, rows, report)
            while rows and run:
                run.log(rows[:_ROWS])
                del rows[:_ROWS]
            if status and run:
                run.end(status)
        except Exception as error:  # a store may fail in any way
            report(fault=store.describe_fault(store.uri(), error), patience=_ANSWER_S)
            if status:
                return
            if run:
                run.leave()
            run, ready, wait_s, pause_s = None, False, pause_s, min(2 * pause_s, _LONGEST_PAUSE_S)
            del rows[:-_KEPT]
        else:
            wait_s, pause_s = None, _FIRST_PAUSE_S
            if status:
                report(done=True)
                return


def _opened(task: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], report: Report) -> Any:
    """The run for these rows; None if all of them were logged before, by a run that has ended well."""
    from remint.runner import runs

    computing = any(not row["again"] for row in rows)
    return runs.stage_run(task, computing, lambda: report(patience=_ANSWER_S))


def _check_and_import(report: Report) -> None:
    """Import MLflow, then announce the time that the first answer may take. Raises StoreError."""
    address = store.uri()
    if fault := store.check(address):
        raise store.StoreError(*fault)
    is_file = address.startswith("sqlite")
    import mlflow.system_metrics.system_metrics_monitor

    if is_file:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    report(ready=True, patience=_MAKING_S if is_file else _FIRST_ANSWER_S)


def _sync(report: Report) -> None:
    try:
        _check_and_import(report)
        from remint.runner import runs

        report(said=runs.log_state(lambda: report(patience=_SYNC_ANSWER_S)))
    except RemintError as error:
        report(errors=error.faults)
    except BrokenPipeError:
        raise
    except Exception as error:
        if _is_bug(error):
            report(bug=traceback.format_exc())
        else:
            report(fault=store.describe_fault(store.uri(), error))


def _is_bug(error: Exception) -> bool:
    """Whether the error is a mistake in this program. Those of MLflow and the database's libraries are the store's."""
    if isinstance(error, OSError | ModuleNotFoundError | store.StoreError):
        return False
    return not type(error).__module__.startswith(("mlflow", "sqlalchemy", "sqlite3", "alembic", "requests", "urllib3"))


if __name__ == "__main__":
    main()
