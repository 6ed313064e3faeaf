"""transformers' Trainer as the loop: our batches and loss go in, every finished step comes out as a call."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from remint.core import signals
from remint.core.errors import RemintError, SettingsError, got
from remint.core.paths import SCRATCH
from remint.determinism import seed_step
from remint.loss import SupervisedLoss
from remint.stages.train.group import Group, StepSum
from remint.stages.train.plan import Batches
from remint.stages.train.settings import Train


@dataclass(frozen=True)
class Finished:
    """One optimizer step's numbers; `step` counts from 1, loss is nats per supervised token."""

    step: int
    loss: float
    lr: float
    grad_norm: float


class WeightedTrainer(Trainer):
    """Trainer whose loss is a sum times a weight that the batch brings, and whose step a group of processes may share."""

    step_loss: torch.Tensor | None = None
    group: Group
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
    """Seeds each step, refuses an update that is not finite, reports each step."""

    def __init__(self, seed: int, first_step: int, on_step: Callable[[Finished], None]):
        self.seed, self.first_step, self.on_step = seed, first_step, on_step
        self.trainer: WeightedTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.global_step = self.first_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_step(self.seed)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer.step_loss is not None
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for name, value in (("loss", self.trainer.step_loss), ("gradient norm", norm)):
            if not torch.isfinite(value):
                raise RemintError(
                    f"train: step {state.global_step + 1}: the {name} is no finite number, got {value.item()}; lower train.lr "
                    "or use precision float32; nothing was updated, and the last checkpoint is good"
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "learning_rate" in logs:
            assert self.trainer.step_loss is not None
            loss = self.trainer.step_loss.item()
            self.on_step(Finished(state.global_step, loss, logs["learning_rate"], logs["grad_norm"]))


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
    on_step: Callable[[Finished], None],
    group: Group,
) -> None:
    """Run the optimizer steps that `batches` still holds; `on_step` is called after each and may raise to stop."""
    if not len(batches):
        return
    hooks = _Hooks(seed, batches.first_step, on_step)
    arguments = TrainingArguments(
        output_dir=str(SCRATCH),  # nothing is saved by the Trainer, but it makes this folder
        per_device_train_batch_size=1,  # one item of the data set is a whole micro-batch
        gradient_accumulation_steps=settings.accumulation,
        max_steps=batches.plan.steps,
        max_grad_norm=settings.clip_norm,
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataloader_num_workers=workers(),
        use_cpu=next(model.parameters()).device.type == "cpu",
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
    trainer.group, trainer.batches = group, batches
    if group.size > 1:
        trainer.total = StepSum(group, [p for p in model.parameters() if p.requires_grad])
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
