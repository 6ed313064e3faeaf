"""One training run in progress: its history, its sample answers, its saved checkpoints."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from remint.compute.generation import answer_all
from remint.compute.loss import SupervisedLoss, mean_loss
from remint.compute.packing import Document
from remint.core import manifest
from remint.core.errors import ArtefactError, Stopped, visible
from remint.core.log import Log
from remint.model import checkpoint_layout
from remint.model.libraries import get_peft_model_state_dict, set_peft_model_state_dict
from remint.model.template import Conversation
from remint.stages.train import checkpoint
from remint.stages.train.base_targets import Answers
from remint.stages.train.checkpoint import Draft
from remint.stages.train.loop import Finished, autocast, check_finite
from remint.stages.train.plan import Batches, Plan, lr_factor
from remint.stages.train.process_group import ProcessGroup
from remint.stages.train.settings import Train


@dataclass
class Recorded:
    """What a run has recorded so far. Every checkpoint holds all of it, so a resumed run has the same record."""

    history: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None


@dataclass
class Session:
    """The state of a run, and the `Watcher` of its steps."""

    model: SupervisedLoss
    tokenizer: Any
    conversation: Conversation
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    train: Train
    plan: Plan
    documents: dict[str, list[Document]]
    base_answers: Answers
    store: Path
    conditions: dict[str, Any]
    log: Log
    signals: Sequence[int]
    group: ProcessGroup
    recorded: Recorded = field(default_factory=Recorded)
    latest: dict[Path, manifest.Entry] = field(default_factory=dict)
    bar: Any = None

    def restore(self) -> int:
        """Continue from the newest complete checkpoint, if there is one. Returns the number of finished steps.

        Raises ArtefactError if there are checkpoints, but none can be used.
        """
        # One process looks for it and cleans up; the others read what it found.
        found = checkpoint.load_newest(self.store, self.conditions) if self.group.leads else None
        step = self.group.agreed(found.step if found else -1)
        if step < 0:
            return 0
        found = found or checkpoint.load(self.store / checkpoint_layout.folder_name(step))
        if found.state.keys() != vars(Recorded()).keys():
            raise ArtefactError(f"{self.store}: step {found.step} does not hold the record of a run; remove the folder")
        set_peft_model_state_dict(self.model.model, checkpoint_layout.adapter_tensors(found.tensors))
        state = checkpoint_layout.optimizer_state(found.tensors)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self._set_schedule(found.step)
        self.recorded = Recorded(**found.state)
        if self.group.leads:
            print(f"train: continuing after step {found.step} of {self.plan.steps}", flush=True)
        return found.step

    def _set_schedule(self, done: int) -> None:
        """Set the scheduler to its state after `done` steps, which depends only on their number."""
        factor = lr_factor(done, self.plan.steps, self.train.warmup_ratio, self.train.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        rates = [group["lr"] for group in self.optimizer.param_groups]
        counters = {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **counters})

    def batches(self, done: int) -> Batches:
        """The micro-batches of the steps after the first `done`."""
        return Batches(self.documents["train"], self.plan, done, self.group.rank, self.group.size)

    def token_counts(self) -> dict[str, int]:
        """Tokens and supervised tokens of one epoch, and rows of the entire run."""
        documents = self.documents["train"]
        return {
            "all": sum(len(document.ids) for document in documents),
            "supervised": sum(document.learned for document in documents),
            "rows": sum(len(batch) for batch in self.plan.micro_batches),
        }

    def begin(self, done: int) -> None:
        """Open the progress bar and log the recorded steps. Before the first step, evaluate the untrained model."""
        self.bar = tqdm(
            total=self.plan.steps,
            initial=done,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            disable=not self.group.leads,
        )
        for row in self.recorded.history:
            self.log({key: value for key, value in row.items() if key != "step"}, int(row["step"]), again=True)
        if done == 0:
            if self.group.leads:
                tqdm.write("train: evaluating the base before the first step")
            self._measure({"step": 0})

    def awaits(self, step: int) -> bool:
        """Whether this step's weights will be evaluated or saved, or a signal arrived.

        Then the next step must not begin, because it would change the weights.
        """
        return bool(self.group.agreed(len(self.signals))) or self._is_due(step)

    def record(self, finished: Finished) -> None:
        """Record one step. Evaluate and save the model when that is due. Raises Stopped if a signal arrived."""
        row = {"step": finished.step, "loss": finished.loss, "lr": finished.lr, "grad_norm": finished.grad_norm}
        speed = self.plan.tokens(finished.step - 1) / max(1e-9, finished.seconds)
        self.bar.set_postfix(
            loss=f"{finished.loss:.3f}", lr=f"{finished.lr:.1e}", tokens_per_s=f"{speed:.0f}", refresh=False
        )
        self.bar.update()
        self.log({"tokens_per_second": speed}, finished.step)
        last = finished.step == self.plan.steps
        # A thread writes the tensors, the largest part of a checkpoint, while this one evaluates the model.
        draft = self._draft(finished.step) if self._is_due(finished.step) else None
        if last or finished.step % self.train.eval_steps == 0:
            self._measure(row)
        else:
            self._note(row)
        signal = self.group.agreed(self.signals[0] if self.signals else 0) if finished.is_latest else 0
        stopping = bool(signal) and not last
        if stopping and draft is None:
            draft = self._draft(finished.step)
        if draft:
            self._finish(draft, finished.step)
        if stopping:
            raise Stopped(f"train: stopped after step {finished.step}; the same command continues there", 128 + signal)

    def end(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _note(self, row: dict[str, float]) -> None:
        self.recorded.history.append(row)
        self.log({key: value for key, value in row.items() if key != "step"}, int(row["step"]))

    def _measure(self, row: dict[str, float]) -> None:
        """Record the step with the held-out loss of the present adapter, and its answers to the sample prompts."""
        step = int(row["step"])
        held_out, control = self.documents["held_out"], self.documents["control"]
        with autocast(self.train, next(self.model.parameters()).device):
            row["held_out_loss"] = mean_loss(self.model, held_out + control, self.train.max_length, self.group.map)
        check_finite("held-out loss", row["held_out_loss"], step, self.train.precision)
        self._note(row)
        if self.recorded.best_loss is None or row["held_out_loss"] < self.recorded.best_loss:
            self.recorded.best_loss, self.recorded.best_step = row["held_out_loss"], step
        if self.group.leads:
            self._sample(step)

    def _sample(self, step: int) -> None:
        self.model.eval()
        histories = [[{"role": "user", "content": prompt}] for prompt in self.train.sample_prompts]
        # Before the first step the adapter adds zero. On a GPU, computing it would take most of the time of an answer.
        with self.model.answering(), contextlib.nullcontext() if step else self.model.model.disable_adapter():
            answers = answer_all(
                self.model.model,
                self.tokenizer,
                self.conversation,
                histories,
                self.train.sample_tokens,
                batch=8,
                unfinished="…",
            )
        tqdm.write(f"step {step}: held-out loss {self.recorded.history[-1]['held_out_loss']:.3f}")
        for prompt, answer in zip(self.train.sample_prompts, answers, strict=True):
            self.recorded.samples.append({"step": step, "prompt": prompt, "answer": answer})
            tqdm.write(f"  {prompt}\n    {' '.join(visible(answer).split())}")

    def _is_due(self, step: int) -> bool:
        """Whether a run without signals would save this step."""
        return step == self.plan.steps or not step % self.train.eval_steps or not step % self.train.save_steps

    def _draft(self, step: int) -> Draft | None:
        if not self.group.leads:
            return None
        adapter, optimizer = get_peft_model_state_dict(self.model.model), self.optimizer.state_dict()["state"]
        return Draft(self.store, step, checkpoint_layout.named_tensors(adapter, optimizer))

    def _finish(self, draft: Draft, step: int) -> None:
        self.latest = draft.finish(vars(self.recorded), self.conditions)
        # The kept steps become part of the artefact, so they must not depend on where a run was stopped.
        newest = [saved for saved in checkpoint.saved_steps(self.store) if self._is_due(saved)]
        checkpoint.prune(self.store, {*newest[-self.train.keep_checkpoints :], step, self.recorded.best_step or step})
