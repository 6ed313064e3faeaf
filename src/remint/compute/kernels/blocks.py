"""A Llama-like decoder with LoRA on all its linear layers, for a GPU: four matrix products and one attention per layer.

Linear layers that read one input become one product (`fused_linear`). The operations between the products are in `ops`.
The backward pass recomputes activations and draws dropout masks again wherever that needs no extra pass over memory.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remint.compute.kernels import attention, ops
from remint.compute.kernels.fused_linear import FusedLinear, Scratch, SingleLayerForward
from remint.compute.kernels.layers import ATTENTION, MLP, MOST_RANK
from remint.model.libraries import LoraLayer


@dataclass(frozen=True)
class AttentionContext:
    """What attention needs besides its input: head counts, tiles of the documents, cosines and sines (T, head size)."""

    heads: int
    kv_heads: int
    tiles: Any
    cosines: Tensor
    sines: Tensor

    def rope_(self, qkv: Tensor, backward: bool = False) -> Tensor:
        """Apply the rotary embedding to queries and keys in place; `backward` rotates the other way."""
        ops.apply_rope(qkv, qkv, self.cosines, self.sines, self.heads + self.kv_heads, backward)
        return qkv


class _SelectRows(torch.autograd.Function):
    """Selects rows of x, each at most once, so the backward pass copies and never sums."""

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
    """One decoder layer.

    It takes and returns the residual stream as two summands; the next RMSNorm adds them in its own pass over memory.
    """

    def __init__(self, layer: Any, scratch: dict[tuple[int, int], Scratch], dtype: torch.dtype):
        attn, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = FusedLinear([attn.q_proj, attn.k_proj, attn.v_proj], scratch, dtype)
        self.out = FusedLinear([attn.o_proj], scratch, dtype)
        self.gate_up = FusedLinear([mlp.gate_proj, mlp.up_proj], scratch, dtype)
        self.mlp_down = FusedLinear([mlp.down_proj], scratch, dtype)
        self.scale = attn.scaling

    def groups(self) -> tuple[FusedLinear, ...]:
        """The four products of the layer."""
        return self.qkv, self.out, self.gate_up, self.mlp_down

    def parameters(self) -> list[Tensor]:
        """The LoRA matrices of the layer, in the order of the gradients that `backward` returns."""
        return [matrix for group in self.groups() for matrix in group.parameters()]

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        context: AttentionContext,
        p: float,
        seeds: Sequence[int],
        run_mlp_down: bool = True,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Run the residual stream x + delta (T, hidden) through the layer.

        `seeds` are four dropout seeds, one per product. Returns the two summands of the new residual stream and the
        tensors that `backward` needs. With `run_mlp_down=False` the last product is skipped and the second summand is
        None.
        """
        first, second = self.norms
        extended = self.qkv.empty_extended(x)
        eps = first.variance_epsilon
        total, rstd, qkv_low_rank = ops.add_rms_norm(
            x, delta, first.weight, eps, extended, self.qkv.scaled_a, p, seeds[0]
        )
        qkv = context.rope_(self.qkv(extended))
        attended, lse = attention.forward(qkv, context.tiles, context.heads, context.kv_heads, self.scale)
        extended = self.out.empty_extended(x)
        out_low_rank = ops.copy_with_lora(attended, extended, self.out.scaled_a, p, seeds[1])
        delta = self.out(extended)
        extended = self.gate_up.empty_extended(x)
        eps = second.variance_epsilon
        middle, middle_rstd, gate_up_low_rank = ops.add_rms_norm(
            total, delta, second.weight, eps, extended, self.gate_up.scaled_a, p, seeds[2]
        )
        gate_up = self.gate_up(extended)
        extended = self.mlp_down.empty_extended(x)
        mlp_down_low_rank = ops.silu_mul(gate_up, extended, self.mlp_down.scaled_a, p, seeds[3])
        saved = (
            total, rstd, qkv_low_rank, qkv, attended, lse, out_low_rank,
            middle, middle_rstd, gate_up_low_rank, gate_up, mlp_down_low_rank,
        )  # fmt: skip
        return middle, self.mlp_down(extended) if run_mlp_down else None, saved

    def backward(
        self, saved: Sequence[Tensor], dmiddle: Tensor, dend: Tensor, context: AttentionContext, p: float,
        seeds: Sequence[int], may_overwrite: bool,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Gradients of x + delta and of `parameters`.

        `saved` are the tensors from `forward`; with `may_overwrite` their memory is reused, because they are not read
        again. `dmiddle` and `dend` are the gradients of the two summands that `forward` returned.
        """
        (
            total, rstd, qkv_low_rank, qkv, attended, lse, out_low_rank,
            middle, middle_rstd, gate_up_low_rank, gate_up, mlp_down_low_rank,
        ) = saved  # fmt: skip
        first, second = self.norms
        dextended = self.mlp_down.backward(dend)
        dgate_up, dscaled_a = ops.silu_mul_backward(
            dextended, self.mlp_down.scaled_a, gate_up, p, seeds[3], gate_up if may_overwrite else None
        )
        mlp_down_grads = self.mlp_down.gradients(dend, mlp_down_low_rank, dscaled_a)
        dextended = self.gate_up.backward(dgate_up)
        dmiddle, dscaled_a = ops.add_rms_norm_backward(
            dextended, self.gate_up.scaled_a, middle, middle_rstd, second.weight, dmiddle, p, seeds[2]
        )
        gate_up_grads = self.gate_up.gradients(dgate_up, gate_up_low_rank, dscaled_a)
        dextended = self.out.backward(dmiddle)
        dattended, dscaled_a = ops.copy_with_lora_backward(dextended, self.out.scaled_a, attended, p, seeds[1])
        out_grads = self.out.gradients(dmiddle, out_low_rank, dscaled_a)
        dqkv = attention.backward(
            dattended, qkv, attended, lse, context.tiles, context.heads, context.kv_heads, self.scale
        )
        dqkv = context.rope_(dqkv, backward=True)
        dextended = self.qkv.backward(dqkv)
        dx, dscaled_a = ops.add_rms_norm_backward(
            dextended, self.qkv.scaled_a, total, rstd, first.weight, dmiddle, p, seeds[0]
        )
        return dx, [*self.qkv.gradients(dqkv, qkv_low_rank, dscaled_a), *out_grads, *gate_up_grads, *mlp_down_grads]


class _LayerFunction(torch.autograd.Function):
    """A layer as one node of the autograd graph: with many small nodes, the CPU overhead would exceed the GPU's work.

    It saves the tensors that the backward pass needs. With `recompute` (gradient checkpointing) it saves only its input
    and runs the forward pass again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        delta: Any,
        layer: Layer,
        context: AttentionContext,
        p: float,
        seeds: Any,
        recompute: bool,
        *_: Any,
    ) -> Any:
        middle, end, saved = layer.forward(x, delta, context, p, seeds)
        ctx.save_for_backward(*((x, delta) if recompute else saved))
        ctx.known = layer, context, p, seeds, recompute, delta is not None
        return middle, end

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        layer, context, p, seeds, recompute, has_delta = ctx.known
        saved = ctx.saved_tensors
        if recompute:
            saved = layer.forward(*saved, context, p, seeds, run_mlp_down=False)[2]
        dx, rest = layer.backward(saved, *gradients, context, p, seeds, may_overwrite=recompute)
        return dx, dx if has_delta else None, None, None, None, None, None, *rest


class Decoder:
    """The decoder of a peft model, from token ids to the hidden states of the positions that have a target."""

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
        """Copy the current LoRA matrices into the product matrices. Call it after each change of the adapter."""
        for pairs in (self.lora_a_places, self.lora_b_places):
            if pairs:  # two calls: if one tensor of a call is not contiguous, torch takes its slow path for all
                torch._foreach_copy_([place for place, _ in pairs], [matrix.detach() for _, matrix in pairs])
        for scratch in self.scratch.values():
            scratch.owner = None
        torch._foreach_mul_([group.scaled_a for group in self.groups], self.groups[0].scale)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """A context in which the model's modules use the fused LoRA forward pass with the adapter's current values."""
        self.refresh()
        for group in self.groups:
            for index, layer in enumerate(group.layers):
                layer.forward = SingleLayerForward(layer, group, index)
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
        """Hidden states after the final norm (len(learned), hidden), for a batch from `packing.collate`."""
        # All tensors already have the compute dtype; autocast would only add overhead to every operation.
        with torch.autocast(input_ids.device.type, enabled=False):
            return self._hidden(input_ids, position_ids, starts, learned)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, starts: Tensor, learned: Tensor) -> Tensor:
        self.refresh()
        config = self.body.config
        x = self.body.embed_tokens(input_ids.flatten())
        cosines, sines = (part[0].contiguous() for part in self.body.rotary_emb(x[None], position_ids.flatten()[None]))
        counts = config.num_attention_heads, config.num_key_value_heads
        context = AttentionContext(*counts, attention.make_tiles(starts, len(x)), cosines, sines)
        p = self.groups[0].p if self.model.training else 0.0
        # All seeds are drawn before the first layer runs, so a recomputed activation gets the same mask.
        seeds = self._seeds()
        again = self.model.training and self.body.gradient_checkpointing
        delta = None
        for layer, own in zip(self.layers, seeds, strict=True):
            if again:  # save one tensor instead of two
                x, delta = x if delta is None else x + delta, None
            x, delta = _LayerFunction.apply(x, delta, layer, context, p, own, again, *layer.parameters())
        return self.body.norm(_SelectRows.apply(x + delta, learned))

    def skip(self) -> None:
        """Advance torch's random state as a pass does, and compute nothing."""
        self._seeds()

    def _seeds(self) -> list[list[int]]:
        return torch.randint(2**31 - 1, (len(self.layers), 4)).tolist()


def fits(model: Any) -> bool:
    """Whether `Decoder` supports a peft model.

    It needs the layers of Llama, Mistral or Qwen2, with SiLU, without a sliding window, and with input widths divisible
    by 8. All their linear layers must have LoRA with the same rank (up to MOST_RANK), scale, dropout and kind of base
    layer.
    """
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
