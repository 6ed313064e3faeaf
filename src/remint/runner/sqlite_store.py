"""Checks MLflow's database file without importing MLflow: whether it is one, whole, of this version and writable."""

import contextlib
import os
import re
import shlex
import sqlite3
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from remint.core.errors import one_line
from remint.runner.store_faults import CORRECT, Fault, may, meaning, set_aside, shown

IS_OLD = "the database was made by an older MLflow"

# Seconds to wait for another process that holds the database's lock.
_LOCK_S = 5.0
# Seconds that a search for damage in a database may take.
_SEARCH_S = 3.0


def file_of(address: str) -> Path | None:
    """The file of a SQLite URI; None for another store, a database in memory, or an invalid URI."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", address)
    return Path(found[1]).absolute() if found and found[1] != ":memory:" else None


def check(address: str) -> Fault | None:
    path = file_of(address)
    if path is None:
        return Fault("the address is not valid", CORRECT) if not address.endswith(":memory:") else None
    name = shown(path)
    if path.is_symlink() and not path.exists() and not path.resolve().parent.is_dir():
        return Fault(f"{name} is a link to {path.readlink()}, which does not exist", set_aside(path))
    if path.exists() and not path.is_file():
        return Fault(f"{name} must be a file, but is none", set_aside(path))
    # SQLite makes its journal in the folder of the file.
    folder = next((parent for parent in path.resolve().parents if parent.exists()), Path("/"))
    for place, rights in ((folder, os.W_OK | os.X_OK), (path, os.R_OK | os.W_OK)):
        if place.exists() and not may(place, rights):
            return Fault(
                f"{shown(place)} may not be read and written",
                f"`chmod u+rw{'x' if place == folder else ''} {shlex.quote(shown(place))}`",
            )
    if not path.exists() or path.stat().st_size == 0:
        return None  # MLflow makes a new database
    return _check_content(path)


def _check_content(path: Path) -> Fault | None:
    """What is wrong with the content of a database file, as far as its header and its schema version show."""
    with path.open("rb") as file:
        head = file.read(100)
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        return Fault("the file is not a SQLite database", set_aside(path))
    page = int.from_bytes(head[16:18], "big")
    pages = int.from_bytes(head[28:32], "big")
    counts_are_valid = head[24:28] == head[92:96]  # an old version of SQLite may have left a wrong number of pages
    if counts_are_valid and path.stat().st_size < (65536 if page == 1 else page) * pages:
        return Fault("the database is truncated", set_aside(path))
    try:
        with contextlib.closing(_opened(path)) as database:
            database.execute("BEGIN IMMEDIATE")  # needs the lock that every write needs
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            versions = {row[0] for row in database.execute("SELECT version_num FROM alembic_version")} if (
                "alembic_version" in tables
            ) else set()  # fmt: skip
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        return meaning(str(error)) or Fault(f"the database is damaged ({one_line(error)})", set_aside(path))
    if tables and "experiments" not in tables:
        return Fault("the database belongs to another program", set_aside(path))
    if tables and not versions:
        return Fault("the database was made only in part", set_aside(path))
    return _check_version(path, versions)


def _check_version(path: Path, versions: set[str]) -> Fault | None:
    known, newest = schema_versions()
    if not versions or not known or versions == {newest}:
        return None
    if not versions <= known:
        return Fault(
            "the database was made by a newer MLflow than the one of this environment",
            f"use that version of MLflow, or {set_aside(path)}",
        )
    name = shlex.quote(shown(path))
    return Fault(
        IS_OLD,
        f"`cp {name} {name}.old && .venv/bin/mlflow db upgrade sqlite:///{name}`",
    )


def schema_versions() -> tuple[set[str], str]:
    """All versions of the database's schema that the installed MLflow knows, and the newest; empty if unknown."""
    spec = find_spec("mlflow")
    folder = Path(spec.origin or "").parent / "store/db_migrations/versions" if spec else Path()
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))] if spec else []
    known, older = (
        {found[1] for text in texts if (found := re.search(rf'^{name} = "(\w+)"', text, re.M))}
        for name in ("revision", "down_revision")
    )
    newest = known - older
    return (known, newest.pop()) if len(newest) == 1 else (set(), "")


def _opened(path: Path) -> sqlite3.Connection:
    """An existing database, opened for reading and writing. Waits some seconds for a lock."""
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw", uri=True, timeout=_LOCK_S, isolation_level=None, check_same_thread=False
    )


def is_damaged(path: Path, text: str) -> bool:
    """Whether the error text or SQLite's own check says that the database is damaged."""
    if re.search(r"malformed|not a database|no such (table|column)", text):
        return True
    deadline = time.monotonic() + _SEARCH_S
    try:
        with contextlib.closing(_opened(path)) as database:
            database.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            return database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",)
    except sqlite3.OperationalError:  # interrupted at the deadline, or locked
        return False
    except sqlite3.Error:
        return True
