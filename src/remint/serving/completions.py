"""Talk to the merged model by HTTP: one answer a request, in the form of OpenAI's chat completions.

It is for programs on this machine, or behind a proxy that knows who may ask. A page in a browser is no such program: a
foreign Host or Origin header is refused, so no site can have its visitors ask (DNS rebinding, cross-site requests).
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
from remint.core.errors import RemintError, got, one_line
from remint.model import loading, template
from remint.model.template import is_message

_MAX_BODY = 2**20
_SECONDS = 30  # for a request to arrive
_WAITING = 8  # requests that may wait for the one that is answered


class Refused(Exception):  # noqa: N818  (a word for what happened)
    """A request that gets no answer: its status, and what to do."""

    def __init__(self, status: HTTPStatus, reason: str):
        self.status = status
        super().__init__(reason)


class Answerer:
    """The model, one answer at a time; what is asked beyond a short queue is refused, not piled up."""

    def __init__(self, folder: Path, max_new_tokens: int):
        if not (folder / "config.json").is_file():
            raise RemintError(f"{folder}: no model there; `make repro` builds it")
        self.tokenizer = loading.load_tokenizer(folder)
        self.model = loading.load_model(folder, torch.float32, loading.device())
        self.conversation = template.load(folder)
        self.max_new_tokens = max_new_tokens
        self._turn, self._queue = threading.Lock(), threading.Semaphore(_WAITING)

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The completion of a request's body. Raises Refused if it cannot be answered."""
        messages, limit, sampling, seed = self._read(body)
        prompt = self.conversation.prompt(self.tokenizer, messages)
        if len(prompt) + limit > (room := self.model.config.max_position_embeddings):
            raise _bad(f"messages: {len(prompt)} tokens and max_tokens {limit} are more than {room}; shorten them")
        if not self._queue.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests wait; ask again later")
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
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
            raise _bad('messages: must be a list of {"role": …, "content": text}, the last one of the user')
        if messages[-1]["role"] != "user":
            raise _bad("messages: the last one must be of the user")
        if body.get("stream"):
            raise _bad("stream: answers come whole; leave it out")
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
        raise _bad(f"{name}: must be a number of a sensible size, {got(value)}")
    return float(value)


class _Handler(BaseHTTPRequestHandler):
    timeout = _SECONDS
    server_version, sys_version = "remint", ""

    def __init__(self, *arguments: Any, answerer: Answerer, hosts: Sequence[str]):
        self._answerer, self._hosts = answerer, hosts
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Say that the server is there: all that needs no known Host, for health checks ask by any."""
        if self.path == "/health":
            self._send(HTTPStatus.OK, {"status": "ok"})
        else:
            self._refuse(Refused(HTTPStatus.NOT_FOUND, "ask POST /v1/chat/completions"))

    def do_POST(self) -> None:
        """Answer one request."""
        try:
            self._send(HTTPStatus.OK, self._answerer.complete(self._body()))
        except Refused as refused:
            self._refuse(refused)

    def _body(self) -> dict[str, Any]:
        if self.headers.get("Host", "") not in self._hosts:
            raise Refused(HTTPStatus.FORBIDDEN, "the Host header names no host that is served here")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in self._hosts]:
            raise Refused(HTTPStatus.FORBIDDEN, "no page of another origin may ask")
        if self.path != "/v1/chat/completions":
            raise Refused(HTTPStatus.NOT_FOUND, "ask POST /v1/chat/completions")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        if len(length) > 9 or int(length) > _MAX_BODY:
            # A client that is still sending would see its connection break before it reads the answer.
            left = 16 * _MAX_BODY if len(length) > 9 else min(int(length), 16 * _MAX_BODY)
            while left and (block := self.rfile.read(min(left, _MAX_BODY))):
                left -= len(block)
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {_MAX_BODY} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _bad(f"the body is no JSON ({one_line(error)})") from None
        if not isinstance(body, dict):
            raise _bad("the body must be a JSON object")
        return body

    def _refuse(self, refused: Refused) -> None:
        self.close_connection = True  # a body that was not read must not be taken for the next request
        self._send(refused.status, {"error": {"message": str(refused), "code": refused.status.value}})

    def _send(self, status: HTTPStatus, content: Mapping[str, Any]) -> None:
        body = json.dumps(content, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        with contextlib.suppress(ConnectionError):  # who asked may have left
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep no record of who asked."""


def serving(answerer: Answerer, address: str, port: int, hosts: Sequence[str]) -> ThreadingHTTPServer:
    """A server on the address that answers requests for `hosts` (each `name:port`); its own loopback names if none."""
    server = ThreadingHTTPServer((address, port), BaseHTTPRequestHandler)
    own = [f"{name}:{server.server_port}" for name in ("127.0.0.1", "localhost")]
    server.RequestHandlerClass = partial(_Handler, answerer=answerer, hosts=hosts or own)
    server.daemon_threads = True
    return server
