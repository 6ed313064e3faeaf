"""Artefacts that are whole or absent: written beside their place, synced, renamed, with a manifest of checksums."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from remint.core.errors import ArtefactError, listed

NAME = "manifest.json"
_FORMAT = 1


def dump_json(content: object) -> str:
    """JSON whose bytes depend on the content alone: sorted keys, fixed separators, one newline at the end."""
    return json.dumps(content, ensure_ascii=False, sort_keys=True, indent=2) + "\n"


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, with dotted names."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def digest(content: object) -> str:
    """sha256 (hex) of bytes, or of the canonical JSON of anything else."""
    data = content if isinstance(content, bytes) else dump_json(content).encode()
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def artefact(target: Path, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give a new folder to fill and a dict of facts for its manifest; on success it becomes `target`, else it vanishes.

    Raises ArtefactError when the disk is full or the place cannot be written; `target` then stays as it was.
    """
    draft = target.parent / f".{target.name}.draft"
    facts: dict[str, Any] = {}
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft, facts
        write(draft, kind, facts)
        _sync_tree(draft)
        _replace(draft, target)
    except OSError as error:
        raise _explain(error, target) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """Write the folder's manifest: its kind, its facts, and size and sha256 of every file in it."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / NAME
    }
    content = {"format": _FORMAT, "kind": kind, "facts": dict(facts), "files": files}
    (folder / NAME).write_text(dump_json(content), encoding="utf-8")


def read(folder: Path, kind: str) -> dict[str, Any]:
    """The facts of an artefact. Raises ArtefactError if it is absent, unreadable or of another kind."""
    return _load(folder, kind)["facts"]


def verify(folder: Path, kind: str) -> dict[str, Any]:
    """The facts of an artefact after every file of it was checked. Raises ArtefactError naming each file at fault."""
    content = _load(folder, kind)
    faults = list(differences(folder, content["files"]))
    if faults:
        raise ArtefactError(*listed(f"{fault}; `dvc repro` makes it again" for fault in faults))
    return content["facts"]


def identity(folder: Path, kind: str) -> str:
    """One digest that stands for all files and facts of an artefact."""
    return digest(_load(folder, kind))


def differences(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Say for each file how it differs from what is recorded: missing, other size, other content, not recorded."""
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: missing"
        elif path.stat().st_size != recorded["bytes"]:
            yield f"{path}: {path.stat().st_size} bytes, recorded {recorded['bytes']}"
        elif file_digest(path) != recorded["sha256"]:
            yield f"{path}: content differs from the recorded sha256 {recorded['sha256'][:12]}…"
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(present - set(files) - {NAME}):
        yield f"{folder / name}: is not part of the artefact"


def _load(folder: Path, kind: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{folder}: no {NAME} there; make it with `dvc repro`") from None
    except ValueError as error:
        raise ArtefactError(f"{folder / NAME}: unreadable ({error}); make it again with `dvc repro`") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else content
        raise ArtefactError(f"{folder}: must be a {kind} of format {_FORMAT}, got {found!r}; make it with `dvc repro`")
    return content


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o644)  # safetensors writes files that only their owner may read
        sync(path)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(draft: Path, target: Path) -> None:
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    draft.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _explain(error: OSError, target: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free // 2**20
        return ArtefactError(
            f"{target}: the disk is full ({free} MiB free); free space and run again, nothing was replaced"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return ArtefactError(f"{target}: cannot be written ({error.strerror}); make {target.parent} writable")
    return error
