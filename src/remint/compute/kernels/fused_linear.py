"""Linear layers with LoRA that read one input, as one matrix product.

The low-rank activations are l = d Aᵀ, where d is the input after dropout. They are appended to the input as columns,
and B is appended to the weight. Then [x | l] [W | B]ᵀ is x Wᵀ + l Bᵀ, and the backward pass [dx | dl] = dy [W | B] is
one product as well. [x | l] is called the extended input.
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
    """A matrix that all FusedLinear of one shape share. It holds the values of `owner`, the last one that needed it."""

    matrix: Tensor
    owner: "FusedLinear | None" = None


class FusedLinear:
    """Linear layers with LoRA that read one input of K columns, as one product with N = N₁ + N₂ + … columns.

    For m layers, its matrix has the shape (N, K + m·rank): W, then each layer's B in its own rows and columns, zero
    elsewhere. Unquantized frozen weights become views of it. 4-bit weights are dequantized into a matrix of `scratch`,
    which all FusedLinear of one shape share.
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
        """A times the scale, and B, of one layer, in the compute dtype."""
        scaled_a, _ = self._places[0][index]
        return scaled_a, self.lora_b[index].to(scaled_a.dtype) if self.packed else self._places[1][index][0]

    def parameters(self) -> tuple[Tensor, ...]:
        """All A, then all B, in the order that `gradients` returns."""
        return (*self.lora_a, *self.lora_b)

    def lora_a_places(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each A: (the part of `scaled_a` that holds it, the A itself)."""
        yield from zip(self.scaled_a.split(self.rank), self.lora_a, strict=True)

    def lora_b_places(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each B: (the part of the unquantized matrix that holds it, the B itself)."""
        for index, (rows, lora_b) in enumerate(zip(self._matrix.split(self.sizes), self.lora_b, strict=True)):
            first = self.width + index * self.rank
            yield rows[:, first : first + self.rank], lora_b

    def matrix(self) -> Tensor:
        """The matrix of the product. With 4-bit weights, valid until another FusedLinear of this shape needs one."""
        if self.packed and self._scratch.owner is not self:
            self._scratch.owner = self
            ops.dequantize_into([base.weight for base in self.bases], self.lora_b, self._matrix)
        return self._matrix

    def empty_extended(self, like: Tensor) -> Tensor:
        """An uninitialized extended input with as many rows as `like` has."""
        return like.new_empty(len(like), self._matrix.shape[1])

    def __call__(self, extended: Tensor) -> Tensor:
        """The product (T, N) of `extended` (T, K + m·rank)."""
        matrix = self.matrix()
        return extended @ matrix.T if self.bias is None else torch.addmm(self.bias, extended, matrix.T)

    def backward(self, dy: Tensor) -> Tensor:
        """The gradient of the extended input (T, K + m·rank), for the gradient `dy` of the product (T, N)."""
        return dy @ self.matrix()

    def gradients(self, dy: Tensor, low_rank: Tensor, dscaled_a: Tensor) -> list[Tensor]:
        """Gradients of `parameters`, fp32.

        `low_rank` are the low-rank activations (T, m·rank); `dscaled_a` is the gradient of `scaled_a`.
        """
        columns = zip(dy.split(self.sizes, 1), low_rank.split(self.rank, 1), strict=True)
        return [
            *(dscaled_a * self.scale).split(self.rank),
            *(ops.matmul_fp32(part.T, column) for part, column in columns),
        ]


class SingleLayerForward:
    """Forward pass of one layer on its own, for generation: four operations where peft has eight."""

    def __init__(self, layer: LoraLayer, fused: FusedLinear, index: int):
        self.layer, self.fused, self.index = layer, fused, index

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer.base_layer(x)
        if self.layer.disable_adapters:
            return y
        lora_a, lora_b = self.fused.lora(self.index)
        return y + (x @ lora_a.T) @ lora_b.T
