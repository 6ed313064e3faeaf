"""A store of MLflow that is broken in any way is one line with a cure that works; `runner/store.py` has the diagnosis."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from remint.__main__ import call
from remint.core.errors import RemintError
from remint.runner import prepare, sqlite_store, store
from remint.runner.store_faults import set_aside
from tests import broken_servers
from tests.conftest import ROOT
from tests.test_faults import read_only
from tests.workplace import free_port

KNOWN, NEWEST = sqlite_store.schema_versions()


def make(path, version=NEWEST, table="experiments"):
    """A database file with one table and, unless `version` is None, MLflow's note of the schema's version."""
    with sqlite3.connect(path) as database:
        database.execute(f"CREATE TABLE {table} (name TEXT)")
        database.executemany(f"INSERT INTO {table} VALUES (?)", [("x" * 3000,)] * 20)
        if version is not None:
            database.execute("CREATE TABLE alembic_version (version_num TEXT)")
            database.execute("INSERT INTO alembic_version VALUES (?)", (version,))
    database.close()


def truncated(path):
    make(path)
    os.truncate(path, path.stat().st_size // 2)


def journal_of_another(path):
    path.write_bytes(b"garbage" * 100)
    path.with_name("mlflow.db-journal").write_bytes(b"journal")


FAULTS = {
    "truncated": (truncated, "the database is truncated"),
    "garbage": (lambda path: path.write_bytes(os.urandom(5000)), "the file is not a SQLite database"),
    "short": (lambda path: path.write_bytes(b"SQLite format 3\0"), "the file is not a SQLite database"),
    "journal": (journal_of_another, "the file is not a SQLite database"),
    "folder": (lambda path: path.mkdir(), "mlflow.db must be a file, but is none"),
    "pipe": (os.mkfifo, "mlflow.db must be a file, but is none"),
    "dangling": (lambda path: path.symlink_to("/nonexistent/x.db"), "is a link to /nonexistent/x.db"),
    "other": (lambda path: make(path, None, "songs"), "belongs to another program"),
    "half made": (lambda path: make(path, None), "was made only in part"),
    "newer": (lambda path: make(path, "ffffffffffff"), "by a newer MLflow"),
    "older": (lambda path: make(path, min(KNOWN - {NEWEST})), "by an older MLflow"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory whose own store is used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(store, "_OWN", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


def fault_of(*command):
    """The one line with which a command ends."""
    with pytest.raises(RemintError) as caught:
        call(command)
    (line,) = str(caught.value).splitlines()
    return line


def test_the_versions_of_the_schema_are_known():
    assert len(KNOWN) > 50
    assert re.fullmatch(r"\w{12}", NEWEST)


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_database_is_one_line_and_its_cure_works(name, here):
    harm, said = FAULTS[name]
    harm(here / "mlflow.db")
    line = fault_of("sync")
    assert line.startswith(f"MLflow at sqlite:///{here}/mlflow.db: ")
    assert said in line
    assert line.endswith("then run `remint sync`")
    assert said in fault_of("ui", "--port", free_port())
    if name == "older":  # its cure is MLflow's own command
        assert "`cp mlflow.db mlflow.db.old && .venv/bin/mlflow db upgrade sqlite:///mlflow.db`" in line
        return
    (cure,) = re.findall("`(mv .*?)`", line)
    subprocess.run(cure, shell=True, check=True)
    assert not [path for path in here.iterdir() if ".broken" not in path.name]
    assert store.check(store.uri()) is None


def test_what_was_set_aside_before_is_not_overwritten(here):
    for expected in ("mlflow.db.broken", "mlflow.db.broken2", "mlflow.db.broken3"):
        (here / "mlflow.db").mkdir()
        subprocess.run(re.findall("`(.*?)`", set_aside(here / "mlflow.db"))[0], shell=True, check=True)
        assert (here / expected).is_dir()


@pytest.mark.parametrize("content", [None, b"", "good"])
def test_a_store_that_is_right_or_not_yet_made_has_no_fault(content, here):
    if content == "good":
        make(here / "mlflow.db")
    elif content is not None:
        (here / "mlflow.db").write_bytes(content)
    assert store.check(store.uri()) is None


def test_a_database_in_a_place_that_may_not_be_written(here):
    make(here / "mlflow.db")
    (here / "mlflow.db").chmod(0o666)
    with read_only(here):
        line = fault_of("sync")
    assert "may not be read and written; `chmod u+rwx" in line
    (here / "mlflow.db").chmod(0o444)
    here.chmod(0o777)
    (here / "another").mkdir()
    with read_only(here / "another"):
        assert "mlflow.db may not be read and written; `chmod u+rw mlflow.db`" in fault_of("sync")


def test_a_lock_is_reported_if_it_is_held_for_long(here, monkeypatch):
    make(here / "mlflow.db")
    holder = sqlite3.connect(here / "mlflow.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(sqlite_store, "_LOCK_S", 0.1)
    assert "another process has locked the database; wait until" in fault_of("sync")
    monkeypatch.setattr(sqlite_store, "_LOCK_S", 5.0)
    release = threading.Timer(0.3, holder.close)
    release.start()
    assert store.check(store.uri()) is None
    release.join()


@pytest.mark.parametrize("value", ["", "  \t"])
def test_a_blank_variable_means_the_own_store(value, here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    assert store.is_own()
    (here / "mlflow.db").mkdir()
    assert "mlflow.db must be a file" in fault_of("sync")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("htp://127.0.0.1", "MLflow does not know the scheme 'htp'"),
        ("file:///tmp/runs", "this is a folder, and MLflow no longer logs to folders"),
        ("mlruns", "this is a folder"),
        ("127.0.0.1:5000", "this is a folder"),
        ("http://", "no valid host or port"),
        ("http://127.0.0.1:99999", "no valid host or port"),
        ("sqlite://mlflow.db", "the address is not valid"),
        ("http://user:hunter2@127.0.0.1:9", "nothing listens at this address"),
    ],
)
def test_a_wrong_address_is_one_line(address, said, here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    line = fault_of("sync")
    assert said in line
    assert "correct" in line
    assert "MLFLOW_TRACKING_URI" in line
    assert "hunter2" not in line


def test_a_server_shows_its_runs_itself(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    line = fault_of("ui", "--port", free_port())
    assert "http://127.0.0.1:9: this server shows its runs itself; open that address" in line


def test_set_up_reports_a_broken_database_and_goes_on(here, capsys):
    (here / "mlflow.db").mkdir()
    prepare.main()
    heard = capsys.readouterr()
    assert heard.out == ""
    (line,) = heard.err.splitlines()
    assert line.startswith("warning: MLflow at ")
    assert "`mv mlflow.db mlflow.db.broken`" in line
    assert "mlflow db upgrade" not in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["database or disk is full", "disk I/O error"])
def test_a_full_disk_is_not_taken_for_what_it_left_behind(text, here):
    make(here / "mlflow.db", min(KNOWN - {NEWEST}))
    assert store.describe_fault(store.uri(), sqlite3.OperationalError(text)).cure == "free space"


def test_damage_inside_is_found_when_an_operation_failed(here):
    path = here / "mlflow.db"
    make(path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 3 * 4096)
        file.write(os.urandom(2 * 4096))
    assert "damaged" in store.describe_fault(store.uri(), ValueError("some nonsense")).what


def test_a_folder_for_artifacts_that_is_a_file(here):
    (here / "mlruns").write_text("x")
    error = NotADirectoryError(20, "Not a directory", str(here / "mlruns/1"))
    fault = store.describe_fault(store.uri(), error)
    assert fault.what == "mlruns must be a folder, but is none"
    assert "`mv mlruns mlruns.broken`" in fault.cure


def sync(folder, address):
    """Run `remint sync` in a folder with that store. Returns status, lines of output and seconds."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "conf", folder / "conf", dirs_exist_ok=True)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "remint", "sync"],
        cwd=folder,
        env={**os.environ, "MLFLOW_TRACKING_URI": address, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout.splitlines(), time.monotonic() - started


ANSWERS = {
    "401": "refuses the login",
    "hangs_up": "closes the connection",
    "loop": "endless redirects",
    "html": "not as an MLflow server does",
    "no_json": "not as an MLflow server does",
    "404": "is not an MLflow server",
    "429": "status 429",
    "500": "fails with status 500",
    "503": "fails with status 503",
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_a_wrong_answer_is_found_before_mlflow_is_imported(fault, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    with broken_servers.serving(fault) as server:
        found = store.probe(f"http://127.0.0.1:{server.server_port}")
    assert ANSWERS[fault] in found.what


def test_a_server_is_asked_without_the_password(here):
    with broken_servers.serving("empty_store") as server:
        assert store.probe(f"http://user:hunter2@127.0.0.1:{server.server_port}/") is None
        assert server.authorization is None
    with broken_servers.serving("401") as server:  # MLflow may know how to log in
        assert store.probe(f"http://user:hunter2@127.0.0.1:{server.server_port}") is None


@pytest.mark.parametrize("fault", ["silent", "trickle"])
def test_a_server_that_hangs_is_not_waited_for(fault, here, monkeypatch):
    monkeypatch.setattr(store, "_PROBE_S", 1.2)
    started = time.monotonic()
    with broken_servers.serving(fault) as server:
        found = store.probe(f"http://127.0.0.1:{server.server_port}")
    assert found.what == "the server does not answer"
    assert time.monotonic() - started < 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("silent", "the server does not answer; start the server"),
        ("trickle", "the server does not answer; start the server"),
        ("503", "fails with status 503; look into the server's log"),
        ("401", "refuses the login; set MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_a_server_that_fails_is_one_line_within_twenty_seconds(fault, said, tmp_path):
    with broken_servers.serving(fault) as server:
        status, lines, seconds = sync(tmp_path, f"http://127.0.0.1:{server.server_port}")
    assert status == 1
    (line,) = lines
    assert line.startswith("error: MLflow at http://127.0.0.1:")
    assert said in line
    assert seconds < 20


@pytest.mark.slow
def test_an_address_without_an_answer_or_tls_is_one_line_within_twenty_seconds(tmp_path):
    with broken_servers.never_accepting() as port:
        status, (line,), seconds = sync(tmp_path, f"http://127.0.0.1:{port}")
    assert (status, "does not answer" in line) == (1, True)
    assert seconds < 20
    with broken_servers.serving("html") as server:
        status, (line,), seconds = sync(tmp_path, f"https://127.0.0.1:{server.server_port}")
    assert (status, "write http:// instead of https://" in line) == (1, True)
    assert seconds < 20
