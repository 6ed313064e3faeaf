"""`remint ui`: start MLflow's server on the runs of this folder. It prints the address when the server is ready."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Option

from remint.core import signals
from remint.core.errors import RemintError
from remint.core.process import end_with_parent

# Seconds that the server gets after SIGTERM, before SIGKILL.
_GRACE_S = 5


def main(port: Annotated[int, Option(help="Port of 127.0.0.1 to listen on.")] = 5000) -> None:
    """Show the runs in MLflow's web UI, until Ctrl-C."""
    _check_port(port)
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # hides warnings that only concern MLflow's developers
    received: list[int] = []
    with signals.handled(lambda number, _: received.append(number)):
        server = subprocess.Popen(_command(port), env=quiet, start_new_session=True, preexec_fn=end_with_parent)
        try:
            if _answers(server, port, received):
                print(f"the runs: http://127.0.0.1:{port}/#/experiments/1/runs (Ctrl-C stops the server)", flush=True)
            while server.poll() is None and not received:
                time.sleep(0.2)
        finally:
            status = _end(server)
    if not received:
        raise RemintError(f"ui: MLflow's server ended with status {status}; see its output above")


def _check_port(port: int) -> None:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError):
        raise RemintError(f"make ui: port {port} is not available; try PORT=5001") from None


def _command(port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server", "--uvicorn-opts", "--log-level warning"),
        *("--backend-store-uri", f"sqlite:///{Path('mlflow.db').resolve()}"),
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
