"""Cross-entropy summed over supervised tokens only: prompt tokens skip the head, and the caller averages."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from remint.compute import kernels
from remint.compute.packing import Batch, Document, collate, moved, pack
from remint.compute.teacher import Teacher, most_likely
from remint.core.errors import SettingsError

_CHUNK = 512  # positions whose logits are in memory at a time, where no gradient is needed


class SupervisedLoss(nn.Module):
    """A causal language model that returns the summed loss (nats) of a packed batch instead of logits.

    Only positions with a target go through the head, which is by far the largest matrix of a small model.
    """

    def __init__(self, model: Any, fused: bool = False, base_weight: float = 1.0):
        """With `fused`, the operations of `kernels` are used; `model` must be a peft model then.

        `base_weight` is the weight of a position where the model is held to the base, relative to one with a target.
        """
        super().__init__()
        self.model, self.fused, self.base_weight = model, fused, base_weight
        self.decoder = kernels.install(model) if fused else None

    def answering(self) -> AbstractContextManager[None]:
        """A context for generation: it installs the fastest LoRA forward pass for few tokens."""
        return contextlib.nullcontext() if self.decoder is None else self.decoder.answering()

    def skip(self, passes: int) -> None:
        """Advance torch's random state as `passes` training passes would, without computing them.

        Raises SettingsError if torch's own dropout is in use: then only a real pass advances the state correctly.
        """
        drawing = kernels.skippable(self.model, self.decoder)
        if drawing is None:
            raise SettingsError(
                "params: train.processes: must be 1 with torch's own dropout, because its masks would differ from "
                "those of one process; set train.kernels=fused, or train.lora.dropout=0"
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
        **base: torch.Tensor,
    ) -> torch.Tensor:
        """Loss summed over all supervised positions of a batch from `packing.collate`."""
        head = self._causal().lm_head
        targets = labels.flatten().index_select(0, learned)
        teacher = (
            Teacher(base["hard"], base["soft"], base["base_ids"], base["base_log_probs"], self.base_weight)
            if base
            else None
        )
        hidden = self._hidden(input_ids, position_ids, starts, learned)
        if self.fused:
            return kernels.head_loss(hidden, head, targets, teacher)
        return kernels.plain_loss(head(hidden).float(), targets, teacher)

    @torch.no_grad()
    def most_likely(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and log-probabilities of `teacher.most_likely` at the supervised positions of a batch, in chunks."""
        hidden = self._hidden(batch["input_ids"], batch["position_ids"], batch["starts"], batch["learned"])
        found = [most_likely(self._causal().lm_head(part)) for part in hidden.split(_CHUNK)]
        return torch.cat([ids for ids, _ in found]), torch.cat([log_probs for _, log_probs in found])

    def _causal(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, starts: torch.Tensor, learned: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (N, width) that the head gets, at the supervised positions."""
        if self.decoder is not None:
            return self.decoder(input_ids, position_ids, starts, learned)
        by_document = self.fused and len(input_ids) == 1 and input_ids.device.type == "cpu"
        options = {"document_lengths": starts.diff().tolist()} if by_document else {}
        states = self._causal().model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
        return states.last_hidden_state.flatten(0, 1)[learned]


@torch.no_grad()
def mean_loss(
    model: SupervisedLoss, documents: Sequence[Document], max_length: int, mapped: Callable[..., Iterable[float]] = map
) -> float:
    """Loss per supervised token (nats) over documents no longer than `max_length`; NaN without supervised tokens.

    The order of the documents does not matter. `mapped` has the signature of `map` and computes the losses of the rows.
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


@torch.no_grad()
def taught(
    model: SupervisedLoss,
    documents: Sequence[Document],
    max_length: int,
    rows_at_once: int = 1,
    done: Callable[[int], object] = lambda _: None,
) -> list[Document]:
    """The documents, held to what `model` says now at their supervised positions.

    Documents are no longer than `max_length`. After each `rows_at_once` packed rows, `done` is called with their number.
    """
    where = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = pack([len(doc.ids) for doc in documents], max_length)
    found: dict[int, Document] = {}
    for start in range(0, len(rows), rows_at_once):
        chosen = rows[start : start + rows_at_once]
        ids, log_probs = model.most_likely(moved(collate([[documents[i] for i in row] for row in chosen]), where))
        order = [index for row in chosen for index in row]
        counts = [documents[index].learned for index in order]
        parts = zip(order, ids.int().cpu().split(counts), log_probs.cpu().split(counts), strict=True)
        found |= {i: replace(documents[i], is_held=True, base=(a.numpy(), b.numpy())) for i, a, b in parts}
        done(len(chosen))
    model.train(was_training)
    return [found[index] for index in range(len(documents))]
