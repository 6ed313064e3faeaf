"""The loss of the head's logits with its gradient, which overwrites the logits, by torch's operations."""

import torch

from remint.compute.teacher import from_log_probs, rest


def cross_entropy_and_grad(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row (N,). Overwrites `logits` (N, vocabulary) with its gradient, softmax minus one-hot."""
    wanted = targets[:, None]
    norm = logits.logsumexp(-1, keepdim=True)
    losses = norm - logits.gather(1, wanted)
    logits.sub_(norm).exp_().scatter_add_(1, wanted, torch.full_like(norm, -1.0))
    return losses.squeeze(1)


def divergence_and_grad(logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """`teacher.divergence` of each row (N,). Overwrites `logits` (N, vocabulary) with its gradient.

    With p of the base and q of the model, the gradient is q - p for a token of `ids` (N, TOP). For each other token it
    is q (1 - P / Q), where P and Q are the sums of p and q over all other tokens.
    """
    norm = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, ids) - norm
    probs, probs_of_model = log_probs.exp(), chosen.exp()
    others = 1 - rest(probs) / rest(probs_of_model)
    logits.sub_(norm).exp_().mul_(others[:, None]).scatter_(1, ids, probs_of_model - probs)
    return from_log_probs(chosen, log_probs)
