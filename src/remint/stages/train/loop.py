"""The training loop. `train_steps` is all of it.

An optimizer step: set the seed, run forward and backward of each micro-batch, clip the gradients, update, report.
"""

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import DataLoader

from remint.compute.determinism import seed_step
from remint.compute.loss import SupervisedLoss
from remint.compute.packing import Batch
from remint.core import signals
from remint.core.errors import RemintError, SettingsError, got
from remint.model.loading import TORCH_DTYPES
from remint.stages.train.plan import Batches
from remint.stages.train.process_group import ProcessGroup, StepSum
from remint.stages.train.settings import Train


def train_steps(
    model: SupervisedLoss,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: Batches,
    settings: Train,
    seed: int,
    watcher: "Watcher",
    group: ProcessGroup,
) -> None:
    """Run the optimizer steps that remain in `batches`, and report each to `watcher`.

    `optimizer` must be torch's fused AdamW, which reads `found_inf` on the device. `watcher` must await the last
    step, or it would not be reported. Raises RemintError if a loss or gradient norm is not finite.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    loader = DataLoader(batches, batch_size=None, num_workers=workers(), pin_memory=device.type == "cuda")
    micro_batches = iter(loader)
    # Scales the loss so that small float16 gradients do not vanish. The factors are powers of two, so scaling rounds
    # nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
    step_sum = StepSum(group, trained) if group.size > 1 else None
    reports = _Reports(watcher, device, settings.precision)

    for step in range(batches.first_step, batches.plan.steps):
        model.train()  # the watcher may have evaluated in between
        seed_step(seed, "train", step)
        if step_sum is None:
            loss = torch.zeros((), device=device)
            for _ in batches.plan.of_step(step):
                loss += _backward(model, next(micro_batches), settings, scaler)
        else:
            loss = _shared(model, micro_batches, len(batches.plan.of_step(step)), settings, scaler, step_sum, group)

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        numbers = torch.stack([loss, norm])
        if not scaler.is_enabled():
            # If loss or norm is not finite, the optimizer changes nothing. Reading them here would stall a GPU.
            optimizer.found_inf = 1 - numbers.isfinite().all().float()  # type: ignore[attr-defined]
        lr = float(scheduler.get_last_lr()[0])
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        reports.add(step + 1, lr, numbers)


def _backward(model: SupervisedLoss, batch: Batch, settings: Train, scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Forward and backward pass of one micro-batch. Returns its part of the step's loss (nats per supervised token).

    `weight` makes the loss of a step a mean over its supervised tokens: the weights of all its tokens add up to one.
    """
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    weight = inputs.pop("weight")
    with autocast(settings, device):
        loss = model(**inputs)
    loss = loss.float() * weight
    scaler.scale(loss).backward()
    return loss.detach()


def _shared(
    model: SupervisedLoss,
    micro_batches: Iterator[Batch],
    count: int,
    settings: Train,
    scaler: torch.amp.GradScaler,
    step_sum: StepSum,
    group: ProcessGroup,
) -> torch.Tensor:
    """Compute the `count` micro-batches of a step, which the processes take in turn. Returns the step's loss.

    Loss and gradients have the same bits as in a single process. For the same dropout masks, a process also draws the
    seeds of the micro-batches that the others compute.
    """
    model.skip(group.rank)
    for first in range(0, count, group.size):
        if first:
            model.skip(group.size - 1)
        loss = _backward(model, next(micro_batches), settings, scaler)
        step_sum.add(loss, min(group.size, count - first))
    return step_sum.finish()


def autocast(settings: Train, device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision: products in `train.precision`, the adapter's parameters and sums in float32."""
    return torch.autocast(device.type, TORCH_DTYPES[settings.precision], enabled=settings.precision != "float32")


@dataclass(frozen=True)
class Finished:
    """The numbers of one optimizer step. `step` counts from 1; `loss` is in nats per supervised token.

    `seconds` is the time since the end of the previous step, without the time that the watcher took. `is_latest` means
    that no later step has begun, so the model has the weights of this step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    is_latest: bool


class Watcher(Protocol):
    """Receives the numbers of each optimizer step."""

    def awaits(self, step: int) -> bool:
        """Whether the next step must not begin before `record` has returned for this one."""

    def record(self, finished: Finished) -> None:
        """Record one step. It is called once per step, in order. An exception ends the training."""


class _Reports:
    """Reports finished steps to the watcher.

    On a GPU, the next step is launched before the numbers of this one are read. Otherwise the GPU would be idle.
    """

    def __init__(self, watcher: Watcher, device: torch.device, precision: str):
        self._precision = precision
        self._watcher, self._on_gpu, self._runs_ahead = watcher, device.type == "cuda", _runs_ahead(device)
        self._pending: deque[_Numbers] = deque()
        self._begun = _Mark(self._on_gpu)

    def add(self, step: int, lr: float, numbers: torch.Tensor) -> None:
        """Take a step's loss and gradient norm (`numbers`), and report the steps before it.

        The step itself is reported now on a CPU or if the watcher awaits it, else together with the next one.
        """
        self._pending.append(_Numbers(step, lr, numbers, self._begun))
        self._begun = self._pending[-1].ended
        left = 1 if self._runs_ahead and not self._watcher.awaits(step) else 0
        while len(self._pending) > left:
            numbers_of_step = self._pending.popleft()
            self._watcher.record(numbers_of_step.finished(not self._pending, self._precision))
        if not left:
            self._begun = _Mark(self._on_gpu)


def _runs_ahead(device: torch.device) -> bool:
    """Whether the device computes a step while the host already launches the next one."""
    return device.type == "cuda"


class _Mark:
    """A point in time: on a GPU the moment when its stream reaches this point, else the host's clock."""

    def __init__(self, on_gpu: bool):
        self._event = torch.cuda.Event(enable_timing=True) if on_gpu else None
        self._time = time.monotonic()
        if self._event:
            self._event.record()

    def seconds_since(self, earlier: "_Mark") -> float:
        """Seconds between two marks; waits until the GPU has reached this one."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


class _Numbers:
    """Loss and gradient norm of a step on their way to the host, copied without a host-device sync."""

    def __init__(self, step: int, lr: float, numbers: torch.Tensor, begun: _Mark):
        self.step, self.lr = step, lr
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._begun, self.ended = begun, _Mark(numbers.is_cuda)

    def finished(self, is_latest: bool, precision: str) -> Finished:
        """Wait for the numbers and return them. Raises RemintError if one is not finite."""
        seconds = self.ended.seconds_since(self._begun)
        loss, norm = self._numbers.tolist()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            check_finite(name, value, self.step - 1, precision)
        return Finished(self.step, loss, self.lr, norm, seconds, is_latest)


def check_finite(name: str, value: float, updates: int, precision: str) -> None:
    """Raise RemintError if a number that was computed after `updates` optimizer updates is not finite.

    Before the first update, the weights are those of the base, so no setting of the optimizer can be the cause.
    """
    if math.isfinite(value):
        return
    if updates:
        raise RemintError(
            f"train: step {updates + 1}: the {name} is not finite, got {value}; lower train.lr or use precision "
            "float32; that step changed nothing, and the last checkpoint is good"
        )
    cause = "the base cannot compute the training conversations"
    cure = "get the base model again, or look for conversations without sense"
    if precision != "float32":
        cause, cure = f"{cause} in {precision}", f"set train.precision to float32; if that fails, {cure}"
    raise RemintError(f"train: the {name} is not finite before the first update, got {value}: {cause}; {cure}")


def workers() -> int:
    """Number of processes that prepare batches: $REMINT_WORKERS, or 0 if unset.

    It changes only the speed, so it is not in params.yaml. Raises SettingsError if it is not between 0 and 99.
    """
    given = os.environ.get("REMINT_WORKERS") or "0"
    if not (given.isdecimal() and len(given) <= 2):
        raise SettingsError(f"REMINT_WORKERS: must be between 0 and 99, {got(given)}; unset it to use none")
    return int(given)


@contextlib.contextmanager
def stop_signals(alone: bool = True) -> Iterator[Sequence[int]]:
    """Yield a list to which SIGTERM, SIGINT and SIGHUP append their number. A second signal ends the process at once.

    A process that is not `alone`, but one of several, ignores a second signal: a signal sent to all processes may reach
    it twice. The process that started it ends it.
    """
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        if received:
            if alone:
                raise SystemExit(128 + number)
            return
        received.append(number)
        print("\nstopping after this step; a second signal stops at once", flush=True)

    with signals.handled(receive):
        yield received
