"""A store of resumable checkpoints that stays intact if the process is killed at any moment. No pickle is used."""

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from remint.core import machine, manifest
from remint.core.draft import sync
from remint.core.errors import ArtefactError, got, one_line
from remint.core.files import read_object
from remint.model.checkpoint_layout import STATE, TENSORS, folder_name

KIND = "training step"
# Room for the small files of a checkpoint, next to its tensors.
_SLACK_BYTES = 1 << 20
_INTACT = "earlier checkpoints are intact"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to resume: the tensors of adapter and optimizer, and the state recorded so far."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def saved_steps(root: Path) -> list[int]:
    """Steps that have a folder, ascending; damaged checkpoints are included."""
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob(f"step-{'[0-9]' * 8}"))


class Draft:
    """A checkpoint that is being written: a thread writes the tensors while the caller still computes the state.

    The tensors must not change meanwhile. `load_newest` removes drafts that were never finished.
    """

    def __init__(self, root: Path, step: int, tensors: Mapping[str, torch.Tensor]):
        self._root, self._step = root, step
        self._folder = root / f".draft-{step:08d}"
        self._need = _SLACK_BYTES
        pool = ThreadPoolExecutor(1)
        self._written = pool.submit(self._write, tensors)
        pool.shutdown(wait=False)

    def finish(self, state: Mapping[str, Any], conditions: Mapping[str, Any]) -> dict[Path, manifest.Entry]:
        """Write the state and the manifest. An atomic rename then makes the complete checkpoint visible.

        Returns the manifest entry of the tensors' file. Raises ArtefactError if the disk is full or not writable.
        """
        try:
            known = {TENSORS: self._written.result()}
            (self._folder / STATE).write_bytes(manifest.dump_json(state).encode())
            manifest.write(self._folder, KIND, {"step": self._step, "conditions": dict(conditions)}, known)
            for path in [*self._folder.iterdir(), self._folder]:
                if path.name != TENSORS:
                    sync(path)
            target = self._root / folder_name(self._step)
            self._folder.rename(target)
            sync(self._root)
            return {target / name: entry for name, entry in known.items()}
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            if (explained := machine.explain(error, self._root)) is None:
                raise
            if self._lack() > 0:
                raise self._full() from error
            what, cure = explained
            raise ArtefactError(f"{self._root}: {what}; {cure}, {_INTACT}") from error

    def _write(self, given: Mapping[str, torch.Tensor]) -> manifest.Entry:
        tensors = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(given.items())})
        self._root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._need += len(tensors)
        if self._lack() > 0:
            raise self._full()
        self._folder.mkdir()
        path = self._folder / TENSORS
        path.write_bytes(tensors)
        sync(path)
        return manifest.described([path])[path]

    def _full(self) -> ArtefactError:
        return ArtefactError(
            f"{self._root}: no room for the checkpoint of step {self._step}, {self._lack() / 2**20:.0f} MiB more are "
            f"needed; free space and run again, {_INTACT}"
        )

    def _lack(self) -> int:
        """Bytes that are missing on the disk; 0 or less if the disk has room."""
        return self._need - machine.free_bytes(self._root)


def prune(root: Path, keep: set[int]) -> None:
    """Remove every checkpoint not in `keep`. Each is hidden by a rename first, so a kill leaves no half-removed one."""
    for step in saved_steps(root):
        if step not in keep:
            hidden = root / f".removed-{step:08d}"
            shutil.rmtree(hidden, ignore_errors=True)
            (root / folder_name(step)).rename(hidden)
            shutil.rmtree(hidden)


def discard(root: Path) -> None:
    """Remove all checkpoints. The folder is renamed first: what a kill leaves of it must not look like damage."""
    hidden = root.with_name(f".{root.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    if root.exists():
        root.rename(hidden)
        shutil.rmtree(hidden)


def check_saved(root: Path, known: Mapping[Path, manifest.Entry]) -> dict[Path, manifest.Entry]:
    """Verify all checkpoints, even those that no run will resume from. Returns the manifest entries of their files.

    Files in `known` were written by this run and are not read again. Raises ArtefactError if a file is damaged.
    """
    found: dict[Path, manifest.Entry] = {}
    try:
        for step in saved_steps(root):
            found |= manifest.checked(root / folder_name(step), KIND, known)
        return found
    except ArtefactError as error:
        raise ArtefactError(f"{error.faults[0].partition(';')[0]}; remove {root} to start from scratch") from None


def load(folder: Path) -> Checkpoint:
    """Verify every byte of one checkpoint and read it. Raises ArtefactError if it is damaged."""
    return _read(folder)[0]


def load_newest(root: Path, conditions: Mapping[str, Any]) -> Checkpoint | None:
    """The newest intact checkpoint, or None if there is no checkpoint. Damaged ones are renamed, with a warning.

    Raises ArtefactError if all are damaged, or if the newest intact one was written under other conditions.
    """
    for leftover in [*root.glob(".draft-*"), *root.glob(".removed-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    damaged = []
    for step in reversed(saved_steps(root)):
        folder = root / folder_name(step)
        try:
            found, recorded = _read(folder)
        except ArtefactError as error:
            print(f"warning: skipping a damaged checkpoint: {error.faults[0]}", flush=True)
            shutil.rmtree(root / f"damaged-{step:08d}", ignore_errors=True)
            folder.rename(root / f"damaged-{step:08d}")
            damaged.append(folder.name)
            continue
        _check_conditions(folder, recorded, conditions)
        return found
    if damaged:
        raise ArtefactError(
            f"{root}: all checkpoints are damaged ({', '.join(damaged)}); remove the folder to start from scratch"
        )
    return None


def _read(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    facts = manifest.verify(folder, KIND)
    step, conditions = facts.get("step"), facts.get("conditions")
    if type(step) is not int or folder.name != folder_name(step) or not isinstance(conditions, dict):
        raise ArtefactError(f"{folder}: must contain the checkpoint of that step, {got(step)}; remove the folder")
    try:
        tensors = load_tensors((folder / TENSORS).read_bytes())
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ArtefactError(f"{folder / TENSORS}: unreadable ({one_line(error)}); remove the folder") from None
    return Checkpoint(step, tensors, read_object(folder / STATE)), conditions


def _check_conditions(folder: Path, recorded: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    names = sorted({*recorded, *present})
    faults = [
        f"{folder}: {name} was {recorded.get(name)!r}, is {present.get(name)!r}; resume under the old conditions, or "
        f"remove {folder.parent} to start from scratch"
        for name in names
        if recorded.get(name) != present.get(name)
    ]
    if faults:
        raise ArtefactError(*faults)
