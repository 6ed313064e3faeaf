"""Serves the merged model over HTTP: one answer per request, in the format of OpenAI's chat completions.

The server is meant for programs on this machine, or for a proxy that authenticates its clients. Requests from web pages
are refused by their Host or Origin header. So no site can send requests through its visitors' browsers (DNS rebinding,
cross-site requests).
https://platform.openai.com/docs/api-reference/chat/create
"""

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from remint.compute.generation import Sampling, decode, generate
from remint.core.errors import RemintError, got
from remint.core.files import parse_json
from remint.model import loading, template
from remint.model.template import is_message

_MAX_BODY = 2**20
_SECONDS = 30  # timeout for receiving a request
_WAITING = 8  # requests that may be open at once: one is answered, the others wait


class Refused(Exception):  # noqa: N818  (the name describes the outcome)
    """A refused request, with its HTTP status and a message for the client."""

    def __init__(self, status: HTTPStatus, reason: str):
        self.status = status
        super().__init__(reason)


class Answerer:
    """The model. It answers one request at a time. A few more may wait; any further request is refused."""

    def __init__(self, folder: Path, max_new_tokens: int):
        if not (folder / "config.json").is_file():
            raise RemintError(f"{folder}: no model there; `make repro` builds it")
        self.tokenizer = loading.load_tokenizer(folder)
        self.model = loading.load_model(folder, torch.float32, loading.device())
        self.conversation = template.load(folder)
        self.max_new_tokens = max_new_tokens
        self._turn, self._queue = threading.Lock(), threading.Semaphore(_WAITING)
        # transformers switches special tokens off and on in the tokenizer itself. Without this lock, a marker in one
        # request's text could become a special token because of another request.
        self._tokenizing = threading.Lock()

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The completion for a request's body. Raises Refused if it cannot be answered."""
        messages, limit, sampling, seed = self._read(body)
        with self._tokenizing:
            prompt = self.conversation.prompt(self.tokenizer, messages)
        if len(prompt) + limit > (room := self.model.config.max_position_embeddings):
            raise _bad(f"messages: {len(prompt)} tokens and max_tokens {limit} are more than {room}; shorten them")
        if not self._queue.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests are waiting; try again later")
        try:
            with self._turn:
                torch.manual_seed(seed)
                stop = self.conversation.stop_ids(self.tokenizer)
                ids = generate(self.model, stop, [prompt], limit, sampling)[0]
        finally:
            self._queue.release()
        return {
            "object": "chat.completion",
            "model": "remint",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": decode(self.tokenizer, ids)},
                    "finish_reason": "length" if len(ids) >= limit else "stop",
                }
            ],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(ids),
                "total_tokens": len(prompt) + len(ids),
            },
        }

    def _read(self, body: Mapping[str, Any]) -> tuple[list[dict[str, str]], int, Sampling, int]:
        """The messages, token limit, sampling and seed of a request. Raises Refused if one of them is not valid."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
            raise _bad('messages: must be a list of {"role": …, "content": text}, the last one from the user')
        if messages[-1]["role"] != "user":
            raise _bad("messages: the last one must be from the user")
        if body.get("stream"):
            raise _bad("stream: is not supported; leave it out")
        limit = _whole(body, "max_tokens", self.max_new_tokens)
        if not 1 <= limit <= self.max_new_tokens:
            raise _bad(f"max_tokens: must be from 1 to {self.max_new_tokens}, {got(limit)}")
        seed = _whole(body, "seed", 0)
        if not 0 <= seed < 2**63:
            raise _bad(f"seed: must be at least 0 and below 2^63, {got(seed)}")
        try:
            sampling = Sampling(_number(body, "temperature", 0.0), _number(body, "top_p", 1.0))
        except RemintError as error:
            raise _bad(str(error)) from None
        return messages, limit, sampling, seed


def _bad(reason: str) -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, reason)


def _whole(body: Mapping[str, Any], name: str, default: int) -> int:
    value = body.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _bad(f"{name}: must be a whole number, {got(value)}")
    return value


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e9:
        raise _bad(f"{name}: must be a number from -1e9 to 1e9, {got(value)}")
    return float(value)


class _Handler(BaseHTTPRequestHandler):
    timeout = _SECONDS
    server_version, sys_version = "remint", ""
    # A request line that cannot be read is answered with a status line, too. HTTP/0.9, the default, has none.
    default_request_version = "HTTP/1.0"

    def __init__(self, *arguments: Any, answerer: Answerer, hosts: Sequence[str]):
        self._answerer, self._hosts = answerer, hosts
        super().__init__(*arguments)

    def handle(self) -> None:
        """Answer the requests of one connection. A client may disconnect at any time; that is no fault to report."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that http.server cannot read, or whose method is unknown, in the form of our own refusals."""
        status = HTTPStatus(code)
        self._refuse(Refused(status, message or status.phrase))

    def do_GET(self) -> None:
        """Answer a health check. It works under any Host header; everything else needs a known one."""
        if self.path == "/health":
            self._send(HTTPStatus.OK, {"status": "ok"})
        else:
            self._refuse(Refused(HTTPStatus.NOT_FOUND, "use POST /v1/chat/completions"))

    def do_POST(self) -> None:
        """Answer one request."""
        try:
            self._send(HTTPStatus.OK, self._answerer.complete(self._body()))
        except Refused as refused:
            self._refuse(refused)

    def _body(self) -> dict[str, Any]:
        """The JSON object of the request. Raises Refused if a header, the path or the body is not acceptable."""
        if self.headers.get("Host", "") not in self._hosts:
            raise Refused(HTTPStatus.FORBIDDEN, "the Host header must name a host that is served here")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in self._hosts]:
            raise Refused(HTTPStatus.FORBIDDEN, "requests from pages of another origin are refused")
        if self.path != "/v1/chat/completions":
            raise Refused(HTTPStatus.NOT_FOUND, "use POST /v1/chat/completions")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        if len(length) > 9 or int(length) > _MAX_BODY:
            # Read the body first: closing now would break the connection of a client that is still sending.
            left = 16 * _MAX_BODY if len(length) > 9 else min(int(length), 16 * _MAX_BODY)
            while left and (block := self.rfile.read(min(left, _MAX_BODY))):
                left -= len(block)
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {_MAX_BODY} bytes")
        try:
            body = parse_json(self.rfile.read(int(length)), "the body", "send one JSON object", RemintError)
        except RemintError as error:
            raise _bad(str(error)) from None
        if not isinstance(body, dict):
            raise _bad("the body must be a JSON object")
        return body

    def _refuse(self, refused: Refused) -> None:
        self.close_connection = True  # an unread body must not be parsed as the next request
        self._send(refused.status, {"error": {"message": str(refused), "code": refused.status.value}})

    def _send(self, status: HTTPStatus, content: Mapping[str, Any]) -> None:
        body = json.dumps(content, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        with contextlib.suppress(ConnectionError):  # the client may have disconnected
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: no record of clients is kept."""


def serving(answerer: Answerer, address: str, port: int, hosts: Sequence[str]) -> ThreadingHTTPServer:
    """A server on `address` that accepts the Host headers `hosts` (each `name:port`); by default its loopback names."""
    server = ThreadingHTTPServer((address, port), BaseHTTPRequestHandler)
    own = [f"{name}:{server.server_port}" for name in ("127.0.0.1", "localhost")]
    server.RequestHandlerClass = partial(_Handler, answerer=answerer, hosts=hosts or own)
    server.daemon_threads = True
    return server
