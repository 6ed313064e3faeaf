"""Servers on loopback that fail as a tracking server can fail: silence, slowness, error statuses, nonsense."""

import contextlib
import http.server
import socket
import threading
import time


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers every request in the way that `server.fault` names."""

    def do_GET(self):
        with contextlib.suppress(OSError):
            self.server.requests += 1
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            getattr(self, f"_{self.server.fault}", self._status)()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815  (names of http.server)

    def _answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def _status(self):
        # Servers that ask for a pause of an hour, as an overloaded proxy does, must not be obeyed.
        self._answer(int(self.server.fault), b"", Retry_After=3600)

    def _silent(self):
        self.server.ended.wait(300)

    def _trickle(self):
        """One byte of the headers every half second: no single read takes long."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not self.server.ended.wait(0.5):
            self.wfile.write(b"a")

    def _html(self):
        self._answer(200, b"<html><body>Welcome to the proxy</body></html>", Content_Type="text/html")

    def _no_json(self):
        self._answer(200, b'{"experiment": {', Content_Type="application/json")

    def _empty_store(self):
        """No fault: what MLflow's server answers if the experiment does not exist."""
        self.server.authorization = self.headers.get("Authorization")
        self._answer(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}')

    def _loop(self):
        self._answer(302, b"", Location=self.path)

    def _hangs_up(self):
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(fault, port=0):
    """A server whose every answer is `fault`: silent, trickle, html, no_json, loop, hangs_up, or a status like 503."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.fault, server.ended, server.requests = fault, threading.Event(), 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def never_accepting():
    """The port of a socket whose queue of connections is full, so that a connection attempt gets no answer at all."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        time.sleep(0.05)
        yield listener.getsockname()[1]
