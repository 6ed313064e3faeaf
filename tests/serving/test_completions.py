"""Answers over HTTP: in the form of OpenAI's API, and none for pages of other sites."""

import http.client
import json
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest

from remint.__main__ import call
from remint.core.errors import RemintError
from remint.serving import completions
from tests.workplace import wait_for

ASKED = {"messages": [{"role": "user", "content": "Who are you?"}]}


@pytest.fixture(scope="module")
def address(tiny):
    """Host and port of a server for the tiny model, with template and system prompt in its folder as in an artefact."""
    tiny.conversation.save(tiny.folder)
    with completions.serving(completions.Answerer(tiny.folder, 8), "127.0.0.1", 0, []) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def ask(address, body, path="/v1/chat/completions", method="POST", **headers):
    """Status and content of the answer."""
    connection = http.client.HTTPConnection(address, timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, data, {"Content-Type": "application/json", **names})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_it_answers_in_the_form_that_clients_know(address):
    status, said = ask(address, {**ASKED, "model": "any", "max_tokens": 4})
    assert status == 200
    (choice,) = said["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert 0 <= said["usage"]["completion_tokens"] <= 4
    assert ask(address, {**ASKED, "max_tokens": 4})[1] == said


def test_a_seed_decides_what_is_drawn(address):
    warm = {**ASKED, "temperature": 5, "max_tokens": 8}
    answers = [ask(address, {**warm, "seed": seed})[1]["choices"][0]["message"]["content"] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_a_page_of_another_site_gets_nothing(address, headers, status):
    assert ask(address, ASKED, **headers)[0] == status
    assert ask(address, ASKED, Origin=f"http://{address}")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[" * 100_000, 400, "the body: is nested too deeply"),
        (b'{"seed": 1, "seed": 2}', 400, "an object has the key 'seed' twice, got 1 and 2"),
        (b"[]", 400, "must be a JSON object"),
        ({}, 400, "messages: must be a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages: must be a list"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages: must be a list"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the last one must be from the user"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "are more than 2048; shorten them"),
        ({**ASKED, "max_tokens": 9}, 400, "max_tokens: must be from 1 to 8, got 9"),
        ({**ASKED, "max_tokens": True}, 400, "max_tokens: must be a whole number"),
        ({**ASKED, "temperature": 11}, 400, "temperature: must be between 0 and 10"),
        ({**ASKED, "temperature": 10**400}, 400, "temperature: must be a number"),
        ({**ASKED, "top_p": 2}, 400, "top_p: must be"),
        ({**ASKED, "top_p": float("nan")}, 400, "NaN is not a number of JSON"),
        (b'{"top_p": 1e999}', 400, "the number 1e999 is too large"),
        ({**ASKED, "seed": -1}, 400, "seed: must be at least 0"),
        ({**ASKED, "stream": True}, 400, "stream: is not supported"),
        (b" " * (2**20 + 1), 413, "send at most 1048576 bytes"),
    ],
)
def test_a_request_that_cannot_be_answered_says_why(address, body, status, said):
    answered, content = ask(address, body)
    assert answered == status
    assert said in content["error"]["message"]


def test_requests_at_the_same_time_are_tokenized_one_by_one(tiny):
    """The tokenizer has a switch for special tokens that one request must not change for another."""
    tiny.conversation.save(tiny.folder)
    answerer, inside, most = completions.Answerer(tiny.folder, 8), [], []
    prompt = answerer.conversation.prompt

    def watched(*arguments):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return prompt(*arguments)

    answerer.conversation = SimpleNamespace(prompt=watched, stop_ids=answerer.conversation.stop_ids)
    threads = [threading.Thread(target=answerer.complete, args=({**ASKED, "max_tokens": 1},)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"\x00\x01", 400),
        (b"POST / HTTP/1.1 x y", 400),
        (b"\x16\x03\x01 a TLS client", 400),
        (b"POST / HTTP/3.0", 505),
        (b"PUT / HTTP/1.1", 501),
        (b"POST /" + b"a" * 70_000 + b" HTTP/1.1", 414),
    ],
)
def test_a_request_that_is_not_http_is_refused_in_the_same_form(address, line, status):
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(line + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.split()[1] == str(status).encode()
    assert json.loads(body)["error"]["code"] == status


def test_a_client_that_goes_away_leaves_no_trace(address, capfd):
    host, _, port = address.partition(":")
    for sent in (b"POST", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 9\r\n" + b"Content-Type: application/json\r\n"
                 + f"Host: {address}\r\n\r\n".encode()):  # fmt: skip
        connection = socket.create_connection((host, int(port)))
        connection.sendall(sent)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        connection.close()
    assert ask(address, ASKED)[0] == 200
    wait_for(lambda: threading.active_count() <= 3, seconds=20)
    assert capfd.readouterr() == ("", "")


def test_a_health_check_needs_no_name_and_learns_nothing(address):
    assert ask(address, b"", "/health", "GET", Host="anything") == (200, {"status": "ok"})
    assert ask(address, b"", "/v1/models", "GET")[0] == 404
    assert ask(address, ASKED, "/elsewhere")[0] == 404


def test_what_cannot_be_served_is_one_line(tiny, address, tmp_path):
    with pytest.raises(RemintError, match="no model there"):
        call(["serve", "--model", str(tmp_path)])
    with pytest.raises(RemintError, match=r"serve\.port: must be from 1 to 65535"):
        call(["serve", "--port", "0"])
    with pytest.raises(RemintError, match="is not available"):
        call(["serve", "--model", str(tiny.folder), "--port", address.rpartition(":")[2]])
