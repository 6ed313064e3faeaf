"""Where MLflow stores its runs, and what to do when that store is broken. Imports no MLflow, so it answers at once."""

import contextlib
import os
import re
import shlex
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from remint.core.errors import one_line, visible

ROOT = Path(os.environ.get("DVC_ROOT") or Path.cwd())
EXPERIMENT = "remint"
IS_OLD = "the database was made by an older MLflow"
_OWN = f"sqlite:///{ROOT / 'mlflow.db'}"

# Seconds to wait for another process that holds the database's lock.
_LOCK_S = 5.0
# Seconds that a server has to answer a single question.
_PROBE_S = 7.0
# Seconds that a search for damage in a database may take.
_SEARCH_S = 3.0
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")
_DRIVERS = {"postgresql": "psycopg[binary]", "mysql": "mysqlclient", "mssql": "pymssql"}
_CORRECT = "correct MLFLOW_TRACKING_URI (http://HOST:PORT or sqlite:///FILE), or unset it"
_START = "start the server (`make up` starts the project's own), or correct or unset MLFLOW_TRACKING_URI"
_TRY_LATER = "look into the server's log, or wait until it answers again"
_PROXY = "correct MLFLOW_TRACKING_URI: it must be the address of MLflow's server, without a page or a proxy's login"

# What MLflow, requests and SQLite say, what that means, and what to do. The first match counts.
_KNOWN = [
    (r"Connection refused", "nothing listens at this address", _START),
    (r"NameResolutionError|Failed to resolve", "the host's name is unknown", _START),
    (
        r"WRONG_VERSION_NUMBER|record layer failure",
        "the server does not speak TLS",
        "write http:// instead of https://",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is not trusted",
        "set REQUESTS_CA_BUNDLE to the file of its certificate authority",
    ),
    (r"timed out|TimeoutError", "the server does not answer", _START),
    (r"No route to host|unreachable", "there is no network connection to the server", _START),
    (r"Connection aborted|reset by peer", "the server closes the connection without an answer", _START),
    (r"redirects", "the server answers with endless redirects", _PROXY),
    (
        r"error code 40[13]\b|UNAUTHENTICATED|PERMISSION_DENIED",
        "the server refuses the login",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those of a user that may write",
    ),
    (r"error code 404\b", "the address answers, but is not an MLflow server (status 404)", _PROXY),
    (r"too many 429|error code 429\b", "the server refuses so many requests (status 429)", "wait some minutes"),
    (r"too many (5\d\d)|error code (5\d\d)", "the server fails with status {0}", _TRY_LATER),
    (r"error code (\d+)", "the server answers with status {0}", _TRY_LATER),
    (r"not in a valid JSON", "the address answers, but not as an MLflow server does (no JSON)", _PROXY),
    (r"Invalid URL|No host|Invalid SQLite URL|Could not parse", "the address is not valid", _CORRECT),
    (r"database is locked", "another process has locked the database", "wait until that process ends, or end it"),
    (r"readonly database", "the database may not be written", "give yourself the right to write it (`chmod u+w`)"),
]
_NO_ROOM = r"disk is full|disk I/O error|No space left|Errno 27\b"


class Fault(NamedTuple):
    """What is wrong with a store, and what the user can do."""

    what: str
    cure: str


class StoreError(Exception):
    """The store answers, but cannot be used as it is."""

    def __init__(self, what: str, cure: str):
        self.fault = Fault(what, cure)
        super().__init__(what)


def uri() -> str:
    """The URI of the store: $MLFLOW_TRACKING_URI, or a database file at the root of the repository."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip() or _OWN


def is_own() -> bool:
    """Whether the store is the repository's own database file."""
    return uri() == _OWN  # MLflow itself sets the variable


def public(text: str) -> str:
    """The text on one line, without control characters, and without user and password of every URL in it."""
    return visible(re.sub(r"//[^/@\s]*@", "//", text))


def line(fault: Fault, then: str) -> str:
    """One line for the user: which store, what is wrong, the cure, and `then`, what to do after it."""
    return public(f"MLflow at {uri()}: {fault.what}; {fault.cure}, then {then}")


def check(address: str) -> Fault | None:
    """What is wrong with the store at `address`, as far as that shows at once, without the network. Changes nothing."""
    scheme = address.partition(":")[0].partition("+")[0]
    if scheme == "file" or ("://" not in address and scheme not in ("databricks", "databricks-uc", "uc")):
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
            return None
        return Fault("this is a folder, and MLflow no longer logs to folders", _CORRECT)
    if scheme not in _SCHEMES:
        return Fault(f"MLflow does not know the scheme {scheme!r}", _CORRECT)
    if scheme == "sqlite":
        return _check_sqlite(address)
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        if not scheme.startswith("http") or (parts.hostname and parts.port != 0):
            return None
    return Fault("the address has no valid host or port", _CORRECT)


def probe(address: str) -> Fault | None:
    """Ask a server for the experiment, at most some seconds: MLflow's imports alone take longer. None for a database."""
    if not address.startswith(("http://", "https://")):
        return None
    heard: list[Fault | None] = []

    def ask() -> None:
        try:
            _ask(address)
            heard.append(None)
        except Exception as error:  # requests lets errors of other libraries through
            heard.append(describe_fault(address, error))

    # requests limits each read, not their number. A thread can be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_S)
    return heard[0] if heard else describe_fault(address, TimeoutError())


def _ask(address: str) -> None:
    """Send a server the first request that MLflow sends. Raises ValueError if no MLflow server answers."""
    import requests

    url = public(address).rstrip("/") + "/api/2.0/mlflow/experiments/get-by-name"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # No password is sent, neither from the address nor from ~/.netrc: whether the certificate is trusted depends on
        # MLflow's own settings, so it is not checked here.
        response = requests.get(
            url,
            params={"experiment_name": EXPERIMENT},
            timeout=_PROBE_S - 1,
            verify=False,
            auth=lambda request: request,
        )
    if response.status_code in (401, 403) and _has_login(address):
        return
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.status_code == 200 and answer is None:
        raise ValueError("not in a valid JSON format")
    if response.status_code != 200 and not (response.status_code == 404 and answer and "error_code" in answer):
        raise ValueError(f"error code {response.status_code}")


def _has_login(address: str) -> bool:
    """Whether MLflow may know how to log in, which `_ask` does not try."""
    names = [name for name in os.environ if name.startswith("MLFLOW_TRACKING_") and name != "MLFLOW_TRACKING_URI"]
    files = [Path.home() / name for name in (".mlflow/credentials", ".netrc")]
    return bool(names) or "@" in address or any(file.exists() for file in files)


def describe_fault(address: str, error: BaseException) -> Fault:
    """What the failure of an operation on the store at `address` means, and the cure."""
    if isinstance(error, StoreError):
        return error.fault
    chain = list(_chain(error))
    text = " ".join(f"{type(link).__name__}: {link}" for link in chain)
    if re.search(_NO_ROOM, text):  # a database that was made only in part has other faults, too
        return Fault("the disk is full or broken", "free space")
    if fault := check(address):
        return fault
    for link in chain:
        # ConnectionError of requests is an OSError, too, but names no file.
        if isinstance(link, OSError) and link.filename is not None:
            return _file_fault(link)
        if isinstance(link, ModuleNotFoundError):
            package = _DRIVERS.get(address.partition(":")[0].partition("+")[0], link.name or "")
            return Fault(
                f"the package {link.name} for this kind of database is not installed",
                f"`.venv/bin/python -m pip install {shlex.quote(package)}`, or use the address of MLflow's server",
            )
    path = _sqlite_file(address)
    if path and isinstance(error, TimeoutError):
        return Fault("the database does not answer", "end other programs that use it or its disk")
    for pattern, what, cure in _KNOWN:
        if found := re.search(pattern, text):
            return Fault(what.format(next(filter(None, found.groups()), "")), cure)
    if path and _is_damaged(path, text):
        return Fault("the database is damaged", set_aside(path))
    return Fault(one_line(public(one_line(error))), "correct that")


def set_aside(path: Path) -> str:
    """The command that renames a file or folder, and what SQLite put next to it, to a name that is free."""
    number = next(n for n in range(1, 1000) if not os.path.lexists(f"{path}.broken{n if n > 1 else ''}"))
    target = f"{_shown(path)}.broken{number if number > 1 else ''}"
    # A new database of the same name would be damaged by the journal of the old one.
    suffixes = ["", *(suffix for suffix in ("-journal", "-wal", "-shm") if os.path.lexists(f"{path}{suffix}"))]
    moves = [f"mv {shlex.quote(_shown(path) + suffix)} {shlex.quote(target + suffix)}" for suffix in suffixes]
    return f"`{' && '.join(moves)}` (a new one is made)"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and the errors that caused it."""
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _shown(path: Path) -> str:
    """The path as the user would type it: relative to the working directory, if it is inside."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _may(path: Path, rights: int) -> bool:
    """Whether this process has the rights (of os.access) on an existing file or folder."""
    return os.access(path, rights, effective_ids=os.access in os.supports_effective_ids)


def _file_fault(error: OSError) -> Fault:
    """The fault of a file or folder that could not be written, such as one of the folder for artifacts."""
    path, folder = Path(os.fsdecode(error.filename)), ROOT / "mlruns"
    what = f"{_shown(path)} cannot be written ({error.strerror})"
    if os.path.lexists(folder) and not folder.is_dir():
        return Fault(f"{_shown(folder)} must be a folder, but is none", set_aside(folder))
    nearest = next((parent for parent in (path, *path.parents) if parent.exists()), path)
    if not _may(nearest, os.W_OK):
        return Fault(what, f"`chmod -R u+rwX {shlex.quote(_shown(nearest))}`, or free space on a disk you may write")
    return Fault(what, "free space, or correct the permissions")


def _sqlite_file(address: str) -> Path | None:
    """The file of a SQLite URI; None for another store, a database in memory, or an invalid URI."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", address)
    return Path(found[1]).absolute() if found and found[1] != ":memory:" else None


def _check_sqlite(address: str) -> Fault | None:
    path = _sqlite_file(address)
    if path is None:
        return Fault("the address is not valid", _CORRECT) if not address.endswith(":memory:") else None
    name = _shown(path)
    if path.is_symlink() and not path.exists() and not path.resolve().parent.is_dir():
        return Fault(f"{name} is a link to {path.readlink()}, which does not exist", set_aside(path))
    if path.exists() and not path.is_file():
        return Fault(f"{name} must be a file, but is none", set_aside(path))
    # SQLite makes its journal in the folder of the file.
    folder = next((parent for parent in path.resolve().parents if parent.exists()), Path("/"))
    for place, rights in ((folder, os.W_OK | os.X_OK), (path, os.R_OK | os.W_OK)):
        if place.exists() and not _may(place, rights):
            return Fault(
                f"{_shown(place)} may not be read and written",
                f"`chmod u+rw{'x' if place == folder else ''} {shlex.quote(_shown(place))}`",
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
        for pattern, what, cure in [*_KNOWN, (_NO_ROOM, "the disk is full or broken", "free space")]:
            if re.search(pattern, str(error)):
                return Fault(what, cure)
        return Fault(f"the database is damaged ({one_line(error)})", set_aside(path))
    if tables and "experiments" not in tables:
        return Fault("the database belongs to another program", set_aside(path))
    if tables and not versions:
        return Fault("the database was made only in part", set_aside(path))
    return _check_version(path, versions)


def _check_version(path: Path, versions: set[str]) -> Fault | None:
    known, newest = _schema_versions()
    if not versions or not known or versions == {newest}:
        return None
    if not versions <= known:
        return Fault(
            "the database was made by a newer MLflow than the one of this environment",
            f"use that version of MLflow, or {set_aside(path)}",
        )
    name = shlex.quote(_shown(path))
    return Fault(
        IS_OLD,
        f"`cp {name} {name}.old && .venv/bin/mlflow db upgrade sqlite:///{name}`",
    )


def _schema_versions() -> tuple[set[str], str]:
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


def _is_damaged(path: Path, text: str) -> bool:
    """Whether the error text or SQLite's own check says that the database is damaged."""
    if re.search(r"malformed|not a database", text):
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


def artifact_folder(location: str) -> Path | None:
    """The folder of an artifact location; None if it is not on this machine."""
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None
