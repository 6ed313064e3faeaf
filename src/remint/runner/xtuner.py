"""Take over an adapter that XTuner trained for InternLM2: the same change, as a standard PEFT adapter for the Llama layout."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from remint.core import manifest
from remint.core.errors import ArtefactError, RemintError, got, listed
from remint.core.files import read_object
from remint.model import loading, template
from remint.model.qlora import Lora
from remint.weights import adapter, internlm2, shards, torch_files

# XTuner's checkpoints put the model under `llm.`; PEFT puts its adapter's name, `default`, into a checkpoint's names.
_LORA_NAME = re.compile(r"(?:llm\.)?base_model\.model\.(?P<layer>.+)\.(?P<matrix>lora_[AB])(?:\.default)?\.weight")
# Settings of a PEFT adapter under which it would add something else than B·A·alpha/rank to each layer.
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
# How XTuner's QLoRA configurations hold the base; only `merge.into=dequantized` asks for it.
_QUANTIZATION = {"kind": "nf4", "double": True, "block_size": 64, "dequantize": "once"}


@dataclass(frozen=True)
class Source:
    """A foreign adapter: its LoRA matrices by InternLM2's names, its scale's numerator, where training had come to."""

    tensors: Mapping[str, torch.Tensor]
    alpha: float
    dropout: float
    step: int | None


def read_source(path: Path, alpha: float | None) -> Source:
    """The adapter of XTuner's .pth or of a PEFT folder; `alpha` counts where a .pth does not say it."""
    return _folder(path) if path.is_dir() else _checkpoint(path, alpha)


def to_llama(source: Source, path: Path, base: Path, dataset: Path, target: Path) -> None:
    """Write the artefact `adapter` for `base`; the identity in its facts is the one that `dataset` was made for."""
    about_base, about_dataset = manifest.verify(base, "base"), manifest.verify(dataset, "dataset")
    config = loading.empty_model(base).config
    tensors = {
        f"base_model.model.{name}": part.float().clone()
        for own, tensor in source.tensors.items()
        for name, part in internlm2.lora_to_llama(own, tensor, config)
    }
    lora = Lora(_rank(tensors, path), source.alpha, source.dropout, sorted({name.split(".")[-3] for name in tensors}))
    adapter.check_tensors({name: tuple(t.shape) for name, t in tensors.items()}, shards.shapes(base), lora, path)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    used = {file.name: manifest.file_digest(file) for file in files}
    with manifest.artefact(target, "adapter") as (draft, made):
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


def _checkpoint(path: Path, alpha: float | None) -> Source:
    """A .pth of XTuner's trainer. It says alpha only in the text of its configuration."""
    if not path.is_file():
        raise ArtefactError(f"{path}: not found; name XTuner's .pth or a folder with {adapter.CONFIG}")
    content = torch_files.load(path, ignore_objects=True)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ArtefactError(f"{path}: holds no state_dict, {got(type(state).__name__)}; name a .pth of XTuner")
    meta = content["meta"] if isinstance(content.get("meta"), dict) else {}
    alphas, dropouts = (_said(str(meta.get("cfg", "")), setting) for setting in ("lora_alpha", "lora_dropout"))
    if alpha is None and len(alphas) != 1:
        raise RemintError(f"{path}: must say lora_alpha once, {got(sorted(alphas))}; add --alpha and the trained value")
    step = meta.get("iter")
    return Source(
        _named(torch_files.plain(state, path), path),
        alphas.pop() if alpha is None else alpha,
        dropouts.pop() if len(dropouts) == 1 else 0.0,
        step if isinstance(step, int) else None,
    )


def _said(text: str, setting: str) -> set[float]:
    return {float(value) for value in re.findall(rf"\b{setting}\s*=\s*(\d+(?:\.\d+)?)", text)}


def _folder(folder: Path) -> Source:
    """A PEFT adapter as `xtuner convert pth_to_hf` writes it."""
    if not (folder / adapter.CONFIG).exists():
        raise ArtefactError(
            f"{folder}: holds no {adapter.CONFIG}; a folder of DeepSpeed's must go through `xtuner convert pth_to_hf` first"
        )
    config = read_object(folder / adapter.CONFIG, "get the file again")
    try:
        alpha, dropout = float(config["lora_alpha"]), float(config.get("lora_dropout", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder / adapter.CONFIG}: is not readable ({error!r}); get the file again") from None
    wrong = [f"{key}: must be off, {got(config[key])}" for key in _OTHER_THAN_LORA if config.get(key)]
    if config.get("peft_type") != "LORA":
        wrong.append(f"peft_type: must be LORA, {got(config.get('peft_type'))}")
    if config.get("bias", "none") != "none":
        wrong.append(f"bias: must be none, {got(config['bias'])}")
    if wrong:
        raise ArtefactError(*(f"{folder / adapter.CONFIG}: {fault}; only plain LoRA is taken over" for fault in wrong))
    if (folder / adapter.WEIGHTS).is_file():
        return Source(_named(adapter.load(folder / adapter.WEIGHTS), folder / adapter.WEIGHTS), alpha, dropout, None)
    path = folder / "adapter_model.bin"
    return Source(_named(torch_files.tensors(path), path), alpha, dropout, None)


def _named(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The matrices by the names that they have in InternLM2."""
    found = {name: _LORA_NAME.fullmatch(name) for name in tensors}
    wrong = [name for name, match in found.items() if match is None]
    if wrong or not tensors:
        raise ArtefactError(
            *listed(f"{path}: {name!r}: is no LoRA matrix of a language model; name another file" for name in wrong)
            or [f"{path}: holds no LoRA matrix; name another file"]
        )
    return {f"{match['layer']}.{match['matrix']}.weight": tensors[name] for name, match in found.items() if match}


def _rank(tensors: Mapping[str, torch.Tensor], path: Path) -> int:
    ranks = {
        tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.dim() == 2
    }
    if len(ranks) != 1:
        raise ArtefactError(
            f"{path}: must have one rank for all layers, {got(sorted(ranks))}; only plain LoRA is taken over"
        )
    return ranks.pop()
