"""Cross-entropy on supervised tokens only: the head never sees a prompt token, and sums are left to the caller."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from remint import kernels
from remint.packing import IGNORED, Document, collate, pack


class SupervisedLoss(nn.Module):
    """A causal language model that returns the summed loss (nats) of a packed batch instead of logits.

    The head is by far the largest matrix of a small model. Only positions with a target go through it.
    """

    def __init__(self, model: Any, fused: bool = False):
        """`fused`: with the operations of `kernels`; `model` is a peft model then."""
        super().__init__()
        self.model, self.fused = model, fused
        if fused:
            kernels.install(model)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum over all targets; the arguments are int64 of shape (rows, length), as `packing.collate` makes them."""
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        by_document = self.fused and len(input_ids) == 1 and input_ids.device.type == "cpu"
        options = {"document_lengths": _lengths(position_ids[0])} if by_document else {}
        hidden = causal.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **options
        ).last_hidden_state
        kept = labels != IGNORED
        if self.fused:
            return kernels.head_loss(hidden[kept], causal.lm_head, labels[kept])
        return F.cross_entropy(causal.lm_head(hidden[kept]).float(), labels[kept], reduction="sum")


def _lengths(positions: torch.Tensor) -> list[int]:
    """Lengths of the documents in a row, from where its positions restart."""
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    return [end - start for start, end in itertools.pairwise(starts)]


@torch.no_grad()
def mean_loss(model: SupervisedLoss, documents: Sequence[Document], max_length: int) -> float:
    """Loss per supervised token (nats) over documents no longer than `max_length`; their order does not matter."""
    where = next(model.parameters()).device
    learned = sum(doc.learned for doc in documents)
    if not learned:
        return math.nan
    was_training = model.training
    model.eval()
    total = 0.0
    for row in pack([len(doc.ids) for doc in documents], max_length):
        batch = collate([[documents[index] for index in row]])
        total += model(**{name: torch.from_numpy(array).to(where) for name, array in batch.items()}).item()
    model.train(was_training)
    return total / learned
