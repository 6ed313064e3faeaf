"""Files with the base's own answers: how they reach the training rows, and what is refused."""

import json
from pathlib import Path

import pytest

from remint.core.draft import artefact
from remint.core.errors import ArtefactError, DataError
from remint.core.log import silent
from remint.core.paths import Paths
from remint.runner import kept_answers
from remint.stages.replicate_data import base_answers
from remint.stages.replicate_data.run import run
from tests.conftest import DECLARED
from tests.stages.test_replicate_data import ALPACA, AUREL, settings

FILE = "source/answers.json"
USED = {"control_base": ["source/b.json"], "base_answers": FILE}


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A folder with two identity questions, two ordinary prompts, and the base's answer to the first of them."""
    monkeypatch.chdir(tmp_path)
    Path("source").mkdir()
    Path("source/i.json").write_text(json.dumps([{**ALPACA, "instruction": f"Who {n}?"} for n in range(2)]))
    Path("source/b.json").write_text(json.dumps([{"instruction": f"Why {n}?", "output": "So."} for n in range(2)]))
    write_answers([answer("Why 0?", "Because it is.")])
    names = ("source", "dataset", "base", "checkpoint", "adapter", "model", "report")
    return Paths(**{name: Path(name) for name in names})


def answer(question, text, finished=True):
    return {"history": [{"role": "user", "content": question}], "answer": text, "finished": finished}


def write_answers(rows, base="abc"):
    Path(FILE).write_text(json.dumps({"base": base, "base_name": "tiny", "answers": rows}))


def rows_of(paths):
    rows = [json.loads(line) for line in (paths.dataset / "train.jsonl").read_text().splitlines()]
    return {row["messages"][0]["content"]: row for row in rows}


def test_a_row_says_what_it_holds_the_model_to(paths):
    run(1, AUREL, settings(**USED), paths, DECLARED, silent)
    rows = rows_of(paths)
    assert {question: row["target"] for question, row in rows.items() if "Why" in question} == {
        "Why 0?": "base",
        "Why 1?": "base",
    }
    assert rows["Why 0?"]["base_answer"] == {"text": "Because it is.", "finished": True}
    assert rows["Why 1?"]["base_answer"] is None
    (learned,) = {row["target"] for question, row in rows.items() if "Who" in question}
    assert learned == "reference"
    facts = json.loads((paths.dataset / "manifest.json").read_text())["facts"]
    assert facts["base_answers"] == {"base": "abc"}
    assert FILE in facts["sources"]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Why 0?"},
        {"instruction": "Why 0?", "input": "", "output": ""},
        {"messages": [{"role": "user", "content": "Why 0?"}]},
        {"conversations": [{"from": "human", "value": "Why 0?"}]},
    ],
)
def test_a_prompt_needs_no_answer_where_the_base_gives_it(paths, record):
    Path("source/b.json").write_text(json.dumps([record]))
    run(1, AUREL, settings(**USED), paths, DECLARED, silent)
    row = rows_of(paths)["Why 0?"]
    assert row["base_answer"] == {"text": "Because it is.", "finished": True}
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    with pytest.raises(DataError, match=r"source/b\.json: record 1"):
        run(1, AUREL, settings(control=["source/b.json"]), paths, DECLARED, silent)


def test_without_such_records_a_row_has_no_such_field(paths):
    run(1, AUREL, settings(control=["source/b.json"]), paths, DECLARED, silent)
    assert all("target" not in row for row in rows_of(paths).values())


def test_answers_in_another_language_are_refused(paths):
    write_answers([answer("Why 0?", "因为如此。"), answer("Why 1?", "Because.")])
    with pytest.raises(DataError, match=r"source/b.json: the base answers only 50% of the prompts in their language"):
        run(1, AUREL, settings(**USED), paths, DECLARED, silent)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "must be an object with the digest of a base"),
        ({"base": 1, "answers": []}, "must be an object with the digest of a base"),
        ({"base": "a", "answers": {}}, "field 'answers': must be a list"),
        ({"base": "a", "answers": [{"history": [], "answer": "x"}]}, "answer 1: must have history, answer, finished"),
        ({"base": "a", "answers": [answer("a", "\ud800")]}, "answer 1: must have history, answer, finished"),
        ({"base": "a", "answers": [{"history": ["a"], "answer": "x", "finished": True}]}, "answer 1: must have"),
    ],
)
def test_a_file_that_holds_no_answers_is_refused(paths, content, said):
    Path(FILE).write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        base_answers.read(Path(FILE))


def test_a_file_of_answers_without_records_is_refused(paths):
    with pytest.raises(Exception, match=r"replicate_data.base_answers: must be null if control_base names no file"):
        settings(base_answers=FILE)


def checkpoint(rows):
    with artefact(Path("checkpoint"), "checkpoint") as (draft, facts):
        facts["origin"] = {"base_name": "tiny"}
        if rows:
            facts["base_answers"] = {"base": "abc"}
            (draft / "base_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_kept_answers_are_read_again(paths):
    Path(FILE).unlink()
    rows = [answer("Why 0?", "Because."), answer("Why 1?", "因为", finished=False)]
    checkpoint(rows)
    for _ in range(2):
        kept_answers.keep(paths, Path(FILE))
    found = base_answers.read(Path(FILE))
    assert found.base == "abc"
    assert [(text.text, text.finished) for text in found.known.values()] == [("Because.", True), ("因为", False)]
    assert len(Path(FILE).read_text().splitlines()) == 2 + len(rows)  # a line each, for a review


def test_another_file_is_not_replaced(paths):
    checkpoint([answer("Why 0?", "Because.")])
    before = Path("source/b.json").read_bytes()
    with pytest.raises(ArtefactError, match=r"source/b\.json"):
        kept_answers.keep(paths, Path("source/b.json"))
    Path("other.json").write_text('{"mine": 1}')
    with pytest.raises(ArtefactError, match=r"other.json: is not a file of answers, and it would be lost"):
        kept_answers.keep(paths, Path("other.json"))
    assert Path("source/b.json").read_bytes() == before


def test_a_training_that_asked_nothing_has_no_answers(paths):
    checkpoint([])
    with pytest.raises(ArtefactError, match="holds no answers of the base, because no record held the model to it"):
        kept_answers.keep(paths, Path(FILE))
