"""Chat in a terminal: text of the model or the user cannot control it, and invalid input is one clear line."""

import json
from io import StringIO

import pytest

from remint.__main__ import call
from remint.commands import chat
from remint.compute.generation import Sampling
from remint.core.errors import RemintError
from remint.serving import speaker as speaking
from remint.serving.speaker import Speaker

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt\U000e0041"


@pytest.fixture
def speaker(tiny, monkeypatch):
    """Answers every question with a hostile text."""
    made = Speaker(tiny.model(), tiny.tokenizer, tiny.conversation, Sampling(), 8)

    def generate(model, stop, prompts, limit, sampling, streamer):
        import torch

        ids = tiny.tokenizer.encode(HOSTILE, add_special_tokens=False)
        for piece in [torch.tensor(prompts[0]), *map(torch.tensor, ids)]:
            streamer.put(piece)
        return [ids]

    monkeypatch.setattr(speaking, "generate", generate)
    return made


def is_harmless(text):
    return not any(
        (ord(char) < 32 and char != "\n") or 127 <= ord(char) < 160 or char in "\u202e\U000e0041" for char in text
    )


def test_an_answer_cannot_drive_the_terminal(speaker, capsys):
    chat._reply(speaker, "hello")
    chat._once(speaker, "hello", as_json=False)
    chat._pipe(speaker, StringIO("hello\n"), as_json=False)
    chat._command(speaker, "/history")
    said = capsys.readouterr().out
    assert "]0;owned[2J31mtxt" in said
    assert is_harmless(said)


def test_json_keeps_every_character_and_drives_no_terminal(speaker, capsys):
    chat._once(speaker, "你好", as_json=True)
    said = capsys.readouterr().out
    assert is_harmless(said)
    assert json.loads(said)["answer"] == HOSTILE
    assert "你好" in said


def test_text_that_is_no_utf8_is_reported_and_dropped(speaker):
    with pytest.raises(RemintError, match="must be UTF-8"):
        speaker.answer("caf\udce9")
    assert speaker.history == []


@pytest.mark.parametrize("option", ["--seed=-1", "--seed=99999999999999999999", "--max-new-tokens=0", "--top-p=nan"])
def test_a_number_out_of_range_is_refused(option, tiny):
    with pytest.raises(RemintError, match="must be"):
        call(["chat", "--model", str(tiny.folder), option])
