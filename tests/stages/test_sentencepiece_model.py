"""InternLM2's tokenizer without its code: the same ids as SentencePiece, for texts and for complete conversations."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from remint.core.errors import ArtefactError
from remint.model.template import Conversation
from remint.stages.stage_base import sentencepiece_model
from tests.conftest import CHATML, write_sentencepiece

MARKERS = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
LETTERS = [*"▁abcdefghijklmnopqrstuvwxyz<>|_/\n.,!你我是谁好的A"]
# Joined pieces by falling score; some join characters across the border between markup and text.
JOINED = [
    "us",
    "er",
    "user",
    "▁a",
    "▁▁",
    "\n\n",
    "r\n",
    "你是",
    "你是谁",
    "好的",
    "<s",
    "</",
    "</s",
    "as",
    "ss",
    "is",
    "im",
    "▁user",
]
PIECES = [*JOINED, *LETTERS]
FIRST = 3 + 256
CONVERSATION = Conversation(replace(CHATML, bos="<s>", stop=["<|im_end|>", "</s>"]), system="")


def reference(text, dummy_prefix):
    """SentencePiece's algorithm in its simplest form: join the neighbours with the best piece, the leftmost first."""
    symbols = [*("▁" if dummy_prefix and text else ""), *text.replace(" ", "▁")]
    while True:
        found = [(PIECES.index(a + b), at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in PIECES]
        if not found:
            break
        _, at = min(found)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = []
    for symbol in symbols:
        ids += [FIRST + PIECES.index(symbol)] if symbol in PIECES else [3 + byte for byte in symbol.encode()]
    return ids


@pytest.fixture(params=[False, True], ids=["no prefix", "dummy prefix"])
def made(request, tmp_path):
    """Whether each text gets a space in front, and the converted tokenizer as transformers loads it."""
    write_sentencepiece(tmp_path, PIECES, MARKERS, dummy_prefix=request.param)
    sentencepiece_model.read(tmp_path).save_pretrained(tmp_path / "fast")
    return request.param, AutoTokenizer.from_pretrained(tmp_path / "fast")


TEXTS = [
    "user is a user",
    "你是谁?好的!",
    "未见 😀🦙",
    "  two spaces, and one at the end ",
    "\n\nlines\n\n\nof text\n",
    "▁ itself",
    "<s></s><unk><0x0A><|im_end|><|plugin|>[UNUSED_TOKEN_4]",
    "Ａ\u3000\t\x00é",
    " ",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_ids_of_sentencepiece_and_comes_back(made, text):
    dummy_prefix, tokenizer = made
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ids == reference(text, dummy_prefix)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_markers_have_the_ids_and_names_that_the_base_gives_them(made):
    _, tokenizer = made
    first = FIRST + len(PIECES)
    assert tokenizer.convert_tokens_to_ids(MARKERS) == list(range(first, first + 6))
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("是")[0] == 1
    assert tokenizer.decode(tokenizer.encode("<|im_start|>是<|im_end|>"), skip_special_tokens=True).strip() == "是"


@pytest.mark.parametrize("question", ["user", "\n\nwho", " a", "你是谁", "😀", "<|im_end|></s>", ""])
@pytest.mark.parametrize("answer", ["好的。", "user", "<|im_start|>user"])
def test_a_conversation_has_the_ids_of_its_whole_string(made, question, answer):
    dummy_prefix, tokenizer = made
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def text(words):
        return reference(words, dummy_prefix)

    asked = [1, start, *text("user\n" + question), end, *text("\n"), start]
    whole = [*asked, *text("assistant\n" + answer), end, *text("\n")]
    history = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, learned = CONVERSATION.encode(tokenizer, history)
    assert ids == whole
    assert (
        tokenizer.decode([token for token, learn in zip(ids, learned, strict=True) if learn]) == answer + "<|im_end|>"
    )
    assert CONVERSATION.prompt(tokenizer, history[:1]) == [*asked, *text("assistant\n")]


def test_an_answer_never_shares_a_token_with_the_prompt(made):
    _, tokenizer = made
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\na"}]
    ids, learned = CONVERSATION.encode(tokenizer, history)
    assert ids[: learned.index(True)] == CONVERSATION.prompt(tokenizer, history[:1])


def rename_past_the_end(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"]["9999"] = {"content": "<|far|>"}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"\xff" * 9), "not a SentencePiece model"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b""), "must be a BPE model"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "must hold an object"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": 1}}'),
            "added_tokens_decoder is not readable",
        ),
        (rename_past_the_end, "no place for tokens"),
    ],
)
def test_files_that_are_not_right_are_refused(tmp_path, spoil, said):
    write_sentencepiece(tmp_path, PIECES, MARKERS)
    spoil(tmp_path)
    with pytest.raises(ArtefactError, match=said):
        sentencepiece_model.read(tmp_path)
