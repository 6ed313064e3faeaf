"""Imports an adapter that XTuner trained for InternLM2, as a PEFT adapter for the Llama layout with the same effect."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remint.core import manifest
from remint.core.draft import artefact
from remint.core.errors import ArtefactError, RemintError, SettingsError, got, listed
from remint.core.files import check_file, read_object
from remint.model import loading, template
from remint.model.qlora import Lora
from remint.weights import adapter, internlm2, shards, torch_files

# XTuner's checkpoints prefix names with `llm.`. PEFT's checkpoints contain the adapter name `default`.
_LORA_NAME = re.compile(r"(?:llm\.)?base_model\.model\.(?P<layer>.+)\.(?P<matrix>lora_[AB])(?:\.default)?\.weight")
# If any of these PEFT settings is on, the adapter adds something other than B·A·alpha/rank to each layer.
_OTHER_THAN_LORA = (
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)
# The quantization in XTuner's QLoRA configurations. Only `merge.into=dequantized` reads it.
_QUANTIZATION = {"kind": "nf4", "double": True, "block_size": 64, "dequantize": "once"}


@dataclass(frozen=True)
class Source:
    """An imported adapter: LoRA A/B by InternLM2's names, alpha, dropout, and the training step if it is known."""

    tensors: Mapping[str, torch.Tensor]
    alpha: float
    dropout: float
    step: int | None


def read_source(path: Path, alpha: float | None) -> Source:
    """Read XTuner's .pth or a PEFT folder. `alpha` is lora_alpha for a .pth that does not record it.

    Raises ArtefactError if it is not a plain LoRA adapter, RemintError if lora_alpha is unknown.
    """
    return _folder(path) if path.is_dir() else _checkpoint(path, alpha)


def to_llama(source: Source, path: Path, base: Path, dataset: Path, target: Path) -> None:
    """Write the artefact `adapter` for `base` into `target`. The identity in its facts is that of `dataset`."""
    about_base, about_dataset = manifest.verify(base, "base"), manifest.verify(dataset, "dataset")
    config = loading.empty_model(base).config
    tensors = {
        f"base_model.model.{name}": part.float().clone()
        for own, tensor in source.tensors.items()
        for name, part in internlm2.lora_to_llama(own, tensor, config)
    }
    lora = _lora(tensors, source, path)
    adapter.check_tensors({name: tuple(t.shape) for name, t in tensors.items()}, shards.shapes(base), lora, path)
    adapter.check_finite(tensors, path)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    used = {file.name: manifest.file_digest(file) for file in files}
    with artefact(target, "adapter") as (draft, made):
        adapter.write(tensors, lora, about_base["name"], draft)
        template.load(base).save(draft)
        made.update(
            origin={
                "base": manifest.artefact_digest(base, "base"),
                "base_name": about_base["name"],
                "dataset": None,
                "identity": about_dataset["identity"],
                "imported": path.name,
            },
            made_by={"import-adapter": {"settings": {"alpha": source.alpha}, "dependencies": used}},
            step=source.step,
            lora={"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "targets": lora.targets},
            quantization=_QUANTIZATION,
            dtype="float32",
        )
    print(
        f"{target}: rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.targets)}; to merge it and talk to it:\n"
        f"  remint merge paths.adapter={target} paths.model={target}-model\n  remint chat --model {target}-model"
    )


def _lora(tensors: Mapping[str, torch.Tensor], source: Source, path: Path) -> Lora:
    targets = sorted({name.split(".")[-3] for name in tensors})
    try:
        return Lora(_rank(tensors, path), source.alpha, source.dropout, targets)
    except SettingsError as error:
        faults = (fault.replace("train.lora.", "lora_") for fault in error.faults)
        raise ArtefactError(*(f"{path}: {fault}; get the adapter again" for fault in faults)) from None


def _checkpoint(path: Path, alpha: float | None) -> Source:
    """Read a .pth of XTuner's trainer. It records alpha only in the text of its configuration."""
    check_file(path, f"name XTuner's .pth or a folder with {adapter.CONFIG}")
    content = torch_files.load(path, ignore_objects=True)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ArtefactError(f"{path}: holds no state_dict, {got(type(state).__name__)}; name a .pth of XTuner")
    meta = content["meta"] if isinstance(content.get("meta"), dict) else {}
    alphas, dropouts = (_values_of(str(meta.get("cfg", "")), setting) for setting in ("lora_alpha", "lora_dropout"))
    if alpha is None and len(alphas) != 1:
        raise RemintError(f"{path}: must set lora_alpha once, {got(sorted(alphas))}; add --alpha and the trained value")
    step = meta.get("iter")
    return Source(
        _named(torch_files.plain(state, path), path),
        alphas.pop() if alpha is None else alpha,
        dropouts.pop() if len(dropouts) == 1 else 0.0,
        step if isinstance(step, int) else None,
    )


def _values_of(text: str, setting: str) -> set[float]:
    """All values that the text of a configuration assigns to a setting."""
    return {float(value) for value in re.findall(rf"\b{setting}\s*=\s*(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)", text)}


def _folder(folder: Path) -> Source:
    """Read a PEFT adapter as `xtuner convert pth_to_hf` writes it."""
    if not os.path.lexists(folder / adapter.CONFIG):
        raise ArtefactError(
            f"{folder}: holds no {adapter.CONFIG}; convert a DeepSpeed folder with `xtuner convert pth_to_hf` first"
        )
    config = read_object(folder / adapter.CONFIG, "get the file again")
    values: tuple[Any, Any] = config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    faults = [
        f"{folder / adapter.CONFIG}: {key}: must be a number {must}, {got(value)}; get the file again"
        for key, value, must, low, high in (
            ("lora_alpha", values[0], "above 0 and at most 1000000", 1e-9, 1e6),
            ("lora_dropout", values[1], "between 0 and 0.99", 0, 0.99),
        )
        if type(value) not in (int, float) or not low <= value <= high
    ]
    if faults:
        raise ArtefactError(*faults)
    alpha, dropout = float(values[0]), float(values[1])
    wrong = [f"{key}: must be off, {got(config[key])}" for key in _OTHER_THAN_LORA if config.get(key)]
    if config.get("peft_type") != "LORA":
        wrong.append(f"peft_type: must be LORA, {got(config.get('peft_type'))}")
    if config.get("bias", "none") != "none":
        wrong.append(f"bias: must be none, {got(config['bias'])}")
    if wrong:
        raise ArtefactError(*(f"{folder / adapter.CONFIG}: {fault}; only plain LoRA is supported" for fault in wrong))
    if os.path.lexists(folder / adapter.WEIGHTS):
        return Source(_named(adapter.load(folder / adapter.WEIGHTS), folder / adapter.WEIGHTS), alpha, dropout, None)
    path = folder / "adapter_model.bin"
    return Source(_named(torch_files.tensors(path), path), alpha, dropout, None)


def _named(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The LoRA matrices by InternLM2's names. Raises ArtefactError if a tensor is not a LoRA matrix."""
    found = {name: _LORA_NAME.fullmatch(name) for name in tensors}
    wrong = [name for name, match in found.items() if match is None]
    if wrong or not tensors:
        raise ArtefactError(
            *listed(f"{path}: {name!r}: is not a LoRA matrix of a language model; name another file" for name in wrong)
            or [f"{path}: holds no LoRA matrix; name another file"]
        )
    return {f"{match['layer']}.{match['matrix']}.weight": tensors[name] for name, match in found.items() if match}


def _rank(tensors: Mapping[str, torch.Tensor], path: Path) -> int:
    """The rank, which all LoRA matrices share. Raises ArtefactError if they have different ranks."""
    ranks = {
        tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.dim() == 2
    }
    if len(ranks) != 1:
        raise ArtefactError(
            f"{path}: must have one rank for all layers, {got(sorted(ranks))}; only plain LoRA is supported"
        )
    return ranks.pop()
