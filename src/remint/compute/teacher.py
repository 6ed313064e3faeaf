"""The base as a teacher: its own distribution over the next token, and the divergence of the model from it.

The base is the model itself without its adapter (self-distillation). Of each distribution the most likely tokens are
kept. All others count as one outcome together, so nothing is renormalised, and the divergence is a lower bound of the
complete one.
"""

from dataclasses import dataclass

import torch

# Tokens that are kept of a distribution. A power of two, so that a Triton program reads them at once.
TOP = 64
# The least probability of all other tokens together. float32 cannot tell less of them from rounding.
LEAST = 1e-6


@dataclass(frozen=True)
class Teacher:
    """What the base says at the `soft` positions of a batch; the `hard` ones have a target instead.

    Both are int64 and index the learned positions. `ids` (int64) and `log_probs` (fp32) have the shape (soft, TOP).
    `weight` is that of one soft position, relative to a hard one.
    """

    hard: torch.Tensor
    soft: torch.Tensor
    ids: torch.Tensor
    log_probs: torch.Tensor
    weight: float


def most_likely(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The TOP most likely tokens of each row of `logits` (N, vocabulary): ids (int64) and log-probabilities (fp32)."""
    log_probs, ids = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]), dim=-1)
    return ids, log_probs


def divergence(logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """KL(base || model) of each row (N,), in nats, for the model's `logits` (N, vocabulary) in fp32."""
    return from_log_probs(logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True), log_probs)


def from_log_probs(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The same divergence from the log-probabilities (N, TOP) that both give the base's most likely tokens."""
    probs = base.exp()
    others, others_of_model = rest(probs), rest(model.exp())
    return (probs * (base - model)).sum(-1) + others * (others.log() - others_of_model.log())


def rest(probs: torch.Tensor) -> torch.Tensor:
    """The probability of all tokens that are not among `probs` (N, TOP), at least LEAST."""
    return (1 - probs.sum(-1)).clamp_min(LEAST)
