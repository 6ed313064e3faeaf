"""Add an adapter to a base model, a few megabytes at a time."""

from collections.abc import Mapping
from pathlib import Path

import torch

from remint.model import loading
from remint.model.qlora import Lora, Quantization
from remint.model.quantization import dequantized, linears
from remint.stages.merge.rewrite import rewrite
from remint.weights import adapter, shards


def merge_tensor(
    weight: torch.Tensor, delta: torch.Tensor | None, quantization: Quantization | None, dtype: torch.dtype
) -> torch.Tensor:
    """One weight plus its LoRA delta, summed in fp32 and rounded once to `dtype`. Overwrites `delta` with the sum.

    With `quantization` the weight is first rounded to 4 bits and back, because the adapter was trained on that weight.
    """
    full = weight if quantization is None else dequantized(weight.float(), quantization)
    return (full if delta is None else delta.add_(full)).to(dtype)


def write_merged(
    base: Path,
    tensors: Mapping[str, torch.Tensor],
    lora: Lora,
    quantization: Quantization | None,
    dtype: torch.dtype | None,
    draft: Path,
) -> int:
    """Write the merged model, sharded like the base, in `dtype` or each tensor's own. Returns its size in bytes."""
    adapted = adapter.adapted_layers(shards.shapes(base), lora.targets)
    quantized = _linear_names(base)

    def is_rounded(name: str) -> bool:
        # Such a tensor is processed at once: double quantization takes a mean over all of it.
        return quantization is not None and name.endswith(".weight") and name.removesuffix(".weight") in quantized

    def merged(name: str, rows: slice, weight: torch.Tensor) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        delta = adapter.delta(tensors, layer, lora, rows) if layer in adapted else None
        return merge_tensor(weight, delta, quantization if is_rounded(name) else None, dtype or weight.dtype)

    names, total = [], 0
    for number, path in enumerate(shards.files(base)):
        names.append(shards.names(path))
        total += rewrite(path, draft / f"part-{number:05d}", merged, dtype, whole=is_rounded)
    shards.name_shards(draft, names, total)
    return total


def _linear_names(base: Path) -> set[str]:
    """Names of the linear layers that training quantizes."""
    return set(linears(loading.empty_model(base)))
