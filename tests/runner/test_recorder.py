"""Live logging goes through a process of its own: no store delays a stage, and no row is lost that the store could take."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from remint.core.errors import Stopped
from remint.runner import recorder, runs, store, tracking

TASK = {"stage": "train", "fingerprint": "f" * 64, "settings": {"a": 1}, "dataset": None}


@pytest.fixture
def away(monkeypatch):
    """A store that fails as often as `away.times` says. Every row that it gets is in `away.rows`."""
    made = SimpleNamespace(times=0, when="opening", rows=[], ended=[])

    def attempt(when):
        if made.when == when and made.times > 0:
            made.times -= 1
            raise ConnectionError("Connection refused")

    class Run:
        def __init__(self):
            attempt("opening")

        def log(self, rows):
            attempt("logging")
            made.rows += [row["step"] for row in rows]

        def end(self, status):
            made.ended.append(status)

        leave = staticmethod(lambda: None)

    monkeypatch.setattr(runs, "stage_run", lambda task, computing, progress: Run())
    monkeypatch.setattr(recorder, "_check_and_import", lambda report: None)
    monkeypatch.setattr(recorder, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    return made


@pytest.fixture
def record(monkeypatch):
    """Give rows of these steps to a recorder, then the status. Returns its messages."""

    def run(steps, status="FINISHED", pause=0.0):
        reader, writer = os.pipe()
        monkeypatch.setattr(sys, "stdin", os.fdopen(reader))
        messages = []

        def feed():
            with os.fdopen(writer, "w") as pipe:
                for step in steps:
                    row = {"metrics": {"loss": 1.0}, "step": step, "time": 0, "again": False}
                    print(json.dumps(row), file=pipe, flush=True)
                    time.sleep(pause)
                print(json.dumps({"status": status}), file=pipe, flush=True)

        feeder = threading.Thread(target=feed)
        feeder.start()
        recorder._record(TASK, recorder._Inbox(), lambda **message: messages.append(message))
        feeder.join()
        sys.stdin.close()
        return messages

    return run


@pytest.mark.parametrize("when", ["opening", "logging"])
@pytest.mark.parametrize("times", [0, 1, 4])
def test_a_store_that_comes_back_gets_every_row_once(times, when, away, record):
    away.times, away.when = times, when
    messages = record(range(20), pause=0.02)
    assert away.rows == list(range(20))
    assert away.ended == ["FINISHED"]
    assert [message for message in messages if "fault" in message] == messages[:times]
    assert messages[-1] == {"done": True}


def test_a_store_that_stays_away_is_reported_and_given_up(away, record):
    away.times = 10**6
    messages = record(range(20), pause=0.01)
    assert away.rows == []
    assert all(message["fault"][0] == "nothing listens at this address" for message in messages)


HANGING = "import time; time.sleep(60)"
FAILING = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"fault": ["it is broken", "mend it"], "patience": 5}), flush=True)
    if "status" in line:
        break
"""
CRASHING = "import os; os._exit(7)"


@pytest.mark.parametrize(
    ("program", "said"),
    [(HANGING, "hangs"), (FAILING, "it is broken, going on without it; mend it"), (CRASHING, "ended with status 7")],
)
def test_a_stage_is_not_delayed_and_warns_once(program, said, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_COMMAND", (sys.executable, "-S", "-c", program))
    monkeypatch.setattr(tracking, "_IMPORT_S", 0.3)
    with tracking.stage_run("train", "f" * 64, OmegaConf.create({"paths": {"dataset": "x"}})) as log:
        slowest = 0.0
        for step in range(20_000):  # more than the pipe holds
            started = time.monotonic()
            log({"loss": 1.0, "lr": 0.1}, step)
            slowest = max(slowest, time.monotonic() - started)
        ended = time.monotonic()
    assert slowest < 1
    assert time.monotonic() - ended < 5
    heard = capsys.readouterr()
    assert heard.err == ""
    (line,) = heard.out.splitlines()
    assert line.startswith("warning: MLflow at ")
    assert said in line
    assert line.endswith("then `remint sync` logs the result")


def test_a_process_that_cannot_be_started_stops_nothing(monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_COMMAND", ("/nonexistent/python",))
    with tracking.stage_run("train", "f" * 64, OmegaConf.create({})) as log:
        log({"loss": 1.0}, 1)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_recorder_of_a_killed_stage_ends_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "remint.runner.recorder"],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdin.write(json.dumps(TASK).encode() + b"\n")
    process.stdin.close()  # as the kernel does for a process that was killed
    assert process.wait(timeout=60) == 1
    process.stdout.close()


def steps_in(path):
    """The logged steps of the metric `loss`, and the status of each run."""
    with sqlite3.connect(path) as database:
        steps = [row[0] for row in database.execute("SELECT step FROM metrics WHERE key = 'loss' ORDER BY step")]
        statuses = [row[0] for row in database.execute("SELECT status FROM runs")]
    database.close()
    return steps, statuses


@pytest.mark.slow
def test_a_continued_run_has_each_step_once_and_only_a_long_lock_costs_rows(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    monkeypatch.setattr(tracking, "_FAILED_S", 60.0)  # the machine may be busy
    config = OmegaConf.create({"seed": 7})
    with pytest.raises(Stopped), tracking.stage_run("eval_chat", "f" * 64, config) as log:
        for step in (1, 2, 4):  # step 3 was lost
            log({"loss": 1.0 / step}, step)
        raise Stopped("stopped", 143)
    assert steps_in(path)[1] == ["KILLED"], capsys.readouterr().out
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(3, holder.close)
    release.start()
    with tracking.stage_run("eval_chat", "f" * 64, config) as log:
        for step in (1, 2, 3, 4, 5):
            log({"loss": 1.0 / step}, step)
    release.join()
    assert steps_in(path) == ([1, 2, 3, 4, 5], ["FINISHED"])
    # Another process that waited for this one, or was ended while it waited, computed nothing.
    with tracking.stage_run("eval_chat", "f" * 64, config) as log:
        for step in (1, 2, 3, 4, 5):
            log({"loss": 1.0 / step}, step, again=True)
    with pytest.raises(Stopped), tracking.stage_run("eval_chat", "f" * 64, config):
        raise Stopped("stopped", 143)
    assert steps_in(path) == ([1, 2, 3, 4, 5], ["FINISHED"])
    assert capsys.readouterr().out == ""
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with tracking.stage_run("eval_chat", "e" * 64, config) as log:
        log({"loss": 1.0}, 1)
    holder.close()
    (warning,) = capsys.readouterr().out.splitlines()
    assert "another process has locked the database, going on without it; " in warning
    assert store.check(store.uri()) is None
