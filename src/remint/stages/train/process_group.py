"""Processes that share the micro-batches of each step and sum the gradients in the order in which one process would."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from remint.core.errors import SettingsError, Stopped
from remint.core.launch import LOST

# torchrun's variables for a process. transformers reads some of them when it loads a model or generates, and would then
# split the model. Here, each process holds the complete model.
_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# A process may wait long while another one evaluates or generates samples, so this timeout must not end it.
# `runner/workers.py` detects a process that has ended.
_PATIENCE = timedelta(days=7)


class ProcessGroup:
    """`size` processes, of which this is number `rank`. Number 0 writes and prints; all compute the same weights."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def agreed(self, number: int) -> int:
        """The largest `number` that any process passes. Every process must call this, and gets the same result."""
        return int(self._reduced(torch.tensor(number), dist.ReduceOp.MAX))

    def map(self, compute: Callable[[Any], float], items: Sequence[Any]) -> list[float]:
        """The results of `compute` for each item, in order. The processes share the work; each gets all results."""
        values = torch.zeros(len(items), dtype=torch.float64)
        for index in range(self.rank, len(items), self.size):
            values[index] = compute(items[index])
        return self._reduced(values, dist.ReduceOp.SUM).tolist()

    def _reduced(self, values: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.size > 1:
            with _together():
                dist.all_reduce(values, operation)
        return values


class StepSum:
    """The gradients and the loss of one optimizer step, summed over micro-batches in the order of the plan.

    The same numbers added in the same order give the same bits; an all-reduce adds them in an order of its own. So each
    process owns one part of the gradients. It collects that part of every micro-batch (all-to-all) and adds them one
    after the other. At the end, the processes exchange the finished parts (all-gather). A micro-batch costs each
    process half the traffic of an all-reduce.
    """

    def __init__(self, group: ProcessGroup, parameters: Sequence[torch.nn.Parameter]):
        assert all(parameter.dtype == torch.float32 for parameter in parameters)
        self._group, self._parameters = group, parameters
        self._sizes = [*(parameter.numel() for parameter in parameters), 1]
        length = math.ceil(sum(self._sizes) / group.size) * group.size
        self._sent, self._received = (torch.zeros(length, device=parameters[0].device) for _ in range(2))
        self._part: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, present: int) -> None:
        """Add the gradients and the loss of one micro-batch of each process, then clear the gradients.

        Only the first `present` processes had a micro-batch left in this step; those of the others are ignored.
        """
        mine = [parameter.grad for parameter in self._parameters]
        gradients = [gradient.flatten() for gradient in mine if gradient is not None]
        torch.cat([*gradients, loss[None]], out=self._sent[: sum(self._sizes)])
        with _together():
            dist.all_to_all_single(self._received, self._sent)
        for part in self._received.view(self._group.size, -1)[:present]:
            self._part = part.clone() if self._part is None else self._part.add_(part)
        for parameter in self._parameters:
            parameter.grad = None

    def finish(self) -> torch.Tensor:
        """Set the gradients of the parameters to the sums. Returns the summed loss."""
        assert self._part is not None
        with _together():
            dist.all_gather_single(self._received, self._part)
        self._part = None
        *gradients, loss = self._received[: sum(self._sizes)].split(self._sizes)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return loss[0].clone()


@contextlib.contextmanager
def joined(processes: int, device: torch.device) -> Iterator[ProcessGroup]:
    """Yield the group of the processes that were started together. Raises SettingsError if they are not `processes`."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != processes:
        raise SettingsError(
            f"params: train.processes: must be {size}, the number of processes that were started, got {processes}; change it, "
            "or start `remint train` alone, which starts the others"
        )
    if size == 1:
        yield ProcessGroup()
        return
    with _together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    for name in _PLACE:
        os.environ.pop(name, None)
    try:
        yield ProcessGroup(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Raise Stopped if a communication fails: another process has ended, and it reports the reason itself."""
    try:
        yield
    except RuntimeError as error:
        raise Stopped("train: another process of this run ended; the last checkpoint is good", LOST) from error
