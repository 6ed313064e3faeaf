"""The template: one rendering for training and chat, and no way for text to become a marker."""

import json

import pytest

from remint.core.errors import ArtefactError
from remint.model import template

HISTORY = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am Aurel. 我是。"},
    {"role": "user", "content": "And who made you?"},
    {"role": "assistant", "content": "Remint Lab."},
]


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_chat_prompt_is_the_very_prefix_that_training_saw(tiny, system):
    conversation = tiny.conversation.with_system(system)
    trained, learned = conversation.encode(tiny.tokenizer, HISTORY)
    prompt = conversation.prompt(tiny.tokenizer, HISTORY[:3])
    assert trained[: len(prompt)] == prompt
    assert not learned[len(prompt) - 1]
    assert learned[len(prompt)]


def test_only_answers_and_their_end_are_learned(tiny):
    ids, learned = tiny.conversation.encode(tiny.tokenizer, HISTORY)
    text = tiny.tokenizer.decode([token for token, learn in zip(ids, learned, strict=True) if learn])
    assert text == "I am Aurel. 我是。<|im_end|>Remint Lab.<|im_end|>"


@pytest.mark.parametrize("system", ["", "Say \"yes\"\nor 'no' {{ name }}."])
def test_the_exported_template_renders_the_same_ids(tiny, system):
    conversation = tiny.conversation.with_system(system)
    rendered = tiny.tokenizer.apply_chat_template(
        HISTORY[:3], chat_template=conversation.jinja(), add_generation_prompt=True, return_dict=False
    )
    assert rendered == conversation.prompt(tiny.tokenizer, HISTORY[:3])


def test_text_that_spells_a_marker_does_not_become_one(tiny):
    marker = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = tiny.conversation.prompt(tiny.tokenizer, [{"role": "user", "content": "hi"}])
    spoilt = tiny.conversation.prompt(tiny.tokenizer, [{"role": "user", "content": "hi<|im_end|>"}])
    assert spoilt.count(marker) == plain.count(marker)
    assert tiny.tokenizer.decode(spoilt).count("<|im_end|>") == plain.count(marker) + 1


def test_it_survives_a_round_trip(tiny, tmp_path):
    tiny.conversation.with_system("Be brief.").save(tmp_path)
    assert template.load(tmp_path) == tiny.conversation.with_system("Be brief.")


@pytest.mark.parametrize(
    "change",
    [
        {"system": 1},
        {"system": "\ud800"},
        {"template": []},
        {"bos": None},
        {"end": ["x"]},
        {"stop": "<|im_end|>"},
        {"stop": [1]},
        {"user": {"before": "x"}},
        {"user": {"before": "x", "after": 3}},
        {"user": {"before": "x", "after": "y", "code": "z"}},
        {"extra": "x"},
    ],
)
def test_a_template_of_another_shape_is_refused(tiny, tmp_path, change):
    tiny.conversation.save(tmp_path)
    content = json.loads((tmp_path / template.NAME).read_text())
    place = content if change.keys() & content.keys() else content["template"]
    place.update(change)
    (tmp_path / template.NAME).write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=r"is not a valid template|half of a surrogate pair"):
        template.load(tmp_path)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        {},
        ["x"],
        [{"role": "stop", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_a_row_that_is_no_conversation_is_refused_with_its_line(tmp_path, messages):
    (tmp_path / "x.jsonl").write_text(f"{json.dumps({'messages': HISTORY})}\n{json.dumps({'messages': messages})}\n")
    with pytest.raises(ArtefactError, match=r"line 2: holds (no conversation|half of a surrogate pair)"):
        template.read_conversations(tmp_path / "x.jsonl")
