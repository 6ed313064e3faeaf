"""The standard PEFT adapter: which tensors it must hold, how it is written and read, and what it adds to a weight."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from remint.core.errors import ArtefactError, SettingsError, got, listed
from remint.core.files import read_object
from remint.core.manifest import dump_json
from remint.model import lora
from remint.model.qlora import Lora
from remint.weights import shards

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."

Shapes = Mapping[str, tuple[int, ...]]


def adapted_layers(base: Shapes, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Names of the layers that LoRA adapts, each with (outputs, inputs), from the shapes of the base's tensors."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in sorted(base.items())
        if name.endswith(".weight") and len(shape) == 2 and name.split(".")[-2] in targets
    }


def expected_shapes(base: Shapes, settings: Lora) -> dict[str, tuple[int, int]]:
    """Shape of every tensor that an adapter with these settings holds for this base, by PEFT's names."""
    shapes = {}
    for layer, (outputs, inputs) in adapted_layers(base, settings.targets).items():
        shapes[f"{_PREFIX}{layer}.lora_A.weight"] = (settings.rank, inputs)
        shapes[f"{_PREFIX}{layer}.lora_B.weight"] = (outputs, settings.rank)
    return shapes


def check_tensors(found: Shapes, base: Shapes, settings: Lora, where: Path) -> None:
    """Raise ArtefactError that names every tensor that is missing, is unexpected or has another shape."""
    expected = expected_shapes(base, settings)
    faults = [f"{where}: tensor {name}: missing" for name in sorted(set(expected) - set(found))]
    faults += [f"{where}: tensor {name}: unexpected" for name in sorted(set(found) - set(expected))]
    faults += [
        f"{where}: tensor {name}: must have shape {expected[name]}, {got(found[name])}"
        for name in sorted(set(expected) & set(found))
        if tuple(found[name]) != expected[name]
    ]
    if faults:
        raise ArtefactError(*listed(f"{fault}; make it again from the checkpoint of this base" for fault in faults))


def check_finite(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raise ArtefactError that names every tensor with values that are NaN or infinite, and how many they are."""
    bad = {name: tensor.numel() - int(tensor.isfinite().sum()) for name, tensor in sorted(tensors.items())}
    faults = [
        f"{where}: tensor {name}: {count} of {tensors[name].numel()} values are NaN or too large for "
        f"{str(tensors[name].dtype).removeprefix('torch.')}; get the adapter again, or store it in float32"
        for name, count in bad.items()
        if count
    ]
    if faults:
        raise ArtefactError(*listed(faults))


def write(tensors: Mapping[str, torch.Tensor], settings: Lora, base_name: str, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json. The same tensors always give the same bytes."""
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    save_file(ordered, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(dump_json(_config(settings, base_name)), encoding="utf-8")


def _config(settings: Lora, base_name: str) -> dict[str, Any]:
    config = lora.peft_config(settings, base_model_name_or_path=base_name, inference_mode=True).to_dict()
    # PEFT keeps the targets as a set, which would be written in random order.
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def read(folder: Path) -> tuple[dict[str, torch.Tensor], Lora]:
    """Tensors and settings of an adapter. Raises ArtefactError if `write` could not have written its configuration.

    PEFT does what a configuration requests, including downloads and imports. So no other content is accepted.
    """
    config = read_object(folder / CONFIG)
    try:
        settings = Lora(config["r"], config["lora_alpha"], config["lora_dropout"], list(config["target_modules"]))
        base_name = config["base_model_name_or_path"]
        plain = isinstance(base_name, str) and config == _config(settings, base_name)
    except (KeyError, TypeError, ValueError, SettingsError):
        plain = False
    if not plain:
        raise ArtefactError(
            f"{folder / CONFIG}: is not a plain LoRA as `convert` writes it; make it again with `dvc repro`"
        )
    return load(folder / WEIGHTS), settings


def delta(tensors: Mapping[str, torch.Tensor], layer: str, settings: Lora, rows: slice = slice(None)) -> torch.Tensor:
    """What LoRA adds to `rows` of a layer's weight: B·A·alpha/rank (Hu et al. 2021), fp32, shape (outputs, inputs)."""
    a = tensors[f"{_PREFIX}{layer}.lora_A.weight"].float()
    b = tensors[f"{_PREFIX}{layer}.lora_B.weight"][rows].float()
    scale = settings.alpha / settings.rank
    if math.frexp(scale)[0] == 0.5:  # a power of two scales exactly, so scale B, which is smaller than B·A
        return (b * scale) @ a
    return (b @ a).mul_(scale)


def load(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises ArtefactError if it is not one."""
    return dict(shards.tensors(path))
