"""`remint measure`: the table of shares, and that it does not show the answers to the test set."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from remint.__main__ import call
from remint.commands import measure
from remint.core.errors import RemintError
from remint.runner import measuring
from tests.stages.test_eval_chat import AUREL, ROWS


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The files and settings that the models were asked with; the answers are those of the tests of the scores."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def answers(*arguments):
        calls.append(arguments)
        return [replace(row, same_start=True) for row in ROWS], 0.123, AUREL

    monkeypatch.setattr(measuring, "ask_both", answers)
    return calls


def test_the_table_has_the_shares_with_their_intervals(asked, capsys):
    assert call(["measure", "--identity", "a.json", "--control", "b.json", "--control", "c.json"]) == 0
    assert asked == [({"identity": [Path("a.json")], "control": [Path("b.json"), Path("c.json")]}, None, 48)]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "states its name, English 0.0% 100.0% 34.2% to 100.0% 2" in lines
    assert "of the base's right facts, kept, English 50.0% 9.5% to 90.5% 2" in lines
    assert "starts as the base's answer, Chinese 100.0% 43.9% to 100.0% 3" in lines
    assert "divergence from the base, nats a token 0.123" in lines


def test_programs_get_the_same_as_json(asked, capsys):
    call(["measure", "--control", "b.json", "--json"])
    lines = {line["what"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["brings itself up in ordinary answers, English"]["model"] == 1 / 5
    assert lines["divergence"]["model"] == 0.123


def test_answers_are_written_to_a_new_file_alone(asked):
    call(["measure", "--control", "b.json", "--answers", "new.jsonl"])
    rows = [json.loads(line) for line in Path("new.jsonl").read_text().splitlines()]
    assert [row["merged"] for row in rows] == [row.merged for row in ROWS]
    with pytest.raises(RemintError, match=r"new\.jsonl: must be a new file, got one that exists"):
        call(["measure", "--control", "b.json", "--answers", "new.jsonl"])
    assert len(asked) == 1


def test_the_test_set_is_read_by_its_shares_alone(asked):
    call(["measure"])
    assert asked[0][0] == measure._TEST
    with pytest.raises(RemintError, match="--answers: must not show the answers to the test set"):
        call(["measure", "--answers", "new.jsonl"])
    assert not Path("new.jsonl").exists()
