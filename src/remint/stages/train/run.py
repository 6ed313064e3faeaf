"""Train the adapter with QLoRA.

The run can be killed at any moment. The same command continues it, and the result has the same bytes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from remint.compute import determinism
from remint.compute.loss import SupervisedLoss
from remint.compute.packing import cut, encode
from remint.core import manifest
from remint.core.declared import Declared
from remint.core.draft import artefact
from remint.core.lock import in_turn, is_awaited
from remint.core.log import Log
from remint.core.paths import SCRATCH, Paths
from remint.core.settings import Runtime
from remint.model import checkpoint_layout, loading, lora, quantization, template
from remint.stages.train import checkpoint, footprint, loop, positions
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
    origin = {
        "fingerprint": declared.fingerprint,
        "identity": manifest.verify(paths.dataset, "dataset")["identity"],
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
            _publish(session, paths.checkpoint, origin, declared)
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
    documents = {
        name: cut(
            encode(tokenizer, conversation, template.read_conversations(paths.dataset / f"{name}.jsonl")),
            train.max_length,
        )
        for name in ("train", "held_out", "control")
    }
    positions.check(documents, train, loading.positions(paths.base), tokenizer, conversation)
    plan = make_plan([len(document.ids) for document in documents["train"]], train, seed)
    if loading.device().type == "cuda":
        footprint.check_gpu_memory(paths.base, train)
    model = _model(seed, train, paths.base)
    if group.size > 1:
        model.skip(0)  # raises now if this model cannot skip dropout draws, not in the first step
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=train.lr,
        betas=(train.betas[0], train.betas[1]),
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=True,  # fixed, because the fused and the looped kernel round differently; the loop needs its found_inf
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, plan.steps, train.warmup_ratio, train.schedule)
    )
    conditions = determinism.conditions(next(model.parameters()).device)
    return Session(
        model=model,
        tokenizer=tokenizer,
        conversation=conversation,
        optimizer=optimizer,
        scheduler=scheduler,
        train=train,
        plan=plan,
        documents=documents,
        store=store,
        conditions={"fingerprint": fingerprint, **conditions},
        log=log,
        signals=signals,
        group=group,
    )


def _model(seed: int, train: Train, base: Path) -> SupervisedLoss:
    model = loading.load_model(base, loading.TORCH_DTYPES[train.precision], loading.device())
    quantization.quantize(model, train.quantization)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    determinism.seed_step(seed, "lora", 0)
    return SupervisedLoss(lora.add_lora(model, train.lora), fused=train.kernels == "fused")


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


def _publish(session: Session, target: Path, origin: dict[str, Any], declared: Declared) -> None:
    """Make the artefact from the saved steps. They are hard-linked where the file system allows it, else copied."""
    recorded = session.recorded
    checked = checkpoint.check_saved(session.store, session.latest)
    known: dict[str, manifest.Entry] = {}
    with artefact(target, "checkpoint", known, declared.check_unchanged) as (draft, facts):
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
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
