"""A Llama-like decoder with LoRA on all its linear layers, as four products and an attention a layer, for a GPU.

Layers that read one input become one product (`groups`). Between the products stand the operations of `ops`. What a backward
pass needs is computed or drawn again where that takes no pass of its own over memory.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remint.compute.kernels import attention, ops
from remint.compute.kernels.fused_linear import Alone, FusedLinear, Scratch
from remint.compute.kernels.layers import ATTENTION, MLP, MOST_RANK
from remint.model.libraries import LoraLayer


@dataclass(frozen=True)
class Heads:
    """What attention needs besides its input: heads, tiles of the documents, cosines and sines (T, head size)."""

    heads: int
    kv_heads: int
    tiles: Any
    cosines: Tensor
    sines: Tensor

    def turn(self, qkv: Tensor, backward: bool = False) -> Tensor:
        """Rotary embedding of queries and keys, in place."""
        ops.rotated(qkv, qkv, self.cosines, self.sines, self.heads + self.kv_heads, backward)
        return qkv


class _Picked(torch.autograd.Function):
    """Some rows of x; each at most once, so that the backward pass adds nothing up."""

    @staticmethod
    def forward(ctx: Any, x: Any, rows: Any) -> Any:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (rows,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape).index_copy_(0, rows, gradients[0]), None


class Layer:
    """One decoder layer: takes and returns the residual stream as two summands, whose sum the next norm makes."""

    def __init__(self, layer: Any, scratch: dict[tuple[int, int], Scratch], dtype: torch.dtype):
        own, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = FusedLinear([own.q_proj, own.k_proj, own.v_proj], scratch, dtype)
        self.out = FusedLinear([own.o_proj], scratch, dtype)
        self.gate_up = FusedLinear([mlp.gate_proj, mlp.up_proj], scratch, dtype)
        self.mlp_down = FusedLinear([mlp.down_proj], scratch, dtype)
        self.scale = own.scaling

    def groups(self) -> tuple[FusedLinear, ...]:
        """All products of the layer."""
        return self.qkv, self.out, self.gate_up, self.mlp_down

    def parameters(self) -> list[Tensor]:
        """The adapter of the layer, in the order of `backward`'s gradients."""
        return [matrix for group in self.groups() for matrix in group.parameters()]

    def forward(
        self, x: Tensor, delta: Tensor | None, heads: Heads, p: float, seeds: Sequence[int], is_last: bool = True
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Rows of tokens x + delta (T, hidden) through the layer, and what `backward` needs.

        `seeds` are four, one for each input that meets dropout. Without `is_last` the last product is left out.
        """
        first, second = self.norms
        wide = self.qkv.wide(x)
        eps = first.variance_epsilon
        total, rstd, qkv_low = ops.normed(x, delta, first.weight, eps, wide, self.qkv.scaled_a, p, seeds[0])
        qkv = heads.turn(self.qkv(wide))
        mixed, norms = attention.mixed(qkv, heads.tiles, heads.heads, heads.kv_heads, self.scale)
        wide = self.out.wide(x)
        out_low = ops.copied(mixed, wide, self.out.scaled_a, p, seeds[1])
        delta = self.out(wide)
        wide = self.gate_up.wide(x)
        eps = second.variance_epsilon
        middle, middle_rstd, both_low = ops.normed(
            total, delta, second.weight, eps, wide, self.gate_up.scaled_a, p, seeds[2]
        )
        both = self.gate_up(wide)
        wide = self.mlp_down.wide(x)
        mlp_down_low = ops.gated(both, wide, self.mlp_down.scaled_a, p, seeds[3])
        kept = total, rstd, qkv_low, qkv, mixed, norms, out_low, middle, middle_rstd, both_low, both, mlp_down_low
        return middle, self.mlp_down(wide) if is_last else None, kept

    def backward(
        self, kept: Sequence[Tensor], dmiddle: Tensor, dend: Tensor, heads: Heads, p: float, seeds: Sequence[int],
        is_once: bool,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Gradients of x + delta and of `parameters`; with `is_once` nobody reads `kept` again, so it may be written to."""
        total, rstd, qkv_low, qkv, mixed, norms, out_low, middle, middle_rstd, both_low, both, mlp_down_low = kept
        first, second = self.norms
        dwide = self.mlp_down.back(dend)
        dboth, dlow = ops.gated_back(dwide, self.mlp_down.scaled_a, both, p, seeds[3], both if is_once else None)
        mlp_down = self.mlp_down.gradients(dend, mlp_down_low, dlow)
        dwide = self.gate_up.back(dboth)
        dmiddle, dlow = ops.normed_back(
            dwide, self.gate_up.scaled_a, middle, middle_rstd, second.weight, dmiddle, p, seeds[2]
        )
        gate_up = self.gate_up.gradients(dboth, both_low, dlow)
        dwide = self.out.back(dmiddle)
        dmixed, dlow = ops.copied_back(dwide, self.out.scaled_a, mixed, p, seeds[1])
        out = self.out.gradients(dmiddle, out_low, dlow)
        dqkv = attention.mixed_back(dmixed, qkv, mixed, norms, heads.tiles, heads.heads, heads.kv_heads, self.scale)
        dqkv = heads.turn(dqkv, backward=True)
        dwide = self.qkv.back(dqkv)
        dx, dlow = ops.normed_back(dwide, self.qkv.scaled_a, total, rstd, first.weight, dmiddle, p, seeds[0])
        return dx, [*self.qkv.gradients(dqkv, qkv_low, dlow), *out, *gate_up, *mlp_down]


class _Node(torch.autograd.Function):
    """A layer as one node of autograd's graph: many small nodes would cost the processor more than their work costs a GPU.

    It keeps what the backward pass needs, or its input alone and then computes the rest again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, delta: Any, layer: Layer, heads: Heads, p: float, seeds: Any, is_again: bool, *_: Any
    ) -> Any:
        middle, end, kept = layer.forward(x, delta, heads, p, seeds)
        ctx.save_for_backward(*((x, delta) if is_again else kept))
        ctx.known = layer, heads, p, seeds, is_again, delta is not None
        return middle, end

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        layer, heads, p, seeds, is_again, has_delta = ctx.known
        kept = ctx.saved_tensors
        if is_again:
            kept = layer.forward(*kept, heads, p, seeds, is_last=False)[2]
        dx, rest = layer.backward(kept, *gradients, heads, p, seeds, is_once=is_again)
        return dx, dx if has_delta else None, None, None, None, None, None, *rest


class Decoder:
    """The decoder of a peft model, from ids to the hidden states of those positions whose next token is learned."""

    def __init__(self, model: Any):
        self.model = model
        self.body = model.get_base_model().model
        dtype = self.body.embed_tokens.weight.dtype
        self.scratch: dict[tuple[int, int], Scratch] = {}
        self.layers = [Layer(layer, self.scratch, dtype) for layer in self.body.layers]
        self.groups = [group for layer in self.layers for group in layer.groups()]
        self.lora_a_places = [pair for group in self.groups for pair in group.lora_a_places()]
        self.lora_b_places = [pair for group in self.groups if not group.packed for pair in group.lora_b_places()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the present values of the adapter to their places."""
        for pairs in (self.lora_a_places, self.lora_b_places):
            if pairs:  # apart, because torch takes the slow way for all if one is no contiguous piece of memory
                torch._foreach_copy_([place for place, _ in pairs], [matrix.detach() for _, matrix in pairs])
        for scratch in self.scratch.values():
            scratch.owner = None
        torch._foreach_mul_([group.scaled_a for group in self.groups], self.groups[0].scale)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within it, the model's own modules compute the adapter's part as training does, with its present values."""
        self.refresh()
        for group in self.groups:
            for index, layer in enumerate(group.layers):
                layer.forward = Alone(layer, group, index)
        try:
            yield
        finally:
            for group in self.groups:
                for layer in group.layers:
                    del layer.forward

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        starts: Tensor,
        learned: Tensor,
    ) -> Tensor:
        """Normed hidden states (len(learned), hidden) of a batch as `packing.collate` makes it."""
        # All tensors have the dtype to compute in; asking about it in every operation takes time.
        with torch.autocast(input_ids.device.type, enabled=False):
            return self._hidden(input_ids, position_ids, starts, learned)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, starts: Tensor, learned: Tensor) -> Tensor:
        self.refresh()
        config = self.body.config
        x = self.body.embed_tokens(input_ids.flatten())
        cosines, sines = (part[0].contiguous() for part in self.body.rotary_emb(x[None], position_ids.flatten()[None]))
        counts = config.num_attention_heads, config.num_key_value_heads
        heads = Heads(*counts, attention.tiles(starts, len(x)), cosines, sines)
        p = self.groups[0].p if self.model.training else 0.0
        # All in one draw, before anything is computed: an activation that is recomputed meets its mask again.
        seeds = self._seeds()
        again = self.model.training and self.body.gradient_checkpointing
        delta = None
        for layer, own in zip(self.layers, seeds, strict=True):
            if again:  # one tensor to keep instead of two
                x, delta = x if delta is None else x + delta, None
            x, delta = _Node.apply(x, delta, layer, heads, p, own, again, *layer.parameters())
        return self.body.norm(_Picked.apply(x + delta, learned))

    def skip(self) -> None:
        """Leave torch's random state as a pass would."""
        self._seeds()

    def _seeds(self) -> list[list[int]]:
        return torch.randint(2**31 - 1, (len(self.layers), 4)).tolist()


def fits(model: Any) -> bool:
    """Whether a peft model is one that `Decoder` computes: Llama's layers, LoRA of one shape on all their linears."""
    body = getattr(model.get_base_model(), "model", None)
    layers = list(getattr(body, "layers", ()))
    config = getattr(body, "config", None)
    if not layers or getattr(config, "model_type", "") not in ("llama", "mistral", "qwen2"):
        return False
    linears = [getattr(layer.self_attn, name) for layer in layers for name in ATTENTION]
    linears += [getattr(layer.mlp, name) for layer in layers for name in MLP]
    if not all(isinstance(linear, LoraLayer) and len(linear.active_adapters) == 1 for linear in linears):
        return False
    shapes = {
        (linear.r[name], linear.scaling[name], getattr(linear.lora_dropout[name], "p", 0.0), type(linear.base_layer))
        for linear in linears
        for name in linear.active_adapters
    }
    widths = {linear.base_layer.in_features % ops.GROUP for linear in linears}
    if len(shapes) != 1 or widths != {0} or max(rank for rank, *_ in shapes) > MOST_RANK:
        return False
    return getattr(config, "hidden_act", "") == "silu" and not getattr(config, "sliding_window", None)
