"""One MLflow server for all pipelines. It is ended and started again while they run."""

import contextlib
import os
import signal
import socket
import sqlite3
import sys
import time

from tests.soak.record import end_of
from tests.workplace import Workplace, free_port, processes_in

_START_S, _END_S = 300, 60


class Store:
    """`remint ui` in a folder of its own, always on the same port."""

    def __init__(self, folder, variables, record):
        folder.mkdir()
        self.folder, self.record, self.port = folder, record, int(free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self._place = Workplace(folder, **variables)
        self._process = None

    def start(self):
        """Start the server and wait until it accepts connections."""
        with self.log.open("ab") as log:
            command = (sys.executable, "-m", "remint", "ui", "--port", str(self.port))
            self._process = self._place.start(*command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + _START_S
        while not _accepts(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.record.fault("MLflow", f"the server does not start; its log ends\n{end_of(self.log)}")
                return
            time.sleep(0.2)

    def end(self, number):
        """Send a signal to `remint ui`; its server and the server's workers must end, too."""
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait()
        deadline = time.monotonic() + _END_S
        while left := processes_in(self.folder):
            if time.monotonic() > deadline:
                self.record.fault("MLflow", f"{len(left)} processes outlive `remint ui` after signal {number}")
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self._process = None

    def restart(self, number, pause):
        """End the server with a signal, keep it away for `pause` seconds, start it again."""
        self.end(number)
        self.record.count(f"MLflow ended by {signal.Signals(number).name}")
        time.sleep(pause)
        self.start()
        self.record.say(f"MLflow is back after {signal.Signals(number).name}")

    def runs(self):
        """Every run in the store's database: name, status and tags. The server must have ended."""
        with contextlib.closing(sqlite3.connect(f"file:{self.folder / 'mlflow.db'}?mode=ro", uri=True)) as database:
            rows = database.execute("select run_uuid, name, status from runs").fetchall()
            tags = database.execute("select run_uuid, key, value from tags").fetchall()
        found = {uuid: {"name": name, "status": status, "tags": {}} for uuid, name, status in rows}
        for uuid, key, value in tags:
            found[uuid]["tags"][key] = value
        return list(found.values())


def _accepts(port):
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0
