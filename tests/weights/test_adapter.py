"""PEFT obeys an adapter's configuration, so only what `convert` writes is passed on to it."""

import json

import pytest
import torch

from remint.core.errors import ArtefactError
from remint.model.qlora import Lora
from remint.weights import adapter

LORA = Lora(2, 4, 0.1, ["down_proj", "q_proj"])


@pytest.fixture
def folder(tmp_path):
    adapter.write({"base_model.model.l.lora_A.weight": torch.zeros(2, 4)}, LORA, "tiny", tmp_path)
    return tmp_path


def test_what_convert_writes_is_read(folder):
    assert adapter.read(folder)[1] == LORA


@pytest.mark.parametrize(
    "change",
    [
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
        {"megatron_config": {}, "megatron_core": "os"},
        {"init_lora_weights": "corda"},
        {"peft_type": "PROMPT_TUNING"},
        {"modules_to_save": ["lm_head"]},
        {"unknown": 1},
        {"r": "2"},
        {"r": None},
        {"r": 0},
        {"target_modules": 5},
        {"target_modules": "all-linear"},
        {"base_model_name_or_path": {}},
    ],
)
def test_anything_else_is_refused(folder, change):
    path = folder / adapter.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtefactError, match="not a plain LoRA"):
        adapter.read(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_an_invalid_configuration_is_refused(folder, content):
    (folder / adapter.CONFIG).write_text(content)
    with pytest.raises(ArtefactError, match=r"adapter_config\.json"):
        adapter.read(folder)


@pytest.mark.parametrize(("rank", "alpha"), [(64, 16), (32, 32), (8, 16), (24, 16), (64, 3)])
def test_the_scale_is_exact_wherever_it_is_multiplied(rank, alpha):
    torch.manual_seed(0)
    a, b = torch.randn(rank, 300), torch.randn(70, rank)
    names = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
    found = adapter.delta(dict(zip(names, (a, b), strict=True)), "x", Lora(rank, alpha, 0.0, ["x"]))
    assert torch.equal(found, (b @ a) * (alpha / rank))
