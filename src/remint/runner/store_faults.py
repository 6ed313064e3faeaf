"""What a failing store of MLflow says, what that means, and what to do about it."""

import contextlib
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

CORRECT = "correct MLFLOW_TRACKING_URI (http://HOST:PORT or sqlite:///FILE), or unset it"
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
    (r"Invalid URL|No host|Invalid SQLite URL|Could not parse", "the address is not valid", CORRECT),
    (r"database is locked", "another process has locked the database", "wait until that process ends, or end it"),
    (r"readonly database", "the database may not be written", "give yourself the right to write it (`chmod u+w`)"),
]
_NO_ROOM = r"disk is full|disk I/O error|No space left|Errno 27\b"


class Fault(NamedTuple):
    """What is wrong with a store, and what the user can do."""

    what: str
    cure: str


FULL = Fault("the disk is full or broken", "free space")


def meaning(text: str) -> Fault | None:
    """What the text of an error means, if it is a known one."""
    if is_full(text):
        return FULL
    for pattern, what, cure in _KNOWN:
        if found := re.search(pattern, text):
            return Fault(what.format(next(filter(None, found.groups()), "")), cure)
    return None


def is_full(text: str) -> bool:
    """Whether the text of an error says that the disk is full or broken."""
    return bool(re.search(_NO_ROOM, text))


def set_aside(path: Path) -> str:
    """The command that renames a file or folder, and what SQLite put next to it, to a name that is free."""
    number = next(n for n in range(1, 1000) if not os.path.lexists(f"{path}.broken{n if n > 1 else ''}"))
    target = f"{shown(path)}.broken{number if number > 1 else ''}"
    # A new database of the same name would be damaged by the journal of the old one.
    suffixes = ["", *(suffix for suffix in ("-journal", "-wal", "-shm") if os.path.lexists(f"{path}{suffix}"))]
    moves = [f"mv {shlex.quote(shown(path) + suffix)} {shlex.quote(target + suffix)}" for suffix in suffixes]
    return f"`{' && '.join(moves)}` (a new one is made)"


def shown(path: Path) -> str:
    """The path as the user would type it: relative to the working directory, if it is inside."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def may(path: Path, rights: int) -> bool:
    """Whether this process has the rights (of os.access) on an existing file or folder."""
    return os.access(path, rights, effective_ids=os.access in os.supports_effective_ids)
