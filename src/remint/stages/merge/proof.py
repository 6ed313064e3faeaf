"""Compare the merged model with base + adapter on real prompts, position by position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from remint.compute.packing import IGNORED, Document


@dataclass(frozen=True)
class Closeness:
    """How close two models are on the supervised positions of some documents.

    Divergences are in nats. `agreement` is the share of positions where both rank the same token first.
    """

    mean_divergence: float
    max_divergence: float
    max_logit_difference: float
    agreement: float
    positions: int


@torch.no_grad()
def logits_at_targets(model: Any, documents: Sequence[Document]) -> list[torch.Tensor]:
    """For each document, the logits at its supervised positions: fp32, shape (positions, vocabulary)."""
    found = []
    for document in documents:
        ids = torch.from_numpy(document.ids).long()[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
        found.append(logits[torch.from_numpy(document.targets != IGNORED)])
    return found


def closeness(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Closeness:
    """Kullback-Leibler divergence (nats) of the next-token distributions, largest logit difference, top-1 agreement."""
    a, b = torch.cat(list(reference)), torch.cat(list(other))
    log_a, log_b = F.log_softmax(a, -1), F.log_softmax(b, -1)
    divergence = (log_a.exp() * (log_a - log_b)).sum(-1)
    return Closeness(
        mean_divergence=max(0.0, divergence.mean().item()),
        max_divergence=max(0.0, divergence.max().item()),
        max_logit_difference=(a - b).abs().max().item(),
        agreement=(a.argmax(-1) == b.argmax(-1)).float().mean().item(),
        positions=len(a),
    )
