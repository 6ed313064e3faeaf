"""The language model head and its loss, computed in chunks: the logits of all positions are never in memory at once."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from remint.compute.kernels import head_ops
from remint.compute.teacher import Teacher, divergence

# Positions per chunk: only the logits of one chunk are in memory at a time. Another value splits the sums differently
# and so changes the rounding.
ROWS = {"cpu": 512, "cuda": 4096}


def has_triton() -> bool:
    """Whether Triton is installed: torch's CUDA builds include it, except those for Windows."""
    return find_spec("triton") is not None


def head_loss(
    hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, teacher: Teacher | None = None
) -> torch.Tensor:
    """Summed loss (nats) of the logits of `hidden` (N, width): cross-entropy against `targets` (N,).

    At the positions that have a teacher, it is the weighted divergence from the teacher instead. A head that is
    trained, has a bias or is not a plain nn.Linear goes through torch's own operations, not chunked.
    """
    if head.weight.requires_grad or type(head) is not nn.Linear or head.bias is not None:
        return plain_loss(head(hidden).float(), targets, teacher)
    return _HeadLoss.apply(hidden, head.weight, targets, teacher)


def plain_loss(logits: torch.Tensor, targets: torch.Tensor, teacher: Teacher | None = None) -> torch.Tensor:
    """The same loss from logits (N, vocabulary) in fp32, by torch's own operations."""
    if teacher is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    held = divergence(logits[teacher.soft], teacher.ids, teacher.log_probs).sum()
    return F.cross_entropy(logits[teacher.hard], targets[teacher.hard], reduction="sum") + teacher.weight * held


class _HeadLoss(torch.autograd.Function):
    """The loss and its gradient in one pass, while the logits are in memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, teacher: Teacher | None) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        ops: Any = head_ops
        if in_triton := hidden.device.type == "cuda" and has_triton():
            from remint.compute.kernels import ops
        for rows, taught in _chunks(len(hidden), ROWS[hidden.device.type], teacher):
            logits = hidden[rows] @ weight.T
            logits = logits if in_triton else logits.float()
            if taught is None:
                losses = ops.cross_entropy_and_grad(logits, targets[rows])
            else:
                losses = taught.weight * ops.divergence_and_grad(logits, taught.ids, taught.log_probs)
            total += losses.sum()
            if gradient is not None:
                part = logits.to(weight.dtype) @ weight
                gradient[rows] = part if taught is None else part.mul_(taught.weight)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def _chunks(count: int, size: int, teacher: Teacher | None) -> Iterator[tuple[Any, Teacher | None]]:
    """The positions of each chunk, and the teacher of these positions if they have one."""
    if teacher is None:
        yield from ((slice(start, start + size), None) for start in range(0, count, size))
        return
    yield from ((rows, None) for rows in teacher.hard.split(size) if len(rows))
    parts = zip(teacher.soft.split(size), teacher.ids.split(size), teacher.log_probs.split(size), strict=True)
    yield from ((rows, replace(teacher, soft=rows, ids=ids, log_probs=log_probs)) for rows, ids, log_probs in parts)
