"""The reference for other tests: InternLM2's forward pass, head by head in plain torch, and random checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from remint.core import manifest
from remint.core.log import silent
from remint.core.paths import Paths
from remint.stages.stage_base.run import run
from remint.stages.stage_base.settings import Model
from tests.conftest import CHATML, DECLARED, write_sentencepiece

TEMPLATE = replace(CHATML, bos="<s>", stop=["<|im_end|>", "</s>"])
CONFIG = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def random_weights(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by InternLM2's names. The norms are not 1, so a norm in the wrong place changes the result."""
    generator = torch.Generator().manual_seed(0)
    wide, inner, heads, kv_heads = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    fused = (heads + 2 * kv_heads) * wide // heads

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.15

    made = {"model.tok_embeddings.weight": drawn(config["vocab_size"], wide), "model.norm.weight": 1 + drawn(wide)}
    if not config["tie_word_embeddings"]:
        made["output.weight"] = drawn(config["vocab_size"], wide)
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "attention.wqkv": (fused, wide),
            "attention.wo": (wide, wide),
            "feed_forward.w1": (inner, wide),
            "feed_forward.w3": (inner, wide),
            "feed_forward.w2": (wide, inner),
        }
        for part, shape in shapes.items():
            made[f"model.layers.{layer}.{part}.weight"] = drawn(*shape)
            if config["bias"] and part.startswith("attention"):
                made[f"model.layers.{layer}.{part}.bias"] = drawn(shape[0])
        for norm in ("attention_norm", "ffn_norm"):
            made[f"model.layers.{layer}.{norm}.weight"] = 1 + drawn(wide)
    return made


def stage_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A fixture: an empty repository as the working directory, with a tokenizer in the folder `tiny`."""
    monkeypatch.chdir(tmp_path)
    Path("conf").mkdir()
    Path("tiny").mkdir()
    write_sentencepiece(Path("tiny"), ["▁"], ["<|im_start|>", "<|im_end|>"])
    return Paths()


def write_checkpoint(config: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    """Random weights in `tiny`, as `safetensors` or as `bin`."""
    weights = random_weights(config)
    write_config(Path("tiny"), config)
    if kind == "safetensors":
        save_file(weights, "tiny/model.safetensors", metadata={"format": "pt"})
    else:
        write_bins(Path("tiny"), weights)
    return weights


def stage(paths: Paths, files: dict[str, str] | None = None) -> None:
    """Run stage_base on `tiny`, with the checksums of all its files unless others are given."""
    if files is None:
        files = {path.name: manifest.file_digest(path) for path in Path("tiny").iterdir()}
    run(
        Model("Tiny", "local_folder", "tiny", None, None, "mit", "float32", 1, files, TEMPLATE), paths, DECLARED, silent
    )


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json of a checkpoint."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_bins(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """The weights as two pickled shards with their index."""
    names = sorted(weights)
    places = {
        name: f"pytorch_model-0000{1 + (number > len(names) // 2)}-of-00002.bin" for number, name in enumerate(names)
    }
    for file in set(places.values()):
        torch.save({name: weights[name] for name in names if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def forward(weights: Mapping[str, Tensor], config: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Logits of shape (length, vocabulary) for ids of shape (length,)."""
    x = weights["model.tok_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x = x + _attention(own, config, _norm(x, own["attention_norm.weight"], config))
        h = _norm(x, own["ffn_norm.weight"], config)
        gate, up = h @ own["feed_forward.w1.weight"].T, h @ own["feed_forward.w3.weight"].T
        x = x + (F.silu(gate) * up) @ own["feed_forward.w2.weight"].T
    head = weights["model.tok_embeddings.weight" if config["tie_word_embeddings"] else "output.weight"]
    return _norm(x, weights["model.norm.weight"], config) @ head.T


def _attention(own: Mapping[str, Tensor], config: Mapping[str, Any], x: Tensor) -> Tensor:
    length, heads = len(x), config["num_attention_heads"]
    size, group = config["hidden_size"] // heads, heads // config["num_key_value_heads"]
    blocks = F.linear(x, own["attention.wqkv.weight"], own.get("attention.wqkv.bias")).split(size, dim=-1)
    hidden = torch.full((length, length), float("-inf")).triu(1)
    outputs = []
    for head in range(heads):
        first = (head // group) * (group + 2)
        q = _rotated(blocks[first + head % group], config)
        k, v = _rotated(blocks[first + group], config), blocks[first + group + 1]
        outputs.append((q @ k.T / size**0.5 + hidden).softmax(-1) @ v)
    return F.linear(torch.cat(outputs, -1), own["attention.wo.weight"], own.get("attention.wo.bias"))


def _rotated(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Rotary positions; past the trained length `dynamic` widens the base with the length (NTK), `linear` squeezes."""
    length, size = x.shape
    base, positions, trained = config["rope_theta"], torch.arange(length).float(), config["max_position_embeddings"]
    scaling = config["rope_scaling"] or {"type": "none"}
    if scaling["type"] == "dynamic" and length > trained:
        base *= (scaling["factor"] * length / trained - (scaling["factor"] - 1)) ** (size / (size - 2))
    if scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    angles = positions[:, None] / base ** (torch.arange(0, size, 2).float() / size)
    cos, sin = angles.cos(), angles.sin()
    left, right = x[:, : size // 2], x[:, size // 2 :]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def _norm(x: Tensor, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight
