"""Cross-entropy on supervised tokens only: the head never sees a prompt token, and sums are left to the caller."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from remint.compute import kernels
from remint.compute.packing import Document, collate, moved, pack
from remint.core.errors import SettingsError


class SupervisedLoss(nn.Module):
    """A causal language model that returns the summed loss (nats) of a packed batch instead of logits.

    The head is by far the largest matrix of a small model. Only positions with a target go through it.
    """

    def __init__(self, model: Any, fused: bool = False):
        """`fused`: with the operations of `kernels`; `model` is a peft model then."""
        super().__init__()
        self.model, self.fused = model, fused
        self.decoder = kernels.install(model) if fused else None

    def answering(self) -> AbstractContextManager[None]:
        """While prompts are answered: the quickest way to compute the adapter's part for a few tokens."""
        return contextlib.nullcontext() if self.decoder is None else self.decoder.answering()

    def skip(self, passes: int) -> None:
        """Leave torch's random state as so many passes in training would. Raises SettingsError if nothing but them can."""
        drawing = kernels.skippable(self.model, self.decoder)
        if drawing is None:
            raise SettingsError(
                "params: train.processes: must be 1 where torch's own dropout is used, for its masks would not be those of one "
                "process; set train.kernels=fused, or train.lora.dropout=0"
            )
        for _ in range(passes):
            for module in drawing:
                module.skip()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        starts: torch.Tensor,
        learned: torch.Tensor,
    ) -> torch.Tensor:
        """Sum over all targets of a batch as `packing.collate` makes it."""
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        targets = labels.flatten().index_select(0, learned)
        if self.decoder is not None:
            hidden = self.decoder(input_ids, position_ids, starts, learned)
            return kernels.head_loss(hidden, causal.lm_head, targets)
        by_document = self.fused and len(input_ids) == 1 and input_ids.device.type == "cpu"
        options = {"document_lengths": starts.diff().tolist()} if by_document else {}
        states = causal.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
        hidden = states.last_hidden_state.flatten(0, 1)[learned]
        if self.fused:
            return kernels.head_loss(hidden, causal.lm_head, targets)
        return F.cross_entropy(causal.lm_head(hidden).float(), targets, reduction="sum")


@torch.no_grad()
def mean_loss(
    model: SupervisedLoss, documents: Sequence[Document], max_length: int, mapped: Callable[..., Iterable[float]] = map
) -> float:
    """Loss per supervised token (nats) over documents no longer than `max_length`; their order does not matter.

    `mapped` computes the rows' losses, as `map` does.
    """
    where = next(model.parameters()).device
    learned = sum(doc.learned for doc in documents)
    if not learned:
        return math.nan
    was_training = model.training
    model.eval()
    total = 0.0
    rows = pack([len(doc.ids) for doc in documents], max_length)
    for loss in mapped(lambda row: model(**moved(collate([[documents[i] for i in row]]), where)).item(), rows):
        total += loss
    model.train(was_training)
    return total / learned
