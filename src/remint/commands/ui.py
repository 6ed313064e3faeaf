"""`remint ui`: start MLflow's server on the runs of this folder. It prints the address when the server is ready."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Annotated

from typer import Option

from remint.core import signals
from remint.core.errors import RemintError, one_line
from remint.core.process import end_with_parent
from remint.runner import store
from remint.runner.store_faults import Fault

# Seconds that the server gets after SIGTERM, before SIGKILL.
_GRACE_S = 5


def main(port: Annotated[int, Option(help="Port of 127.0.0.1 to listen on.")] = 5000) -> None:
    """Show the runs in MLflow's web UI, until Ctrl-C."""
    _check_store()
    _check_port(port)
    # The first hides warnings that only concern MLflow's developers. The second saves three processes for jobs that no
    # page here starts; each imports all of MLflow, and they outlive a server that is killed.
    settings = {"PYTHONWARNINGS": "ignore", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    received: list[int] = []
    with signals.handled(lambda number, _: received.append(number)), tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            _command(port),
            env={**os.environ, **settings},
            start_new_session=True,
            preexec_fn=end_with_parent,
            stdout=log,
            stderr=log,
        )
        try:
            if _answers(server, port, received):
                print(f"the runs: http://127.0.0.1:{port}/#/experiments/1/runs (Ctrl-C stops the server)", flush=True)
            while server.poll() is None and not received:
                time.sleep(0.2)
        finally:
            status = _end(server)
        if not received:
            error = RuntimeError(f"MLflow's server ended with status {status}: {_last_line(log)}")
            raise RemintError(store.line(store.describe_fault(store.uri(), error), "run `remint ui`"))


def _check_store() -> None:
    """Raise RemintError if the store is broken, or is a server, which has its own pages."""
    address = store.uri()
    if address.startswith(("http://", "https://")) and not store.check(address):
        fault = Fault(
            "this server shows its runs itself", "open that address in a browser, or unset MLFLOW_TRACKING_URI"
        )
        raise RemintError(store.line(fault, "run `remint ui` for the runs of this folder"))
    if fault_found := store.check(address):
        raise RemintError(store.line(fault_found, "run `remint ui`"))


def _last_line(log: IO[bytes]) -> str:
    """The last line that the server printed: the message of its exception, if it ended with one."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
    lines = log.read().decode(errors="replace").split("\n")
    return one_line(next((line for line in reversed(lines) if line.strip()), "nothing"))


def _check_port(port: int) -> None:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError):
        raise RemintError(f"make ui: port {port} is not available; try PORT=5001") from None


def _command(port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server", "--uvicorn-opts", "--log-level warning"),
        *("--backend-store-uri", store.uri()),
        *("--workers", "1"),  # one user; SQLite lets one process write at a time anyway
        *("--host", "127.0.0.1", "--port", str(port), "--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"),
    ]


def _end(server: subprocess.Popen[bytes]) -> int:
    """End the server and its child processes, even while a page is being served. Returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_GRACE_S)
    return server.wait()


def _answers(server: subprocess.Popen[bytes], port: int, received: Sequence[int]) -> bool:
    """Wait until the server answers. False if it ended or a signal was received first."""
    while server.poll() is None and not received:
        # Not urllib: it would use a proxy from the environment.
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                if connection.getresponse().status == http.client.OK:
                    return True
        time.sleep(0.2)
    return False
