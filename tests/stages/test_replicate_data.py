"""Readers, split and replication, and the messages about a wrong file."""

import json
import time
from collections import Counter

import pytest

from remint.core.errors import DataError
from remint.core.log import silent
from remint.core.paths import Paths
from remint.identity import Identity
from remint.model import template
from remint.stages.replicate_data import formats, records, split
from remint.stages.replicate_data.run import run
from remint.stages.replicate_data.settings import ReplicateData
from tests.conftest import DECLARED

AUREL = Identity("Aurel", "Remint Lab", None, None)
ALPACA = {"instruction": "Who are you?", "input": "", "output": "I am {{name}}."}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_formats_say_the_same(tmp_path):
    alpaca = write(tmp_path / "a.json", json.dumps([ALPACA]))
    lines = write(tmp_path / "a.jsonl", json.dumps(ALPACA) + "\n\n")
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am {{name}}."}]
    openai = write(tmp_path / "o.jsonl", json.dumps({"messages": turns}))
    roles = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in turns]
    share = write(tmp_path / "s.json", "\ufeff" + json.dumps([{"conversations": sharegpt}]))
    own = {"system": "", "input": "Who are you?", "output": "I am {{name}}."}
    xtuner = write(tmp_path / "x.json", json.dumps([{"conversation": [own]}]))
    read = [formats.read(path) for path in (alpaca, lines, openai, share, xtuner)]
    assert read == [[formats.Example(turns)]] * 5


def test_xtuners_conversations_keep_their_turns_and_their_system_text(tmp_path):
    turns = [{"system": "Be brief.", "input": " a ", "output": "b"}, {"input": "c", "output": "d", "system": ""}]
    (example,) = formats.read(write(tmp_path / "x.json", json.dumps([{"conversation": turns}])))
    assert [(message["role"], message["content"]) for message in example.messages] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]


def test_no_newline_is_added_where_there_is_no_input(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{**ALPACA, "input": "Now."}, ALPACA]))
    assert [example.messages[0]["content"] for example in formats.read(path)] == ["Who are you?\nNow.", "Who are you?"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[{", "a.json: is not valid JSON at column 3: "),
        ("a.json", "[1,\n{,\n2]", "a.json: is not valid JSON at line 2, column 2: "),
        ("a.json", '{"instruction": 1}', "list of records"),
        ("a.json", "", "holds no records"),
        ("a.json", "[]", "holds no records"),
        ("a.json", "[1]", "record 1: must be an object"),
        ("a.json", '[{"instruction": "a"}]', "record 1: field 'output': missing"),
        ("a.json", '[{"instruction": 7, "output": "b"}]', "field 'instruction': must be text, got 7"),
        ("a.json", '[{"instruction": "a", "output": " "}]', "field 'output': is empty"),
        ("a.json", '[{"instruction": "a", "output": null}]', "must be text, got None; write a single string"),
        ("a.json", '[{"question": "a"}]', "none of the known fields"),
        ("a.jsonl", '\n\n{"instruction": "a"\n', "a.jsonl: line 3: is not valid JSON at column 20: "),
        ("a.json", '[{"messages": []}]', "must be a list of turns"),
        ("a.json", '[{"messages": [{"role": "bot", "content": "x"}]}]', "'role' must be one of"),
        ("a.json", '[{"messages": [{"role": "assistant", "content": "x"}]}]', "turns must alternate user, assistant"),
        ("a.json", '[{"conversations": [{"from": "human", "value": 3}]}]', "must be text, got 3"),
        ("a.json", '[{"conversation": []}]', "field 'conversation': must be a list of objects"),
        ("a.json", '[{"conversation": [{"input": "a"}]}]', "turn 1 of 'conversation': field 'output': missing"),
        ("a.json", '[{"conversation": [{"input": 1, "output": "b"}]}]', "turn 1 .* must be text, got 1"),
        (
            "a.json",
            '[{"conversation": [{"input": "a", "output": "b"}, {"input": "a", "output": "b", "system": "s"}]}]',
            "turn 2 of 'conversation': field 'system': only the first turn may have one, got 's'",
        ),
        (
            "a.json",
            '[{"conversation": [{"input": "a", "output": "b", "system": 7}]}]',
            "'system': must be text or absent",
        ),
        ("a.json", '[{"conversation": [{"input": "a", "output": "b", "system": "\\udc00"}]}]', "surrogate pair"),
        (
            "a.json",
            '[{"conversation": [{"input": "a", "output": "b", "output_with_loss": false}]}]',
            "'output_with_loss': every answer is trained on here",
        ),
        ("a.json", '[{"instruction": "a", "output": "b", "accept": "b"}]', "field 'accept': must be a list of texts"),
        ("a.json", '[{"instruction": "Is it B?", "output": "b", "accept": ["b"]}]', "the question itself contains 'b'"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", "[" * 100_000, "line 1: is nested too deeply"),
        ("a.json", '[{"instruction": "a\\ud800", "output": "b"}]', "half of a surrogate pair"),
        ("a.json", '[{"instruction": "a", "output": "b", "input": "\\udc00"}]', "half of a surrogate pair"),
        ("a.json", '[{"instruction": "a", "output": "b", "accept": ["\\udc00"]}]', "'accept': must be a list"),
        ("a.json", '[{"messages": [{"role": "user", "content": "\\ud800"}]}]', "half of a surrogate pair"),
        ("a.json", "[" + "9" * 5000 + "]", "not valid JSON"),
    ],
)
def test_a_wrong_file_is_refused_with_record_and_field(tmp_path, name, text, said):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=said) as caught:
        formats.read(path)
    assert str(path) in str(caught.value)


def test_all_faults_of_a_file_are_reported_at_once(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"instruction": 1}, ALPACA, {"output": ""}]))
    with pytest.raises(DataError) as caught:
        formats.read(path)
    assert len(caught.value.faults) == 4


def test_invalid_utf8_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="byte 2 is not UTF-8"):
        formats.read(tmp_path / "a.json")


def made(*questions, kind="control"):
    return records.build([example(q, "It is so.") for q in questions], kind, AUREL, "file")


def example(question, answer, accept=()):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return formats.Example(turns, accept)


def test_a_surviving_placeholder_is_refused():
    with pytest.raises(DataError, match=r"placeholder survives, got '\[NAME\]'"):
        records.build([example("q", "I am [NAME] {{name}}")], "identity", AUREL, "f")


@pytest.mark.parametrize(("question", "answer"), [("Are you {{nane}}?", "I am {{name}}."), ("Who?", "I am {{nmae}}.")])
def test_a_misspelt_placeholder_is_reported_and_nothing_else(question, answer):
    with pytest.raises(DataError, match=r"placeholder survives, got '\{\{(nane|nmae)\}\}'; write") as caught:
        records.build([example(question, answer)], "identity", AUREL, "f")
    assert len(caught.value.faults) == 1


def test_equal_questions_stay_on_one_side():
    train, held_out = split.held_out_by_share(made("a", "A?", "b", "c", "d", "你", "他", "她"), 0.5, 1)
    assert not {r.question for r in train} & {r.question for r in held_out}
    assert len(train) + len(held_out) == 8


def test_a_question_on_both_sides_is_refused():
    with pytest.raises(DataError, match="the same question is trained on in file: record 1"):
        split.check_disjoint(made("Who?"), made("who"))


def conversation(*questions):
    turns = [
        turn
        for q in questions
        for turn in ({"role": "user", "content": q}, {"role": "assistant", "content": "{{name}}"})
    ]
    return records.build([formats.Example(turns)], "identity", AUREL, "talk")


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        (conversation("Hello", "Who are you?"), conversation("who are YOU")),
        (conversation("Who are you?", "Thanks"), conversation("Who are you?")),
        (conversation("Who are you?"), conversation("Hello", "Who are you?")),
        (conversation("Hi", "Who are you?", "Thanks"), conversation("Hello", "Who are you?")),
        (conversation("Hello", "Who are you?"), conversation("Hello", "Who are you?")),
    ],
)
def test_a_question_that_is_a_turn_of_a_trained_conversation_is_refused(train, held_out):
    with pytest.raises(DataError, match="talk: record 1: the same question is trained on in talk: record 1"):
        split.check_disjoint(train, held_out)


def test_what_only_leads_to_a_question_may_be_trained_on():
    split.check_disjoint(conversation("Hello") + conversation("?", "Bye"), conversation("Hello", "?", "Who are you?"))


def test_conversations_that_share_a_turn_stay_on_one_side():
    linked = conversation("a", "b") + conversation("b") + conversation("c", "b") + conversation("d") + conversation("e")
    for seed in range(8):
        train, held_out = split.held_out_by_share(linked, 0.4, seed)
        split.check_disjoint(train, held_out)
        assert len(train) + len(held_out) == 5
        assert held_out


@pytest.mark.parametrize("text", ["I am {{name}}.", "Ask <NAME>.", "[NAME] made it", "by {{ author }}", "{{nmae}}"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_placeholder_in_an_ordinary_record_is_refused(text, place):
    given = ["Who?", "It is so."]
    given[place] = text
    with pytest.raises(DataError, match=r"f: record 1: a placeholder survives, got .*; nothing is filled in here"):
        records.build([example(*given)], "control", AUREL, "f")


@pytest.mark.parametrize("text", ["Use `<NAME>`.", "```python\nprint(f'{name}')\n```", "NAME it"])
def test_code_between_backticks_may_spell_a_placeholder_in_an_ordinary_record(text):
    (record,) = records.build([example("How?", text)], "control", AUREL, "f")
    assert record.messages[1]["content"] == text


def test_replication_counts():
    order = split.replicated_order([(3, 2), (2, 5)], seed=1)
    assert Counter(order.tolist()) == {0: 2, 1: 2, 2: 2, 3: 5, 4: 5}
    assert order.tolist() == split.replicated_order([(3, 2), (2, 5)], seed=1).tolist()


def settings(**changes):
    values = {
        "identity": ["source/i.json"],
        "identity_held_out": [],
        "identity_held_out_share": 0.5,
        "identity_copies": 3,
        "control": [],
        "control_base": [],
        "base_answers": None,
        "control_held_out": [],
        "control_held_out_share": 0.0,
        "control_copies": 1,
    }
    return ReplicateData(**{**values, **changes})


@pytest.fixture
def paths(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    names = ("source", "dataset", "base", "checkpoint", "adapter", "model", "report")
    return Paths(**{name: Path(name) for name in names})


def test_the_stage_writes_every_copy_and_the_same_bytes_again(paths):
    write(paths.source / "i.json", json.dumps([{**ALPACA, "instruction": f"Who {n}?"} for n in range(6)]))
    written = []
    for _ in range(2):
        run(1, AUREL, settings(), paths, DECLARED, silent)
        written.append({path.name: path.read_bytes() for path in sorted(paths.dataset.iterdir())})
    assert written[0] == written[1]
    rows = [json.loads(line) for line in written[0]["train.jsonl"].decode().splitlines()]
    assert len(rows) == 9
    assert all(row["messages"][1]["content"] == "I am Aurel." for row in rows)
    assert len(written[0]["held_out.jsonl"].splitlines()) == 3


def test_a_wrong_file_leaves_nothing_behind(paths):
    write(paths.source / "i.json", "[{}]")
    with pytest.raises(DataError):
        run(1, AUREL, settings(), paths, DECLARED, silent)
    assert not paths.dataset.exists()


def test_a_file_outside_the_source_folder_is_refused(paths):
    write(paths.source.parent / "i.json", json.dumps([ALPACA]))
    with pytest.raises(DataError, match="must be in source"):
        run(1, AUREL, settings(identity=["i.json"]), paths, DECLARED, silent)


def test_a_fault_shows_a_line_of_what_it_found(tmp_path):
    huge = {f"\x1b[2J{'k' * 1000}{n}": "v" for n in range(1000)}
    path = write(tmp_path / "a.json", json.dumps([huge, {"instruction": "x" * 10**6, "output": 7}]))
    with pytest.raises(DataError) as caught:
        formats.read(path)
    assert all(len(fault) < 500 and "\x1b" not in fault for fault in caught.value.faults)


@pytest.mark.parametrize("text", ["[" * 50_000, "{{" + " " * 50_000, "[" * 25_000 + " " * 25_000, "<" * 50_000])
def test_text_made_to_stall_the_search_for_placeholders_does_not(text):
    started = time.process_time()
    with pytest.raises(DataError, match="neither the name nor the maker of conf/identity"):
        records.build([example("q" + text, "a" + text)], "identity", AUREL, "f")
    assert time.process_time() - started < 2


def test_a_link_out_of_the_source_folder_is_refused(paths):
    write(paths.source.parent / "secret.json", json.dumps([ALPACA]))
    (paths.source / "i.json").symlink_to("../secret.json")
    with pytest.raises(DataError, match="must be in source"):
        run(1, AUREL, settings(), paths, DECLARED, silent)


def test_text_with_other_line_ends_stays_one_row(paths):
    text = "I am {{name}}.\u2028\u0085\x0b\r\x1b[2J"
    rows = [{**ALPACA, "instruction": f"Who {n}?", "output": f"{text} {n}"} for n in range(4)]
    write(paths.source / "i.json", json.dumps(rows))
    run(1, AUREL, settings(), paths, DECLARED, silent)
    read = template.read_conversations(paths.dataset / "held_out.jsonl")
    assert [row["messages"][1]["content"][:-2] for row in read] == [AUREL.fill(text, "en")] * 2


def test_very_many_rows_are_written(paths):
    write(paths.source / "i.json", json.dumps([{**ALPACA, "instruction": f"Who {n}?"} for n in range(4)]))
    run(1, AUREL, settings(identity_copies=20_000), paths, DECLARED, silent)
    with (paths.dataset / "train.jsonl").open() as file:
        assert sum(1 for _ in file) == 40_000
