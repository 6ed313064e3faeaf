"""Held-out questions that training nearly asks are found, and others are not."""

import json
import random

import pytest

from remint.core.log import silent
from remint.identity import normalise
from remint.stages.replicate_data.overlap import SIMILAR, near_duplicates
from remint.stages.replicate_data.records import Record
from remint.stages.replicate_data.run import run
from tests.conftest import DECLARED
from tests.stages.test_replicate_data import ALPACA, AUREL, paths, settings  # noqa: F401


def record(*turns):
    messages = [{"role": "user", "content": turn} for turn in turns]
    return Record(messages, "control", "en", "", tuple(map(normalise, turns)), (), (), turns[-1])


@pytest.mark.parametrize(
    ("trained", "asked", "is_near"),
    [
        ("What is the capital of France?", "what's the capital of France", True),
        ("How do I boil an egg in the morning?", "How do I boil an egg?", False),
        ("Can you tell me who painted the Mona Lisa?", "Could you tell me who painted the Mona Lisa", True),
        ("What is the capital of France?", "What is the capital of Peru?", False),
        ("Who made you?", "Who made me?", False),
        ("世界上最大的海洋是哪个？", "世界上最大的海洋是哪一个", True),
        ("你是谁", "你是哪里人", False),
        ("OK?", "OK!", True),
    ],
)
def test_questions_that_differ_in_little_are_near(trained, asked, is_near):
    assert bool(near_duplicates([record(trained)], [record(asked)])) is is_near


def test_each_turn_of_a_training_conversation_counts_and_the_last_one_of_a_held_out_one():
    near = near_duplicates(
        [record("What is your favourite colour?", "And why?")], [record("What is your favourite color?")]
    )
    assert [found.held_out.origin for found in near] == ["What is your favourite color?"]
    assert not near_duplicates(
        [record("And why is that so?")], [record("And why is that so?", "What do you mean by it?")]
    )


def test_the_most_similar_one_is_named():
    trained = [record("Tell me about the lakes of Finland"), record("Tell me about the lakes of Finland!")]
    (found,) = near_duplicates([record("Tell me about the lakes of Finland, now"), *trained], [trained[1]])
    assert found.similarity == 1
    assert found.trained is trained[0]


def test_it_is_the_same_as_comparing_all_pairs():
    chance = random.Random(3)
    words = ["red", "blue", "green", "who", "what", "tell", "sea", "king"]
    questions = [" ".join(chance.choices(words, k=chance.randint(1, 6))) for _ in range(150)]
    train, held_out = [record(q) for q in questions[:100]], [record(q) for q in questions[100:]]

    def ngrams(text):
        return {text[i : i + 4] for i in range(max(1, len(text) - 3))}

    def similarity(a, b):
        a, b = ngrams(normalise(a)), ngrams(normalise(b))
        return len(a & b) / len(a | b)

    best = {q: max(similarity(q, other) for other in questions[:100]) for q in questions[100:]}
    found = {near.held_out.origin: near.similarity for near in near_duplicates(train, held_out)}
    assert found == pytest.approx({q: value for q, value in best.items() if value >= SIMILAR})
    assert 5 < len(found) < 50


def test_the_stage_warns_of_them(paths, capsys):  # noqa: F811
    rows = [{**ALPACA, "instruction": f"Please tell me who you are, number {n}"} for n in range(4)]
    (paths.source / "i.json").write_text(json.dumps(rows))
    run(1, AUREL, settings(), paths, DECLARED, silent)
    assert (
        "warning: 2 held-out questions are nearly the same as a question that is trained on" in capsys.readouterr().out
    )
    facts = json.loads((paths.dataset / "manifest.json").read_text())["facts"]
    assert len(facts["near_duplicates"]) == 2
