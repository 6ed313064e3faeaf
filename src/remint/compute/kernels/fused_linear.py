"""Linear layers with LoRA that read one input, as one product.

With the low-rank activations l = d Aᵀ (d is the input after dropout) in further columns of the input and B in further columns
of the weight, [x | l] [W | B]ᵀ is x Wᵀ + l Bᵀ, and its backward pass [dx | dl] = dy [W | B] is one product as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remint.compute.kernels import ops
from remint.model.libraries import Linear4bit, LoraLayer


@dataclass
class Scratch:
    """A matrix that groups of one shape share, and the group whose values are in it."""

    matrix: Tensor
    owner: "FusedLinear | None" = None


class FusedLinear:
    """Linear layers with LoRA that read one input of K columns, as one product of N = N₁ + N₂ + … columns.

    Its matrix is (N, K + m·rank) for m layers: W, then each layer's B in its own rows and columns, zero elsewhere. Frozen
    weights in full size become views of it; 4-bit ones are unpacked into `scratch`, which groups of one shape share.
    """

    def __init__(self, layers: Sequence[LoraLayer], scratch: dict[tuple[int, int], Scratch], dtype: torch.dtype):
        (name,) = layers[0].active_adapters
        self.bases: list[Any] = [layer.base_layer for layer in layers]
        self.lora_a = [layer.lora_A[name].weight for layer in layers]
        self.lora_b = [layer.lora_B[name].weight for layer in layers]
        self.scale: float = layers[0].scaling[name]
        self.p: float = getattr(layers[0].lora_dropout[name], "p", 0.0)
        self.width, self.rank = self.bases[0].in_features, len(self.lora_a[0])
        self.sizes = [base.out_features for base in self.bases]
        shape = (sum(self.sizes), self.width + len(layers) * self.rank)
        self.packed = isinstance(self.bases[0], Linear4bit)
        where = self.lora_a[0].device
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
        self.scaled_a = torch.empty(len(layers) * self.rank, self.width, dtype=dtype, device=where)
        biases = [b.bias if b.bias is not None else torch.zeros(b.out_features, device=where) for b in self.bases]
        self.bias = torch.cat(biases).to(dtype) if any(b.bias is not None for b in self.bases) else None
        self.layers, self._places = layers, (list(self.lora_a_places()), list(self.lora_b_places()))

    def lora(self, index: int) -> tuple[Tensor, Tensor]:
        """A times the scale, and B, of one layer, in the dtype that is computed in."""
        low, _ = self._places[0][index]
        return low, self.lora_b[index].to(low.dtype) if self.packed else self._places[1][index][0]

    def parameters(self) -> tuple[Tensor, ...]:
        """All A, then all B, in the order of their gradients."""
        return (*self.lora_a, *self.lora_b)

    def lora_a_places(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Where each A belongs in `low`, and A."""
        yield from zip(self.scaled_a.split(self.rank), self.lora_a, strict=True)

    def lora_b_places(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Where each B belongs in a matrix of full size, and B."""
        for index, (rows, lora_b) in enumerate(zip(self._matrix.split(self.sizes), self.lora_b, strict=True)):
            first = self.width + index * self.rank
            yield rows[:, first : first + self.rank], lora_b

    def matrix(self) -> Tensor:
        """The product's matrix, good until another group of this shape is asked for its own."""
        if self.packed and self._scratch.owner is not self:
            self._scratch.owner = self
            ops.unpacked([base.weight for base in self.bases], self.lora_b, self._matrix)
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
        """Gradients of `parameters`, fp32; `low` are the last columns of `wide`, `dlow` is the gradient of `self.scaled_a`."""
        columns = zip(dy.split(self.sizes, 1), low.split(self.rank, 1), strict=True)
        return [*(dlow * self.scale).split(self.rank), *(ops.product(part.T, column) for part, column in columns)]


class Alone:
    """Forward pass of one layer of a group by itself, to answer prompts: four operations where peft has eight."""

    def __init__(self, layer: LoraLayer, fused: FusedLinear, index: int):
        self.layer, self.fused, self.index = layer, fused, index

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer.base_layer(x)
        if self.layer.disable_adapters:
            return y
        lora_a, lora_b = self.fused.lora(self.index)
        return y + (x @ lora_a.T) @ lora_b.T
