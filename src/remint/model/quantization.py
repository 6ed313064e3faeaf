"""Quantize the frozen base as in QLoRA: NF4 blocks with quantized scales (Dettmers et al. 2023)."""

import torch
from torch import nn

from remint.model.libraries import Linear4bit, Params4bit, dequantize_4bit, quantize_4bit
from remint.model.qlora import Quantization


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantized and may be adapted, by name: all except the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def dequantized(weight: torch.Tensor, settings: Quantization) -> torch.Tensor:
    """The weight as QLoRA's forward pass uses it: rounded to 4 bits and dequantized, same shape and dtype."""
    if settings.kind == "none":
        return weight
    packed, state = quantize_4bit(
        weight, blocksize=settings.block_size, compress_statistics=settings.double, quant_type=settings.kind
    )
    return dequantize_4bit(packed, state).to(weight.dtype)


@torch.no_grad()
def quantize(model: nn.Module, settings: Quantization) -> None:
    """Quantize every linear layer except the head, in place.

    `once` keeps the rounded weights at full precision. They are exactly the values that 4-bit layers compute with, but
    no product has to dequantize them. `each_use` keeps 4 bits in memory.
    """
    if settings.kind == "none":
        return
    for name, layer in linears(model).items():
        if settings.dequantize == "once":
            layer.weight.copy_(dequantized(layer.weight, settings))
        else:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _linear_4bit(layer, settings))


def _linear_4bit(layer: nn.Linear, settings: Quantization) -> nn.Module:
    where, dtype = layer.weight.device, layer.weight.dtype
    packed = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        compress_statistics=settings.double,
        quant_type=settings.kind,
        device="meta",
    )
    packed.weight = Params4bit(
        layer.weight.detach().clone(),
        requires_grad=False,
        blocksize=settings.block_size,
        compress_statistics=settings.double,
        quant_type=settings.kind,
        module=packed,
    )._quantize(where)
    packed.bias = layer.bias
    # On CPUs with AVX512-BF16, bitsandbytes would repack the weights in an evaluation. That loses precision, and
    # training would continue with the repacked weights.
    packed.support_avx512bf16_for_cpu = False
    return packed
