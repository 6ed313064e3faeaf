"""A Llama-like decoder with LoRA on all its linear layers, as three operations and an attention a layer, for a GPU.

Layers that read one input become one product, and LoRA becomes a part of it: with the low-rank activations l = d Aᵀ (d is
the input after dropout) in further columns of the input and B in further columns of the weight, [x | l] [W | B]ᵀ is
x Wᵀ + l Bᵀ, and its backward pass [dx | dl] = dy [W | B] is one product as well. Between the products stand the operations of
`ops`. What a backward pass needs is computed or drawn again where that takes no pass of its own over memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from remint.kernels import attention, ops

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Scratch:
    """A matrix that groups of one shape share, and the group whose values are in it."""

    matrix: Tensor
    owner: "Group | None" = None


class Group:
    """Linear layers with LoRA that read one input of K columns, as one product of N = N₁ + N₂ + … columns.

    Its matrix is (N, K + m·rank) for m layers: W, then each layer's B in its own rows and columns, zero elsewhere. Frozen
    weights in full size become views of it; 4-bit ones are unpacked into `scratch`, which groups of one shape share.
    """

    def __init__(self, layers: Sequence[LoraLayer], scratch: dict[tuple[int, int], Scratch], dtype: torch.dtype):
        (name,) = layers[0].active_adapters
        self.bases: list[Any] = [layer.base_layer for layer in layers]
        self.down = [layer.lora_A[name].weight for layer in layers]
        self.up = [layer.lora_B[name].weight for layer in layers]
        self.scale: float = layers[0].scaling[name]
        self.p: float = getattr(layers[0].lora_dropout[name], "p", 0.0)
        self.width, self.rank = self.bases[0].in_features, len(self.down[0])
        self.sizes = [base.out_features for base in self.bases]
        shape = (sum(self.sizes), self.width + len(layers) * self.rank)
        self.packed = isinstance(self.bases[0], Linear4bit)
        where = self.down[0].device
        if self.packed:
            if shape not in scratch:
                scratch[shape] = Scratch(torch.zeros(shape, dtype=dtype, device=where))
            self._scratch = scratch[shape]
            self._matrix = self._scratch.matrix
        else:
            self._matrix = torch.zeros(shape, dtype=dtype, device=where)
            for base, rows in zip(self.bases, self._matrix.split(self.sizes), strict=True):
                rows[:, : self.width] = base.weight
                base.weight = nn.Parameter(rows[:, : self.width], requires_grad=False)
        self.low = torch.empty(len(layers) * self.rank, self.width, dtype=dtype, device=where)
        biases = [b.bias if b.bias is not None else torch.zeros(b.out_features, device=where) for b in self.bases]
        self.bias = torch.cat(biases).to(dtype) if any(b.bias is not None for b in self.bases) else None

    def parameters(self) -> tuple[Tensor, ...]:
        """All A, then all B, in the order of their gradients."""
        return (*self.down, *self.up)

    def lows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Where each A belongs in `low`, and A."""
        yield from zip(self.low.split(self.rank), self.down, strict=True)

    def ups(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Where each B belongs in a matrix of full size, and B."""
        for index, (rows, up) in enumerate(zip(self._matrix.split(self.sizes), self.up, strict=True)):
            first = self.width + index * self.rank
            yield rows[:, first : first + self.rank], up

    def matrix(self) -> Tensor:
        """The product's matrix, good until another group of this shape is asked for its own."""
        if self.packed and self._scratch.owner is not self:
            self._scratch.owner = self
            ops.unpacked([base.weight for base in self.bases], self.up, self._matrix)
        return self._matrix

    def wide(self, like: Tensor) -> Tensor:
        """An unfilled input of the product for as many rows as `like` has."""
        return like.new_empty(len(like), self._matrix.shape[1])

    def __call__(self, wide: Tensor) -> Tensor:
        """The product (T, N) of `wide` (T, K + m·rank)."""
        matrix = self.matrix()
        return wide @ matrix.T if self.bias is None else torch.addmm(self.bias, wide, matrix.T)

    def back(self, dy: Tensor) -> Tensor:
        """The gradient of `wide`."""
        return dy @ self.matrix()

    def gradients(self, dy: Tensor, low: Tensor, dlow: Tensor) -> list[Tensor]:
        """Gradients of `parameters`, fp32; `low` are the last columns of `wide`, `dlow` is the gradient of `self.low`."""
        columns = zip(dy.split(self.sizes, 1), low.split(self.rank, 1), strict=True)
        return [*(dlow * self.scale).split(self.rank), *(ops.product(part.T, column) for part, column in columns)]


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
        self.qkv = Group([own.q_proj, own.k_proj, own.v_proj], scratch, dtype)
        self.out = Group([own.o_proj], scratch, dtype)
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj], scratch, dtype)
        self.down = Group([mlp.down_proj], scratch, dtype)
        self.scale = own.scaling

    def groups(self) -> tuple[Group, ...]:
        """All products of the layer."""
        return self.qkv, self.out, self.gate_up, self.down

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
        total, rstd, qkv_low = ops.normed(x, delta, first.weight, eps, wide, self.qkv.low, p, seeds[0])
        qkv = heads.turn(self.qkv(wide))
        mixed, norms = attention.mixed(qkv, heads.tiles, heads.heads, heads.kv_heads, self.scale)
        wide = self.out.wide(x)
        out_low = ops.copied(mixed, wide, self.out.low, p, seeds[1])
        delta = self.out(wide)
        wide = self.gate_up.wide(x)
        eps = second.variance_epsilon
        middle, middle_rstd, both_low = ops.normed(
            total, delta, second.weight, eps, wide, self.gate_up.low, p, seeds[2]
        )
        both = self.gate_up(wide)
        wide = self.down.wide(x)
        down_low = ops.gated(both, wide, self.down.low, p, seeds[3])
        kept = total, rstd, qkv_low, qkv, mixed, norms, out_low, middle, middle_rstd, both_low, both, down_low
        return middle, self.down(wide) if is_last else None, kept

    def backward(
        self, kept: Sequence[Tensor], dmiddle: Tensor, dend: Tensor, heads: Heads, p: float, seeds: Sequence[int],
        is_once: bool,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Gradients of x + delta and of `parameters`; with `is_once` nobody reads `kept` again, so it may be written to."""
        total, rstd, qkv_low, qkv, mixed, norms, out_low, middle, middle_rstd, both_low, both, down_low = kept
        first, second = self.norms
        dwide = self.down.back(dend)
        dboth, dlow = ops.gated_back(dwide, self.down.low, both, p, seeds[3], both if is_once else None)
        down = self.down.gradients(dend, down_low, dlow)
        dwide = self.gate_up.back(dboth)
        dmiddle, dlow = ops.normed_back(
            dwide, self.gate_up.low, middle, middle_rstd, second.weight, dmiddle, p, seeds[2]
        )
        gate_up = self.gate_up.gradients(dboth, both_low, dlow)
        dwide = self.out.back(dmiddle)
        dmixed, dlow = ops.copied_back(dwide, self.out.low, mixed, p, seeds[1])
        out = self.out.gradients(dmiddle, out_low, dlow)
        dqkv = attention.mixed_back(dmixed, qkv, mixed, norms, heads.tiles, heads.heads, heads.kv_heads, self.scale)
        dqkv = heads.turn(dqkv, backward=True)
        dwide = self.qkv.back(dqkv)
        dx, dlow = ops.normed_back(dwide, self.qkv.low, total, rstd, first.weight, dmiddle, p, seeds[0])
        return dx, [*self.qkv.gradients(dqkv, qkv_low, dlow), *out, *gate_up, *down]


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
        self.lows = [pair for group in self.groups for pair in group.lows()]
        self.ups = [pair for group in self.groups if not group.packed for pair in group.ups()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the present values of the adapter to their places."""
        for pairs in (self.lows, self.ups):
            if pairs:  # apart, because torch takes the slow way for all if one is no contiguous piece of memory
                torch._foreach_copy_([place for place, _ in pairs], [matrix.detach() for _, matrix in pairs])
        for scratch in self.scratch.values():
            scratch.owner = None
        torch._foreach_mul_([group.low for group in self.groups], self.groups[0].scale)

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
    linears = [getattr(layer.self_attn, name) for layer in layers for name in _ATTENTION]
    linears += [getattr(layer.mlp, name) for layer in layers for name in _MLP]
    if not all(isinstance(linear, LoraLayer) and len(linear.active_adapters) == 1 for linear in linears):
        return False
    shapes = {
        (linear.r[name], linear.scaling[name], getattr(linear.lora_dropout[name], "p", 0.0), type(linear.base_layer))
        for linear in linears
        for name in linear.active_adapters
    }
    widths = {linear.base_layer.in_features % ops.GROUP for linear in linears}
    gate = getattr(config, "hidden_act", "")
    return len(shapes) == 1 and widths == {0} and gate == "silu" and not getattr(config, "sliding_window", None)
