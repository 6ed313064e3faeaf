"""The language model head and its loss, computed in chunks: the logits of all positions are never in memory at once."""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Positions per chunk: only the logits of one chunk are in memory at a time. Another value splits the sums differently
# and so changes the rounding.
ROWS = {"cpu": 512, "cuda": 4096}


def has_triton() -> bool:
    """Whether Triton is installed: torch's CUDA builds include it, except those for Windows."""
    return find_spec("triton") is not None


def head_loss(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy (nats) of the logits of `hidden` (N, width) against `targets` (N,).

    A head that is trained, has a bias or is not a plain nn.Linear goes through torch's own cross-entropy, not chunked.
    """
    if head.weight.requires_grad or type(head) is not nn.Linear or head.bias is not None:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    return _HeadLoss.apply(hidden, head.weight, targets)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy and its gradient in one pass: softmax minus one-hot, while the logits are in memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = ROWS[hidden.device.type]
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = hidden[rows] @ weight.T
            if hidden.device.type == "cuda" and has_triton():
                from remint.compute.kernels import ops

                total += ops.cross_entropy_and_grad(logits, targets[rows]).sum()
            else:
                logits = logits.float()
                total += _cross_entropy_and_grad(logits, targets[rows]).sum()
            if gradient is not None:
                gradient[rows] = logits.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def _cross_entropy_and_grad(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row (N,). Overwrites `logits` (N, vocabulary) with its gradient, softmax minus one-hot."""
    wanted = targets[:, None]
    norm = logits.logsumexp(-1, keepdim=True)
    losses = norm - logits.gather(1, wanted)
    logits.sub_(norm).exp_().scatter_add_(1, wanted, torch.full_like(norm, -1.0))
    return losses.squeeze(1)
