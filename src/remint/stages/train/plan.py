"""The plan of all optimizer steps, computed before the first one, so a resumed run follows the same plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from remint.compute.packing import Batch, Document, collate, epoch_rows
from remint.stages.train.settings import Train


@dataclass(frozen=True)
class Plan:
    """All micro-batches in training order (rows of document indices), how many make a step, and tokens per document."""

    micro_batches: list[list[list[int]]]
    accumulation: int
    lengths: Sequence[int]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return math.ceil(len(self.micro_batches) / self.accumulation)

    def of_step(self, step: int) -> list[list[list[int]]]:
        """The micro-batches of optimizer step `step`, counted from 0."""
        return self.micro_batches[step * self.accumulation : (step + 1) * self.accumulation]

    def tokens(self, step: int) -> int:
        """Tokens of optimizer step `step`, counted from 0, without padding."""
        return sum(self.lengths[number] for batch in self.of_step(step) for row in batch for number in row)


def make_plan(lengths: Sequence[int], train: Train, seed: int) -> Plan:
    """The plan of all epochs. A step may span two epochs, so only the very last step can be smaller than the others."""
    rows = [
        row
        for epoch in range(train.epochs)
        for row in epoch_rows(lengths, train.max_length, train.packing, seed, epoch)
    ]
    batches = [rows[start : start + train.micro_batch] for start in range(0, len(rows), train.micro_batch)]
    return Plan(batches, train.accumulation * train.processes, lengths)


def lr_factor(step: int, steps: int, warmup_ratio: float, schedule: str) -> float:
    """Factor on the peak learning rate in optimizer step `step` (from 0) of `steps`.

    Linear warm-up over the first ceil(warmup_ratio × steps) steps, which starts above 0. Then a half cosine (Loshchilov
    and Hutter 2017) or a line that reaches 0 after the last step, or a constant.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]


class Batches(Dataset[Batch]):
    """The micro-batches that process `rank` of world size `size` computes from `first_step` on, as batches.

    The processes take the plan's micro-batches in turn, and all get the same number. A process that has none left in
    the last step gets the plan's last micro-batch again, with weight 0.

    `weight` is 1 / supervised tokens of the entire optimizer step, so every token counts the same in any micro-batch.
    """

    def __init__(self, documents: Sequence[Document], plan: Plan, first_step: int, rank: int = 0, size: int = 1):
        self._documents, self.plan, self.first_step = documents, plan, first_step
        self._rank, self._size = rank, size

    def __len__(self) -> int:
        # The last step may have fewer micro-batches than the others, so the number left after it would be negative.
        left = len(self.plan.micro_batches) - self.first_step * self.plan.accumulation
        return max(0, math.ceil(left / self._size))

    def __getitem__(self, index: int) -> Batch:
        position = self.first_step * self.plan.accumulation + index * self._size + self._rank
        last = len(self.plan.micro_batches) - 1
        batch = self.plan.micro_batches[min(position, last)]
        learned = self.learned(position // self.plan.accumulation)
        weight = torch.tensor(1 / max(1, learned) if position <= last else 0.0)
        return collate([[self._documents[number] for number in row] for row in batch]) | {"weight": weight}

    def learned(self, step: int) -> int:
        """Supervised tokens of an optimizer step."""
        return sum(
            self._documents[number].learned for batch in self.plan.of_step(step) for row in batch for number in row
        )
