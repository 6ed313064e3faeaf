"""A store of resumable checkpoints that is whole after a kill at any moment. Safetensors and JSON, never pickle."""

import errno
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from remint import manifest
from remint.core.errors import ArtefactError

KIND = "training step"
_TENSORS, _STATE = "state.safetensors", "state.json"
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run continues from: tensors of adapter and optimizer, and what was recorded so far."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def folder_name(step: int) -> str:
    """Name of a step's folder; sorts by step."""
    return f"step-{step:08d}"


def saved_steps(root: Path) -> list[int]:
    """Steps that have a folder, ascending, whole or not."""
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-????????"))


def save(root: Path, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Write one checkpoint, once a step: it appears whole under its final name or not at all.

    Raises ArtefactError on a full disk.
    """
    root.mkdir(parents=True, exist_ok=True)
    tensors = save_tensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(checkpoint.tensors.items())}
    )
    state = manifest.dump_json(checkpoint.state).encode()
    free, need = shutil.disk_usage(root).free, len(tensors) + len(state) + _SLACK_BYTES
    if free < need:
        raise _full(root, checkpoint.step, need - free)
    draft = root / f".draft-{checkpoint.step:08d}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        (draft / _TENSORS).write_bytes(tensors)
        (draft / _STATE).write_bytes(state)
        manifest.write(draft, KIND, {"step": checkpoint.step, "identity": dict(identity)})
        for path in [*draft.iterdir(), draft]:
            manifest.sync(path)
        draft.rename(root / folder_name(checkpoint.step))
        manifest.sync(root)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(root, checkpoint.step, need) from error
        raise


def prune(root: Path, keep: set[int]) -> None:
    """Remove every checkpoint not in `keep`: hidden first, so that a kill leaves nothing half-removed in sight."""
    for step in saved_steps(root):
        if step not in keep:
            hidden = root / f".removed-{step:08d}"
            shutil.rmtree(hidden, ignore_errors=True)
            (root / folder_name(step)).rename(hidden)
            shutil.rmtree(hidden)


def discard(root: Path) -> None:
    """Remove all checkpoints at once: hidden first, for half of them would look damaged to the next start."""
    hidden = root.with_name(f".{root.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    if root.exists():
        root.rename(hidden)
        shutil.rmtree(hidden)


def check(root: Path) -> None:
    """Raise ArtefactError if any checkpoint is damaged, also one that no run continues from any more."""
    try:
        for step in saved_steps(root):
            manifest.verify(root / folder_name(step), KIND)
    except ArtefactError as error:
        raise ArtefactError(f"{error.faults[0].partition(';')[0]}; remove {root} to start anew") from None


def load(folder: Path) -> Checkpoint:
    """Read one checkpoint after checking every byte of it. Raises ArtefactError."""
    facts = manifest.verify(folder, KIND)
    tensors = load_tensors((folder / _TENSORS).read_bytes())
    return Checkpoint(facts["step"], tensors, json.loads((folder / _STATE).read_text(encoding="utf-8")))


def load_newest(root: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are set aside with a word. None if there never was one.

    Raises ArtefactError if all are damaged, or if the newest whole one was made under other conditions.
    """
    for leftover in [*root.glob(".draft-*"), *root.glob(".removed-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    damaged = []
    for step in reversed(saved_steps(root)):
        folder = root / folder_name(step)
        try:
            facts = manifest.verify(folder, KIND)
        except ArtefactError as error:
            print(f"warning: passing over a damaged checkpoint: {error.faults[0]}", flush=True)
            shutil.rmtree(root / f"damaged-{step:08d}", ignore_errors=True)
            folder.rename(root / f"damaged-{step:08d}")
            damaged.append(folder.name)
            continue
        _check_identity(folder, facts["identity"], identity)
        return load(folder)
    if damaged:
        raise ArtefactError(
            f"{root}: all checkpoints are damaged ({', '.join(damaged)}); remove the folder to start anew"
        )
    return None


def _check_identity(folder: Path, recorded: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    names = sorted({*recorded, *present})
    faults = [
        f"{folder}: {name} was {recorded.get(name)!r}, is {present.get(name)!r}; continue where it was begun, or remove "
        f"{folder.parent} to start anew"
        for name in names
        if recorded.get(name) != present.get(name)
    ]
    if faults:
        raise ArtefactError(*faults)


def _full(root: Path, step: int, need: int) -> ArtefactError:
    return ArtefactError(
        f"{root}: no room for the checkpoint of step {step}, {need / 2**20:.0f} MiB more are needed; free space and run again, "
        "earlier checkpoints are intact"
    )
