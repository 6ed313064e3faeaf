"""Add an adapter to a base tensor by tensor: memory never holds more than one shard."""

from collections.abc import Mapping
from pathlib import Path

import torch

from remint import adapter, modeling, shards
from remint.modeling import Lora, Quantization


def merge_tensor(
    weight: torch.Tensor, delta: torch.Tensor | None, quantization: Quantization | None, dtype: torch.dtype
) -> torch.Tensor:
    """One weight with what LoRA adds, summed in fp32 and rounded once to `dtype`.

    With `quantization` the weight is first rounded to 4 bits and back, as the adapter saw it while it was trained.
    """
    full = weight.float()
    if quantization is not None:
        full = modeling.dequantized(full, quantization)
    return (full if delta is None else full + delta).to(dtype)


def write_merged(
    base: Path,
    tensors: Mapping[str, torch.Tensor],
    lora: Lora,
    quantization: Quantization | None,
    dtype: torch.dtype | None,
    draft: Path,
) -> int:
    """Write the merged model with the base's own shards, in `dtype` or each tensor's own; returns its bytes."""
    adapted = adapter.adapted_layers(shards.shapes(base), lora.targets)
    linears = _linear_names(base)
    writer = shards.Writer(draft, limit=2**62)
    for path in shards.files(base):
        for name, weight in shards.tensors(path):
            layer = name.removesuffix(".weight")
            delta = adapter.delta(tensors, layer, lora) if layer in adapted else None
            rounded = quantization if name.endswith(".weight") and layer in linears else None
            writer.add(name, merge_tensor(weight, delta, rounded, dtype or weight.dtype))
        writer.cut()
    writer.close()
    return writer.total


def _linear_names(base: Path) -> set[str]:
    """Names of the linear layers that training quantizes."""
    return set(modeling.linears(modeling.empty_model(base)))
