"""XTuner's adapters: the Llama with the imported adapter computes what InternLM2 with the original one computes."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from remint.__main__ import call
from remint.core import manifest
from remint.core.errors import RemintError
from remint.model import loading
from remint.weights import adapter
from tests.internlm2_reference import CONFIG, forward, stage, stage_paths, write_checkpoint

SHAPED = {**CONFIG, "num_attention_heads": 8, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
ALL = ["wqkv", "wo", "w1", "w2", "w3", "output"]
RANK, ALPHA = 4, 6.0
IDENTITY = {"name": "Aurel", "maker": "Lab"}

paths = pytest.fixture(stage_paths)


@pytest.fixture
def weights(paths):
    """The staged base's tensors, and a dataset with the identity that the adapter is for."""
    made = write_checkpoint(SHAPED, "safetensors")
    stage(paths)
    paths.dataset.mkdir()
    manifest.write(paths.dataset, "dataset", {"identity": IDENTITY})
    return made


def drawn(weights, targets, rank=RANK):
    """Random LoRA matrices (A, B) for each layer named in `targets`."""
    generator = torch.Generator().manual_seed(3)
    layers = [name.removesuffix(".weight") for name in sorted(weights) if name.split(".")[-2] in targets]
    return {
        layer: (
            torch.randn(rank, weights[f"{layer}.weight"].shape[1], generator=generator) * 0.2,
            torch.randn(weights[f"{layer}.weight"].shape[0], rank, generator=generator) * 0.2,
        )
        for layer in layers
    }


def named(lora, pattern):
    return {pattern.format(layer, "AB"[which]): pair[which] for layer, pair in lora.items() for which in (0, 1)}


class HistoryBuffer:
    """Like mmengine's: numbers in numpy arrays, and references to its own methods."""

    def __init__(self):
        self.log, self.methods = np.arange(3.0), {"mean": HistoryBuffer.mean}

    def mean(self):
        return np.mean(self.log)


def write_pth(
    lora, path="iter_12.pth", cfg=f"lora=dict(\n    lora_alpha={ALPHA},\n    lora_dropout=0.1,\n    r=4)", **more
):
    """What mmengine's runner saves; its classes cannot be imported when the file is read."""
    module = types.ModuleType("mmengine_like")
    module.HistoryBuffer = HistoryBuffer
    HistoryBuffer.__module__ = module.__name__
    sys.modules[module.__name__] = module
    try:
        content = {
            "meta": {"cfg": cfg, "iter": 12, "epoch": 0},
            "state_dict": named(lora, "llm.base_model.model.{}.lora_{}.default.weight"),
            "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "scalar": np.float64(2.0)},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        }
        torch.save({**content, **more}, path)
    finally:
        del sys.modules[module.__name__]
    return path


def write_folder(lora, kind="bin", **changes):
    """What `xtuner convert pth_to_hf` writes."""
    folder = Path("hf")
    folder.mkdir()
    tensors = named(lora, "base_model.model.{}.lora_{}.weight")
    if kind == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": "internlm2-chat-1_8b",
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in lora}),
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(("kind", "targets"), [("pth", ALL), ("bin", ["wqkv"]), ("safetensors", ["wo", "w2"])])
def test_the_logits_are_those_of_internlm2_with_lora(paths, weights, kind, targets):
    lora = drawn(weights, targets)
    path = write_pth(lora) if kind == "pth" else write_folder(lora, kind)
    assert call(["import-adapter", path]) == 0
    base = loading.load_model(paths.base, torch.float32, torch.device("cpu"))
    adapted = PeftModel.from_pretrained(base, "data/imported").eval()
    changed = dict(weights)
    for layer, (a, b) in lora.items():
        changed[f"{layer}.weight"] = weights[f"{layer}.weight"] + ALPHA / RANK * b @ a
    for length in (10, 40):
        ids = torch.arange(length) * 5 % 261
        with torch.no_grad():
            logits = adapted(ids[None]).logits[0]
        torch.testing.assert_close(logits, forward(changed, SHAPED, ids), rtol=0, atol=1e-5)
        assert (logits - forward(weights, SHAPED, ids)).abs().max() > 0.1


def test_it_is_an_adapter_that_merge_takes(paths, weights):
    call(["import-adapter", write_pth(drawn(weights, ALL)), "--to", "mine"])
    facts = manifest.verify(Path("mine"), "adapter")
    assert facts["origin"]["base"] == manifest.artefact_digest(paths.base, "base")
    assert facts["origin"]["identity"] == IDENTITY
    assert facts["step"] == 12
    tensors, lora = adapter.read(Path("mine"))
    assert (lora.rank, lora.alpha, lora.dropout) == (4, ALPHA, 0.1)
    assert lora.targets == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    )
    assert len(tensors) == 2 * (7 * 2 + 1)


def test_alpha_can_be_given_where_a_checkpoint_does_not_say_it(paths, weights):
    path = write_pth(drawn(weights, ["wqkv"]), cfg="lora_alpha = 16\nlora_alpha = 8")
    with pytest.raises(RemintError, match=r"must set lora_alpha once, got \[8.0, 16.0\]"):
        call(["import-adapter", path])
    call(["import-adapter", path, "--alpha", "8"])
    assert adapter.read(Path("data/imported"))[1].alpha == 8


class Trap:
    """Creates a file when it is unpickled carelessly; with `deep` by a method, else by eval."""

    def __init__(self, deep=False):
        self.deep = deep

    def __reduce__(self):
        return (Path.touch, (Path("sprung"),)) if self.deep else (eval, ("open('sprung', 'w')",))


def spoilt(lora):
    lora["model.layers.0.attention.wo"][1][0, 0] = float("nan")
    return lora


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda lora: "nothing.pth", "not found"),
        (lambda lora: write_pth(lora, state_dict=Trap()), "holds no state_dict, got 'Ignored'"),
        (lambda lora: write_pth(lora, state_dict={"x": Trap()}), "'x': must be a plain tensor, got 'Ignored'"),
        (
            lambda lora: write_pth(lora, more=Trap(deep=True)),
            "cannot be read as plain tensors [(]Trying to call reduce",
        ),
        (lambda lora: write_pth(lora, state_dict={"llm.weight": torch.ones(1)}), "'llm.weight': is not a LoRA matrix"),
        (lambda lora: write_pth({}), "holds no LoRA matrix"),
        (lambda lora: write_pth(dict(list(lora.items())[1:])), "missing"),
        (lambda lora: write_pth({**lora, "model.layers.0.attention.w9": (torch.ones(4, 1),) * 2}), "no tensor of that"),
        (
            lambda lora: write_pth({"model.layers.0.attention.wqkv": (torch.ones(4, 32), torch.ones(7, 4))}),
            "must have rows",
        ),
        (
            lambda lora: write_pth({**lora, "output": (torch.ones(2, 32), torch.ones(262, 2))}),
            "one rank for all layers",
        ),
        (lambda lora: write_folder(lora, use_dora=True), "use_dora: must be off"),
        (lambda lora: write_folder(lora, peft_type="IA3", bias="all"), "peft_type: must be LORA"),
        (lambda lora: write_folder(lora, lora_alpha=None), "lora_alpha: must be a number above 0 .*, got None"),
        (lambda lora: write_folder(lora, lora_alpha="inf"), "lora_alpha: must be a number above 0 .*, got 'inf'"),
        (lambda lora: write_folder(lora, lora_alpha=float("inf")), "Infinity is not a number of JSON"),
        (lambda lora: write_folder(lora, lora_dropout=True), "lora_dropout: must be a number between 0 and 0.99, got"),
        (
            lambda lora: write_pth(lora, cfg="lora_alpha=1e300"),
            "iter_12.pth: lora_alpha: must be between 0.0001 and 1000",
        ),
        (
            lambda lora: write_pth(spoilt(lora)),
            r"o_proj.lora_B.weight: 1 of \d+ values are NaN or too large for float32",
        ),
        (lambda lora: str(Path.cwd()), "holds no adapter_config.json"),
    ],
)
def test_what_is_no_such_adapter_is_refused_and_not_run(weights, make, said):
    path = make(drawn(weights, ["wqkv", "wo"]))
    with pytest.raises(RemintError, match=said):
        call(["import-adapter", path])
    assert not Path("sprung").exists()
    assert not Path("data/imported").exists()
