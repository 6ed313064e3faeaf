"""Train the adapter with QLoRA.

The run can be killed at any moment. The same command continues it, and the result has the same bytes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from remint.compute import determinism
from remint.compute.loss import SupervisedLoss
from remint.compute.packing import Document, cut
from remint.core import manifest
from remint.core.declared import Declared
from remint.core.draft import artefact
from remint.core.lock import in_turn, is_awaited
from remint.core.log import Log
from remint.core.paths import SCRATCH, Paths
from remint.core.settings import Runtime
from remint.model import checkpoint_layout, loading, lora, quantization, template
from remint.model.template import Conversation
from remint.stages.train import base_targets, checkpoint, footprint, loop, positions
from remint.stages.train.base_targets import (
    ANSWERS,
    Answers,
    Base,
    as_rows,
    check_answered_by,
    dump_rows,
    known_answers,
)
from remint.stages.train.plan import lr_factor, make_plan
from remint.stages.train.process_group import ProcessGroup, joined
from remint.stages.train.session import Session
from remint.stages.train.settings import Train

_LOCK = "lock"


def run(
    seed: int,
    runtime: Runtime,
    train: Train,
    paths: Paths,
    declared: Declared,
    log: Log,
) -> None:
    """Make the artefact `checkpoint`: the last steps and the best one, loss history, samples, template, manifest.

    Raises Stopped if a signal ends the run early; the same command continues it.
    """
    determinism.apply(runtime)
    dataset = manifest.verify(paths.dataset, "dataset")
    check_answered_by(paths.base, dataset)
    origin = {
        "fingerprint": declared.fingerprint,
        "identity": dataset["identity"],
        "dataset": manifest.artefact_digest(paths.dataset, "dataset"),
        "base_name": manifest.verify(paths.base, "base")["name"],
        "base": manifest.artefact_digest(paths.base, "base"),
    }
    scratch = SCRATCH / "train" / declared.fingerprint
    with (
        joined(train.processes, loading.device()) as group,
        _only_writer(scratch, train.resume) if group.leads else contextlib.nullcontext(),
        loop.stop_signals(alone=group.size == 1) as signals,
    ):
        group.agreed(0)  # the others wait for the lock, too
        session = _open(seed, train, paths, log, scratch / "steps", signals, declared.fingerprint, group)
        done = session.restore()
        try:
            session.begin(done)
            loop.train_steps(
                session.model,
                session.optimizer,
                session.scheduler,
                session.batches(done),
                train,
                seed,
                session,
                group,
            )
        finally:
            session.end()  # close the progress bar, so that an error message gets a line of its own
        if group.leads:
            _publish(session, paths, origin, declared)
            if not is_awaited(scratch / _LOCK):  # who waits finds the finished steps here
                checkpoint.discard(session.store)
    if not group.leads:
        return
    with contextlib.suppress(OSError):
        scratch.rmdir()
    best = session.recorded
    print(
        f"{paths.checkpoint}: {session.plan.steps} steps, best held-out loss {best.best_loss:.3f} at step {best.best_step}"
    )


def _open(
    seed: int,
    train: Train,
    paths: Paths,
    log: Log,
    store: Path,
    signals: Sequence[int],
    fingerprint: str,
    group: ProcessGroup,
) -> Session:
    """Load and prepare everything that a run needs before its first step. Returns the session."""
    loop.workers()  # reports a wrong REMINT_WORKERS before the model is loaded
    tokenizer = loading.load_tokenizer(paths.base)
    conversation = template.load(paths.base).with_system(train.system)
    rows = {
        name: template.read_conversations(paths.dataset / f"{name}.jsonl") for name in ("train", "held_out", "control")
    }
    answers = known_answers(rows["train"])
    documents = _documents(rows, answers, tokenizer, conversation, train, paths.base)
    if loading.device().type == "cuda":
        footprint.check_gpu_memory(paths.base, train)
    model = _model(seed, train, paths.base)
    if group.size > 1:
        model.skip(0)  # raises now if this model cannot skip dropout draws, not in the first step
    conditions = determinism.conditions(next(model.parameters()).device)
    base = Base(model, tokenizer, conversation, train, paths.base, SCRATCH / "base", conditions, group, signals)
    if asked := base.ask(rows["train"], answers):
        answers |= asked
        documents = _documents(rows, answers, tokenizer, conversation, train, paths.base)
    documents["train"] = base.teach(documents["train"])
    plan = make_plan([len(document.ids) for document in documents["train"]], train, seed)
    optimizer, scheduler = _optimizer(model, train, plan.steps)
    return Session(
        model=model,
        tokenizer=tokenizer,
        conversation=conversation,
        optimizer=optimizer,
        scheduler=scheduler,
        train=train,
        plan=plan,
        documents=documents,
        base_answers=answers,
        store=store,
        conditions={"fingerprint": fingerprint, **conditions},
        log=log,
        signals=signals,
        group=group,
    )


def _documents(
    rows: Mapping[str, Sequence[base_targets.Row]],
    answers: Answers,
    tokenizer: Any,
    conversation: Conversation,
    train: Train,
    base: Path,
) -> dict[str, list[Document]]:
    """The documents of each set, no longer than a row. Raises SettingsError if one has more positions than the base."""
    found = {
        name: cut(base_targets.documents(part, answers, tokenizer, conversation, train), train.max_length)
        for name, part in rows.items()
    }
    positions.check(found, train, loading.positions(base), tokenizer, conversation)
    return found


def _optimizer(
    model: SupervisedLoss, train: Train, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer of the adapter, and the schedule of its learning rate over `steps` steps."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=train.lr,
        betas=(train.betas[0], train.betas[1]),
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=True,  # fixed, because the fused and the looped kernel round differently; the loop needs its found_inf
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, steps, train.warmup_ratio, train.schedule)
    )


def _model(seed: int, train: Train, base: Path) -> SupervisedLoss:
    model = loading.load_model(base, loading.TORCH_DTYPES[train.precision], loading.device())
    quantization.quantize(model, train.quantization)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    determinism.seed_step(seed, "lora", 0)
    adapted = lora.add_lora(model, train.lora)
    return SupervisedLoss(adapted, fused=train.kernels == "fused", base_weight=train.distillation.weight)


@contextlib.contextmanager
def _only_writer(scratch: Path, resume: bool) -> Iterator[None]:
    """Lock the run's scratch folder for this process.

    A process of another working tree that is training the same run is waited for: its steps are then the result. Raises
    ArtefactError if a process of this working tree holds the lock.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with in_turn(scratch / _LOCK, "is training this very run"):
        if not resume:
            checkpoint.discard(scratch / "steps")
        yield


def _publish(session: Session, paths: Paths, origin: dict[str, Any], declared: Declared) -> None:
    """Make the artefact from the saved steps. They are hard-linked where the file system allows it, else copied."""
    recorded = session.recorded
    checked = checkpoint.check_saved(session.store, session.latest)
    known: dict[str, manifest.Entry] = {}
    with artefact(paths.checkpoint, "checkpoint", known, declared.check_unchanged) as (draft, facts):
        for step in checkpoint.saved_steps(session.store):
            name = checkpoint_layout.folder_name(step)
            shutil.copytree(session.store / name, draft / name, copy_function=_link)
        for path, found in checked.items():
            linked = path.relative_to(session.store)
            if path.samefile(draft / linked):
                known[linked.as_posix()] = found
        for name, rows in (("history.jsonl", recorded.history), ("samples.jsonl", recorded.samples)):
            lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
            (draft / name).write_text("".join(lines), encoding="utf-8")
        if session.base_answers:
            (draft / ANSWERS).write_text(dump_rows(as_rows(session.base_answers)), encoding="utf-8")
        session.conversation.save(draft)
        facts.update(
            origin=origin,
            made_by={"train": declared.record},
            steps={"last": session.plan.steps, "best": recorded.best_step, "kept": checkpoint.saved_steps(draft)},
            best_held_out_loss=recorded.best_loss,
            lora=asdict(session.train.lora),
            quantization=asdict(session.train.quantization),
            conditions=session.conditions,
            tokens=session.token_counts(),
            **({"base_answers": {"base": base_targets.content_digest(paths.base)}} if session.base_answers else {}),
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
