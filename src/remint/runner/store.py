"""Where MLflow stores its runs, and what to do when that store is broken. Imports no MLflow, so it answers at once."""

import contextlib
import os
import re
import shlex
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from remint.core.errors import one_line, visible
from remint.runner import sqlite_store
from remint.runner.store_faults import CORRECT, FULL, Fault, is_full, may, meaning, set_aside, shown

ROOT = Path(os.environ.get("DVC_ROOT") or Path.cwd())
EXPERIMENT = "remint"
_OWN = f"sqlite:///{ROOT / 'mlflow.db'}"

# Seconds that a server has to answer a single question.
_PROBE_S = 7.0
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")
_DRIVERS = {"postgresql": "psycopg[binary]", "mysql": "mysqlclient", "mssql": "pymssql"}


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
        return Fault("this is a folder, and MLflow no longer logs to folders", CORRECT)
    if scheme not in _SCHEMES:
        return Fault(f"MLflow does not know the scheme {scheme!r}", CORRECT)
    if scheme == "sqlite":
        return sqlite_store.check(address)
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        if not scheme.startswith("http") or (parts.hostname and parts.port != 0):
            return None
    return Fault("the address has no valid host or port", CORRECT)


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
    if is_full(text):  # a database that was made only in part has other faults, too
        return FULL
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
    path = sqlite_store.file_of(address)
    if path and isinstance(error, TimeoutError):
        return Fault("the database does not answer", "end other programs that use it or its disk")
    if known := meaning(text):
        return known
    if path and sqlite_store.is_damaged(path, text):
        return Fault("the database is damaged", set_aside(path))
    return Fault(one_line(public(one_line(error))), "correct that")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and the errors that caused it."""
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _file_fault(error: OSError) -> Fault:
    """The fault of a file or folder that could not be written, such as one of the folder for artifacts."""
    path, folder = Path(os.fsdecode(error.filename)), ROOT / "mlruns"
    what = f"{shown(path)} cannot be written ({error.strerror})"
    if os.path.lexists(folder) and not folder.is_dir():
        return Fault(f"{shown(folder)} must be a folder, but is none", set_aside(folder))
    nearest = next((parent for parent in (path, *path.parents) if parent.exists()), path)
    if not may(nearest, os.W_OK):
        return Fault(what, f"`chmod -R u+rwX {shlex.quote(shown(nearest))}`, or free space on a disk you may write")
    return Fault(what, "free space, or correct the permissions")


def artifact_folder(location: str) -> Path | None:
    """The folder of an artifact location; None if it is not on this machine."""
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None
