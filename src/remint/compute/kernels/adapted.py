"""Fused operations for a CPU, and for models that `blocks` does not support.

`install` puts them into a model with LoRA. There are three: each adapted layer is one operation, dropout uses a fast
generator, and on a CPU attention runs document by document. Layers that cannot be fused keep peft's forward pass.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from remint.model.libraries import Linear4bit, LoraLayer

ATTENTION = "remint_documents"
# Layers that read the same input. They share one dropout mask.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def install(model: Any) -> None:
    """Change a peft model in place. Its parameters, their names and its results stay the same."""
    for parent in model.modules():
        adapted = {name: child for name, child in parent.named_children() if isinstance(child, LoraLayer)}
        for group in _SIBLINGS:
            if len(members := [adapted.pop(name) for name in group if name in adapted]) > 1:
                _fuse(members)
        for layer in adapted.values():
            _fuse([layer])
    if next(model.parameters()).device.type == "cpu":
        model.get_base_model().set_attn_implementation(ATTENTION)


class SharedDropout(nn.Module):
    """Dropout whose mask and result are computed once for all `readers` of one input; the scale is 1 / (1 - p).

    On a CPU, torch draws a mask one number after the other, which takes a tenth of a training step. Here 16 random bits
    decide each element, so p is accurate to 1/65536. The generator is seeded from torch's, so torch's seed fixes every
    mask.
    """

    def __init__(self, p: float, readers: int):
        super().__init__()
        self.p, self.readers = p, readers
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._left = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with elements dropped, in training mode. All readers of the same tensor object get the same result."""
        if not self.training or self.p == 0:
            return x
        if x is not self._input or self._left == 0:
            self._input, self._left = x, self.readers
            self._output = x * _mask(x, self.p) if x.device.type == "cpu" else F.dropout(x, self.p)
        self._left -= 1
        result = self._output
        if self._left == 0:
            self._input = self._output = None
        assert result is not None
        return result

    def skip(self) -> None:
        """Advance torch's random state as a training pass on a CPU does."""
        if self.p > 0:
            _seed()


def _seed() -> int:
    return int(torch.randint(2**62, (), dtype=torch.int64))


def _mask(like: torch.Tensor, p: float) -> torch.Tensor:
    words = np.random.SFC64(_seed()).random_raw((like.numel() + 3) // 4)
    bits = torch.from_numpy(words.view(np.int16)[: like.numel()]).view(like.shape)
    scale = torch.tensor(1 / (1 - p), dtype=like.dtype)
    return torch.where(bits >= round(p * 65536) - 32768, scale, torch.zeros((), dtype=like.dtype))


def _fuse(layers: Sequence[LoraLayer]) -> None:
    """Give layers that read one input a shared dropout and a fused forward pass each.

    If one of the layers is unsupported, none is changed. Supported are nn.Linear and Linear4bit that compute in the
    adapter's dtype; with another dtype, peft converts the input.
    """
    (adapter,) = layers[0].active_adapters
    for layer in layers:
        base = layer.base_layer
        dtype = base.compute_dtype if isinstance(base, Linear4bit) else base.weight.dtype
        if type(base) not in (nn.Linear, Linear4bit) or dtype != layer.lora_A[adapter].weight.dtype:
            return
    shared = SharedDropout(getattr(layers[0].lora_dropout[adapter], "p", 0.0), len(layers))
    for layer in layers:
        layer.lora_dropout[adapter] = shared
        lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
        layer.forward = _Fused(layer.base_layer, lora_a, lora_b, shared, layer.scaling[adapter])


class _Fused:
    """Forward pass of one adapted layer. It holds modules, not tensors: load_state_dict may replace the tensors."""

    def __init__(self, base: nn.Linear, lora_a: nn.Linear, lora_b: nn.Linear, dropout: SharedDropout, scale: float):
        self.base, self.lora_a, self.lora_b, self.dropout, self.scale = base, lora_a, lora_b, dropout, scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        dropped = self.dropout(x)
        if isinstance(self.base, Linear4bit):  # it dequantizes its weight itself
            return self.base(x) + self.lora_b(self.lora_a(dropped)) * self.scale
        y = _AdaptedLinear.apply(
            x.reshape(-1, width),
            dropped.reshape(-1, width),
            self.base.weight,
            self.lora_a.weight,
            self.lora_b.weight,
            self.scale,
        )
        y = y if self.base.bias is None else y + self.base.bias
        return y.view(*x.shape[:-1], -1)


class _AdaptedLinear(torch.autograd.Function):
    """y = x Wᵀ + scale · (d Aᵀ) Bᵀ, where W is frozen and d is the input after dropout (LoRA, Hu et al. 2021)."""

    @staticmethod
    def forward(ctx: Any, x: Any, dropped: Any, weight: Any, lora_a: Any, lora_b: Any, scale: float) -> torch.Tensor:
        low_rank = dropped @ lora_a.T
        ctx.save_for_backward(dropped, low_rank, weight, lora_a, lora_b)
        ctx.scale = scale
        return (x @ weight.T).addmm_(low_rank, lora_b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dy,) = gradients
        dropped, low_rank, weight, lora_a, lora_b = ctx.saved_tensors
        dlow_rank = (dy @ lora_b).mul_(ctx.scale)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        ddropped = dlow_rank @ lora_a if ctx.needs_input_grad[1] else None
        return dx, ddropped, None, dlow_rank.T @ dropped, (dy.T @ low_rank).mul_(ctx.scale), None


def _by_document(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a single packed row, of shape (1, heads, T, width).

    It has the signature of transformers' attention functions. No score between two documents is computed; with a mask,
    all pairs would be computed and most thrown away.
    """
    lengths = options.pop("document_lengths", None)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = query.shape[1] // key.shape[1]
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    answers = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.get("scaling"), enable_gqa=groups > 1)
        for q, k, v in parts
    ]
    return torch.cat(answers, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _by_document)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
