"""Readers that hand a model's files to transformers: configurations, tokenizers, GGUF."""

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remint.model import loading, template
from remint.stages.stage_base import layout
from tests.conftest import CHATML, write_tiny_gguf, write_tiny_model
from tests.fuzz.conftest import EXAMPLES, sandbox, survives
from tests.fuzz.mutations import spoilt_bytes, spoilt_json

settings.load_profile("fuzz")
few = settings(max_examples=EXAMPLES // 5 or 3)  # each takes as long as ten other examples

with tempfile.TemporaryDirectory() as _folder:
    write_tiny_model(Path(_folder))
    FILES = {path.name: path.read_bytes() for path in Path(_folder).iterdir()}
    GGUF = write_tiny_gguf(Path(_folder)).read_bytes()
CONFIG = json.loads(FILES["config.json"])
INTERNLM2 = {**CONFIG, "model_type": "internlm2", "bias": False, "auto_map": {"AutoModel": "modeling_internlm2.X"}}
TOKENIZER = json.loads(FILES["tokenizer.json"])
SMALL_TOKENIZER = {
    **TOKENIZER,
    "model": {**TOKENIZER["model"], "vocab": dict(list(TOKENIZER["model"]["vocab"].items())[:9])},
}


def folder_with(folder, **changed):
    for name, data in {**FILES, **{key.replace("__", "."): value for key, value in changed.items()}}.items():
        (folder / name).write_bytes(data)
    return folder


def load(folder):
    model = loading.load_model(folder, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        model(torch.arange(3, 9)[None])


@few
@given(spoilt_json(CONFIG))
def test_configurations(data):
    with sandbox() as folder:
        folder_with(folder, config__json=data)
        survives(lambda: load(folder))


@few
@given(st.sampled_from([CONFIG, INTERNLM2]).flatmap(spoilt_json))
def test_configurations_of_a_source(data):
    with sandbox() as folder:
        folder_with(folder, config__json=data)

        def read():
            config = layout.read_config(folder, None)
            (folder / "draft").mkdir()
            layout.write_weights(folder, None, config, torch.float32, folder / "draft", 1 << 20)

        survives(read)


def use_tokenizer(folder):
    tokenizer = layout.read_tokenizer(folder, None)
    template.missing_tokens(CHATML, tokenizer)
    template.spellable_tokens(CHATML, tokenizer)
    layout.write_tokenizer(tokenizer, folder)


@given(st.sampled_from([TOKENIZER, SMALL_TOKENIZER]).flatmap(spoilt_json))
def test_tokenizers(data):
    with sandbox() as folder:
        folder_with(folder, tokenizer__json=data)
        survives(lambda: use_tokenizer(folder))


@given(spoilt_json({**json.loads(FILES["tokenizer_config.json"]), "chat_template": "{{ 9**9 }}", "auto_map": {}}))
@example(b'{"model_max_length": ""}')
@example(b'{"x\\ud800": 1}')
@example(b'{"unk_token": "", "eos_token": "?!"}')
def test_tokenizer_configurations(data):
    with sandbox() as folder:
        folder_with(folder, tokenizer_config__json=data)
        survives(lambda: use_tokenizer(folder))


@few
@given(spoilt_bytes(GGUF))
def test_gguf(data):
    with sandbox() as folder:
        (folder / "m.gguf").write_bytes(data)

        def read():
            config = layout.read_config(folder, "m.gguf")
            layout.read_tokenizer(folder, "m.gguf")
            (folder / "draft").mkdir()
            layout.write_weights(folder, "m.gguf", config, torch.float32, folder / "draft", 1 << 20)

        survives(read)


@given(
    st.lists(st.one_of(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im", "_end|>", "|>"]), st.text(max_size=4)))
)
def test_no_text_spells_a_marker(tiny, pieces):
    text = "".join(pieces)
    if text.encode(errors="replace").decode() != text:
        return
    ids, _ = tiny.conversation.encode(tiny.tokenizer, [{"role": "user", "content": text}])
    assert sum(token < 3 for token in ids) == 2
