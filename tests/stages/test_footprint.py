"""A training's GPU memory is known before it starts; if the GPU is too small, the recipe that fits is named."""

import contextlib
import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from remint.compute.kernels.layers import MOST_RANK
from remint.core.errors import GpuTooSmall, RemintError
from remint.runner import memory, recipes
from remint.runner.typed import build
from remint.stages.train import footprint
from remint.stages.train.settings import Train

ROOT = Path(__file__).parents[2]
INTERNLM2 = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 92544,
    "num_hidden_layers": 24,
}


@functools.cache
def recipe(name):
    with contextlib.chdir(ROOT):
        return build(Train, recipes.settings(name)["train"], "train")


@pytest.mark.parametrize(
    ("rows", "recomputed", "dequantize", "seen"),
    [
        (8, False, "once", 26.0),
        (16, False, "once", 46.4),
        (8, False, "each_use", 23.8),
        (4, True, "each_use", 4.0),
        (5, True, "each_use", 4.4),
        (6, True, "each_use", 4.7),
        (8, True, "each_use", 5.5),
        (4, False, "each_use", 13.2),
        (4, False, "once", 15.3),
    ],
)
def test_it_is_what_was_measured_or_somewhat_more(rows, recomputed, dequantize, seen):
    """Peaks in GiB from docs/results.md, measured on an H100."""
    train = recipe("internlm2-80gb")
    quantization = replace(train.quantization, dequantize=dequantize)
    train = replace(train, micro_batch=rows, gradient_checkpointing=recomputed, quantization=quantization)
    assert seen < footprint.needed(INTERNLM2, train) / 2**30 < 1.1 * seen


@pytest.mark.parametrize(("size", "usable"), [(8, 7.5), (16, 15.2), (24, 23.2), (80, 78)])
def test_each_recipe_fits_its_gpu_and_computes_the_tutorials_batch(size, usable):
    train = recipe(f"internlm2-{size}gb")
    assert footprint.needed(INTERNLM2, train) < usable * 2**30
    assert train.micro_batch * train.accumulation == 16


def test_what_another_code_computes_is_not_guessed():
    train = recipe("internlm2-80gb")
    assert footprint.needed(INTERNLM2, replace(train, kernels="plain")) is None
    assert footprint.needed(INTERNLM2, replace(train, lora=replace(train.lora, targets=["q_proj"]))) is None
    assert footprint.needed(INTERNLM2, replace(train, lora=replace(train.lora, rank=MOST_RANK + 1))) is None


@pytest.mark.parametrize(
    ("free", "named"), [(24, "internlm2-24gb"), (15, "internlm2-16gb"), (8, "internlm2-8gb"), (1, None)]
)
def test_for_a_gpu_too_small_the_recipe_that_fits_is_reported(
    tmp_path, monkeypatch, in_root, yaml_parsed_once, free, named
):
    (tmp_path / "config.json").write_text(json.dumps(INTERNLM2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 80 * 2**30))
    train = recipe("internlm2-80gb")
    settings = {"train": train, "paths": SimpleNamespace(base=tmp_path)}
    needed = pytest.raises(RemintError, match=r"^train: about 4\d\.\d GiB of GPU memory are needed")
    with needed as told, memory.explaining_errors("train", settings):
        footprint.check_gpu_memory(tmp_path, train)
    assert f"{free}.0 GiB are free" in str(told.value)
    assert "train.gradient_checkpointing=true" in str(told.value)
    assert (f"try `make recipe NAME={named}`" in str(told.value)) is (named is not None)


def test_a_gpu_that_is_large_enough_is_taken(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(INTERNLM2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79 * 2**30, 80 * 2**30))
    footprint.check_gpu_memory(tmp_path, recipe("internlm2-80gb"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 80 * 2**30))
    with pytest.raises(GpuTooSmall):
        footprint.check_gpu_memory(tmp_path, recipe("internlm2-80gb"))
