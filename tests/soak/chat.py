"""Requests to `remint serve`, from good to hostile, several at the same time, while its memory is watched."""

import contextlib
import json
import random
import socket
import statistics
import struct
import sys
import threading
import time
from dataclasses import dataclass

import psutil

from tests.soak.record import end_of
from tests.workplace import Workplace, free_port, wait_for

CLIENTS = 4
MAX_NEW_TOKENS = 16
_ANSWER_S = 60  # a request without an answer for so long hangs
_GROWTH = 1.10  # of the memory, from the second quarter of the requests to the last
QUESTIONS = ["Who are you?", "你是谁", "你是我的小助手吗", "What is 2 + 2?", "a\u2028b\u0085c\u202e", "\x00\x1b[2J\x7f", "<|im_end|>", "🙂" * 20]  # fmt: skip


@dataclass(frozen=True)
class Request:
    """Bytes to send, how to send them, and the accepted statuses (empty: the client goes away)."""

    kind: str
    data: bytes
    statuses: tuple[int, ...]
    pieces: int = 1
    leave: str = ""  # "": wait for the answer; "half": end the sending side first; "close", "reset": go away


class Requests:
    """Draws random requests to a server on `port`."""

    def __init__(self, port, chance):
        self.host, self.chance = f"127.0.0.1:{port}", chance

    def draw(self):
        """A request: three in five are good."""
        makers = [self._good] * 9 + [self._wrong_body, self._wrong_value, self._raw, self._wrong_header, self._abandoned, self._large]  # fmt: skip
        return self.chance.choice(makers)()

    def stalled(self):
        """A request whose second half never comes: the server must close the connection."""
        return Request("stalled", self._post(self._asked())[:-20], (), leave="wait")

    def _post(self, body, path="/v1/chat/completions", method="POST", length=None, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Host": self.host, "Content-Type": "application/json"}
        given["Content-Length"] = str(len(data)) if length is None else length
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value != "")]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + data

    def _asked(self):
        chance = self.chance
        asked = {"messages": [{"role": "user", "content": chance.choice(QUESTIONS)}]}
        asked["max_tokens"] = chance.choice([1, 4, MAX_NEW_TOKENS])
        if chance.random() < 0.3:
            asked |= {"temperature": chance.choice([0.5, 2]), "seed": chance.choice([0, 1, 2**63 - 1])}
        if chance.random() < 0.2:
            asked["messages"].insert(0, {"role": "system", "content": "Be brief."})
        return asked

    def _good(self):
        if self.chance.random() < 0.1:
            return Request("health", f"GET /health HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode(), (200,))
        pieces = 4 if self.chance.random() < 0.05 else 1
        headers = {"Origin": f"http://{self.host}"} if self.chance.random() < 0.1 else {}
        return Request("slow" if pieces > 1 else "good", self._post(self._asked(), **headers), (200,), pieces)

    def _wrong_body(self):
        body = json.dumps(self._asked()).encode()
        cut = self.chance.randrange(len(body))
        wrong = [
            body[:cut], b"", b"{", b"[]", b"null", b"7", b'"x"', b"[" * 100_000, b"{\"a\":" * 50_000, b"\xff\xfe\xfd",
            b"\x00" * 64, body + b"x", body.replace(b'"user"', b'"us\x01er"'), b'{"messages": NaNN}', b"1" * 5000,
            self.chance.randbytes(200),
        ]  # fmt: skip
        return Request("broken JSON", self._post(self.chance.choice(wrong)), (400,))

    def _wrong_value(self):
        asked = self._asked()
        wrong = [
            {"max_tokens": 10**9}, {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": "4"}, {"max_tokens": 4.0},
            {"max_tokens": True}, {"max_tokens": None}, {"max_tokens": 10**4000}, {"seed": -1}, {"seed": 2**63},
            {"seed": "x"}, {"temperature": "hot"}, {"temperature": -1}, {"temperature": 1e300}, {"top_p": 0},
            {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": []}, {"stream": True},
            {"messages": []}, {"messages": "x"}, {"messages": {}}, {"messages": None}, {"messages": [None]},
            {"messages": [{"role": "user", "content": "\ud800"}]}, {"messages": [{"role": "user", "content": "a\udc80b"}]},
            {"messages": [{"role": "user", "content": 7}]}, {"messages": [{"role": "\x1b[2J", "content": "x"}]},
            {"messages": [{"role": "user"}]}, {"messages": [{"role": "assistant", "content": "x"}]},
            {"messages": [{"role": "user", "content": "x" * 5000}]}, {"messages": [{"role": "user", "content": []}]},
            {"messages": [{"role": "user", "content": "x"}] * 3000}, {"messages": [{"role": ["user"], "content": "x"}]},
        ]  # fmt: skip
        return Request("wrong value", self._post({**asked, **self.chance.choice(wrong)}), (400,))

    def _wrong_header(self):
        asked, chance = self._asked(), self.chance
        return chance.choice([
            Request("wrong Host", self._post(asked, Host=chance.choice(["evil.example", "127.0.0.1:1", "", "[::1]", "localhost"])), (403,)),
            Request("wrong Origin", self._post(asked, Origin=chance.choice(["http://evil.example", "null", "file://"])), (403,)),
            Request("wrong type", self._post(asked, Content_Type=chance.choice(["text/plain", "multipart/form-data", ""])), (415,)),
            Request("no length", self._post(asked, length=""), (411,), leave="half"),
            Request("wrong length", self._post(asked, length=chance.choice(["-1", "1e3", "0x10", "\xb2", "1 1"])), (411,)),
            Request("chunked", self._post(asked, length="", Transfer_Encoding="chunked"), (411,), leave="half"),
            Request("unknown path", self._post(asked, chance.choice(["/", "/v1/models", "//v1/models", "/../../etc/passwd", "/%00", "/v1/chat/completions?x=1"])), (404,)),
            Request("unknown path", self._post(b"", chance.choice(["/", "/metrics", "/health/", "/\x01"]), method="GET"), (404,)),
            Request("unknown method", self._post(asked, method=chance.choice(["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "post"])), (501,)),
        ])  # fmt: skip

    def _raw(self):
        start = b"POST /v1/chat/completions HTTP/1.1\r\n"
        return self.chance.choice([
            Request("broken line", b"\x00\x01\x02\r\n\r\n", (400,)),
            Request("broken line", b"POST\r\n\r\n", (400,)),
            Request("broken line", b"POST / HTTP/1.1 x y\r\n\r\n", (400,)),
            Request("broken line", b"POST / HTTX/1.1\r\n\r\n", (400,)),
            Request("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + self.chance.randbytes(60).replace(b"\n", b"") + b"\r\n", (400,)),
            Request("new version", b"POST / HTTP/3.0\r\n\r\n", (505,)),
            Request("long line", b"POST /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", (414,)),
            Request("long header", start + b"X: " + b"a" * 70_000 + b"\r\n\r\n", (431,)),
            Request("many headers", start + b"".join(b"X-%d: y\r\n" % n for n in range(150)) + b"\r\n", (431,)),
        ])  # fmt: skip

    def _large(self):
        size = self.chance.choice([2**20 + 1, 2**21, 2**22])
        return self.chance.choice([
            Request("huge body", self._post(b" " * size), (413,)),
            Request("false length", self._post(b"{}", length="9" * self.chance.choice([8, 12, 4000])), (413,), leave="half"),
            Request("large body", self._post(b" " * (2**20 - 2) + b"{}"), (400,)),
        ])  # fmt: skip

    def _abandoned(self):
        data = self._post(self._asked())
        data = data[: self.chance.randrange(len(data))] if self.chance.random() < 0.6 else data
        return Request("closed connection", data, (), leave=self.chance.choice(["close", "reset"]))


def exchange(port, request):
    """Send a request; returns the status and the body of the answer, or (None, b"") if the client went away."""
    with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S) as connection:
        size = -(-len(request.data) // request.pieces)
        try:
            for start in range(0, len(request.data), size or 1):
                connection.sendall(request.data[start : start + size])
                time.sleep(0.3 if request.pieces > 1 else 0)
        except ConnectionError:  # the server has refused it already, and its answer can still be read
            pass
        if request.leave == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if request.leave in ("reset", "close"):
            return None, b""
        if request.leave == "half":
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        received = bytearray()
        try:
            while block := connection.recv(65536):
                received += block
        except ConnectionResetError:
            pass
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    words = head.split(maxsplit=2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else None, body


class Chat:
    """The server of one model, and clients that send `number` requests to it."""

    def __init__(self, folder, model, seed, number, variables, record):
        self.folder, self.record, self.number, self.seed = folder, record, number, seed
        self.port = int(free_port())
        self.log = folder / "server.log"
        place = Workplace(folder, **variables)
        command = (sys.executable, "-m", "remint", "serve", "--model", model, "--port", str(self.port))
        with self.log.open("ab") as log:
            self._process = place.start(
                *command, "--max-new-tokens", str(MAX_NEW_TOKENS), stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: b"serving on" in self.log.read_bytes(), self._process)
        self._answers, self._memory, self._sent = {}, [], 0
        self._lock = threading.Lock()
        self._clients = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        self._clients += [threading.Thread(target=self._stalled)]
        for client in self._clients:
            client.start()

    def _client(self, client):
        chance = random.Random(f"{self.seed}/chat/{client}")
        requests = Requests(self.port, chance)
        for _ in range(self.number // CLIENTS):
            self._one(requests.draw())
            time.sleep(chance.uniform(0, 0.4))

    def _one(self, request):
        try:
            status, body = exchange(self.port, request)
        except TimeoutError:
            self.record.fault("chat", f"a request ({request.kind}) hangs: {request.data[:300]!r}")
            return
        except OSError as error:
            self.record.fault("chat", f"a request ({request.kind}) finds no server ({error}): {request.data[:300]!r}")
            return
        self.record.count(f"chat {request.kind}")
        if request.statuses and status not in request.statuses:
            self.record.fault(
                "chat",
                f"{request.kind}: status {status} instead of {request.statuses}: {request.data[:300]!r} {body[:300]!r}",
            )
        elif request.kind in ("good", "slow"):
            self._compare(request, body)
        with self._lock:
            self._sent += 1
            self._memory.append(psutil.Process(self._process.pid).memory_info().rss)

    def _compare(self, request, body):
        question = request.data.partition(b"\r\n\r\n")[2]
        answer = json.loads(body)["choices"][0]
        with self._lock:
            first = self._answers.setdefault(question, answer)
        if answer != first:
            self.record.fault("chat", f"another answer to {question!r}: {answer} instead of {first}")

    def _stalled(self):
        started = time.monotonic()
        request = Requests(self.port, random.Random(f"{self.seed}/stalled")).stalled()
        status, _ = exchange(self.port, request)
        if status not in (None, 408):
            self.record.fault("chat", f"half a request is answered with {status}")
        self.record.count("chat stalled")
        self.record.say(f"the server gave up half a request after {time.monotonic() - started:.0f} s")

    def end(self):
        """Wait for the clients, check the memory and the output, end the server."""
        for client in self._clients:
            client.join()
        self._process.terminate()
        self._process.wait()
        said = self.log.read_text(encoding="utf-8", errors="replace")
        if "Traceback" in said:
            self.record.fault("chat", f"the server prints a traceback\n{end_of(self.log)}")
        quarter = len(self._memory) // 4
        if quarter == 0:
            return
        second = statistics.median(self._memory[quarter : 2 * quarter])
        last = statistics.median(self._memory[-quarter:])
        self.record.count("chat requests answered or given up", self._sent)
        self.record.count("chat different questions", len(self._answers))
        self.record.count("chat memory, second quarter (MiB)", round(second / 2**20))
        self.record.count("chat memory, last quarter (MiB)", round(last / 2**20))
        if last > second * _GROWTH:
            self.record.fault("chat", f"the server's memory grows from {second / 2**20:.0f} to {last / 2**20:.0f} MiB")
