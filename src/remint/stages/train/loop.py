"""transformers' Trainer as the loop: our batches and loss go in, every finished step comes out as a call."""

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from remint.compute.determinism import seed_step
from remint.compute.loss import SupervisedLoss
from remint.core import signals
from remint.core.errors import RemintError, SettingsError, got
from remint.core.paths import SCRATCH
from remint.stages.train.plan import Batches
from remint.stages.train.process_group import ProcessGroup, StepSum
from remint.stages.train.settings import Train


@dataclass(frozen=True)
class Finished:
    """One optimizer step's numbers; `step` counts from 1, loss is nats per supervised token.

    `seconds` go from the end of the step before it to its own, without what the watcher made it wait for. `is_latest`: no
    later step has begun, so the weights are those that it left.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    is_latest: bool


class Watcher(Protocol):
    """Who is told of the steps."""

    def awaits(self, step: int) -> bool:
        """Whether the next step is to wait until `record` was called for this one."""

    def record(self, finished: Finished) -> None:
        """Note a step; each comes once, in order. May raise, which ends the training."""


class _Mark:
    """A moment: of the GPU, when it gets there, or of the host."""

    def __init__(self, on_gpu: bool):
        self._event = torch.cuda.Event(enable_timing=True) if on_gpu else None
        self._time = time.monotonic()
        if self._event:
            self._event.record()

    def seconds_since(self, earlier: "_Mark") -> float:
        """Waits for the GPU if need be."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


class _Numbers:
    """Loss and gradient norm of a step on their way to the host, which need not wait for them."""

    def __init__(self, step: int, lr: float, numbers: torch.Tensor, begun: _Mark):
        self.step, self.lr = step, lr
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._begun, self.ended = begun, _Mark(numbers.is_cuda)

    def finished(self, is_latest: bool) -> Finished:
        """Wait for them. Raises RemintError if one is no finite number."""
        seconds = self.ended.seconds_since(self._begun)
        loss, norm = self._numbers.tolist()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise RemintError(
                    f"train: step {self.step}: the {name} is no finite number, got {value}; lower train.lr or use precision "
                    "float32; that step changed nothing, and the last checkpoint is good"
                )
        return Finished(self.step, loss, self.lr, norm, seconds, is_latest)


class WeightedTrainer(Trainer):
    """Trainer whose loss is a sum times a weight that the batch brings, and whose step a group of processes may share."""

    step_loss: torch.Tensor | None = None
    numbers: torch.Tensor
    trained: Sequence[torch.nn.Parameter]
    bare_optimizer: torch.optim.Optimizer
    group: ProcessGroup
    batches: Batches
    total: StepSum
    computed = 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted sum of one micro-batch; the weights of a step's tokens add up to one."""
        weight = inputs.pop("weight")
        loss = model(**inputs) * weight
        self.step_loss = loss.detach() if self.step_loss is None else self.step_loss + loss.detach()
        return loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Clip; and where loss or norm is no finite number, have the optimizer leave everything as it is.

        The device decides about that: to ask it would let it run dry.
        """
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        assert self.step_loss is not None
        self.numbers = torch.stack([self.step_loss, norm])
        if self.accelerator.scaler is None:  # which would do the same
            self.bare_optimizer.found_inf = 1 - self.numbers.isfinite().all().float()  # type: ignore[attr-defined]
        return norm

    def begin_step(self, seed: int) -> None:
        """Start from the random state in which one process would compute this one's first micro-batch."""
        self.step_loss, self.computed = None, 0
        seed_step(seed, "train", self.state.global_step)
        if self.group.size > 1:
            self.model.skip(self.group.rank)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, forward and backward; in a group, one of each process."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.group.size > 1:
            self._share(len(self.batches.plan.of_step(self.state.global_step)))
        return loss

    def _share(self, micro_batches: int) -> None:
        """Add this round of the step's micro-batches; with the last one, the gradients are those of the whole step."""
        assert self.step_loss is not None
        self.total.add(self.step_loss, min(self.group.size, micro_batches - self.computed))
        self.step_loss = None
        self.computed += self.group.size
        if self.computed < micro_batches:
            self.model.skip(self.group.size - 1)
        else:
            self.step_loss = self.total.finish()


class _Hooks(TrainerCallback):
    """Seeds each step, tells the watcher of each.

    A GPU gets its next step before the last one's numbers are looked at, unless the watcher waits for them.
    """

    def __init__(self, seed: int, first_step: int, watcher: Watcher):
        self.seed, self.first_step, self.watcher = seed, first_step, watcher
        self.pending: deque[_Numbers] = deque()
        self.lr = 0.0
        self.begun: _Mark
        self.trainer: WeightedTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.global_step = self.first_step
        self.begun = _Mark(self.trainer.trained[0].is_cuda)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_step(self.seed)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lr = self.trainer.lr_scheduler.get_last_lr()[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        numbers = self.trainer.numbers
        self.pending.append(_Numbers(state.global_step, self.lr, numbers, self.begun))
        self.begun = self.pending[-1].ended
        left = 1 if _runs_ahead(numbers) and not self.watcher.awaits(state.global_step) else 0
        while len(self.pending) > left:
            self.watcher.record(self.pending.popleft().finished(is_latest=not self.pending))
        if not left:
            self.begun = _Mark(numbers.is_cuda)


def _runs_ahead(numbers: torch.Tensor) -> bool:
    """Whether a step goes on while the host does something else."""
    return numbers.is_cuda


def workers() -> int:
    """Processes that prepare batches: $REMINT_WORKERS, 0 if unset. Changes speed alone, so it is no setting."""
    given = os.environ.get("REMINT_WORKERS") or "0"
    if not (given.isdecimal() and len(given) <= 2):
        raise SettingsError(f"REMINT_WORKERS: must be between 0 and 99, {got(given)}; unset it to use none")
    return int(given)


def train_steps(
    model: SupervisedLoss,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: Batches,
    settings: Train,
    seed: int,
    watcher: Watcher,
    group: ProcessGroup,
) -> None:
    """Run the optimizer steps that `batches` still holds. The watcher has to await the last one."""
    if not len(batches):
        return
    hooks = _Hooks(seed, batches.first_step, watcher)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = trained[0].is_cuda
    arguments = TrainingArguments(
        output_dir=str(SCRATCH),  # nothing is saved by the Trainer, but it makes this folder
        per_device_train_batch_size=1,  # one item of the data set is a whole micro-batch
        gradient_accumulation_steps=settings.accumulation,
        max_steps=batches.plan.steps,
        max_grad_norm=settings.clip_norm,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        dataloader_num_workers=workers(),
        accelerator_config={"non_blocking": on_gpu},
        use_cpu=not on_gpu,
        seed=seed,
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
    )
    # One process is one GPU's: with more in sight, the Trainer would divide our micro-batches among them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=lambda items: items[0],
        optimizers=(optimizer, scheduler),
        callbacks=[hooks],
    )
    trainer.group, trainer.batches, trainer.trained, trainer.bare_optimizer = group, batches, trained, optimizer
    if group.size > 1:
        trainer.total = StepSum(group, trained)
    trainer.loss_is_scaled_for_ga = True
    trainer.remove_callback(PrinterCallback)
    hooks.trainer = trainer
    trainer.train()


@contextlib.contextmanager
def stop_signals(alone: bool = True) -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT put their number into; a second signal ends the process at once.

    A process that is not `alone` leaves that to the one that started it: a signal to all of them may reach it twice.
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
