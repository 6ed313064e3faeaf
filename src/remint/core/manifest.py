"""Artefacts that are whole or absent: written beside their place, synced, renamed, with a manifest of checksums."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from remint.core.errors import ArtefactError, got, listed, no_right, no_room
from remint.core.files import is_inside, read_object
from remint.core.lock import held

NAME = "manifest.json"
# What a manifest says of a file: {"bytes": …, "sha256": …}.
Entry = Mapping[str, Any]
_FORMAT = 2
# Files hashed at the same time: hashlib lets other threads run, and one core hashes more slowly than most disks read.
_AT_ONCE = min(8, os.cpu_count() or 1)


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
def artefact(
    target: Path, kind: str, known: Mapping[str, Entry] = MappingProxyType({})
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give a new folder to fill and a dict of facts for its manifest; on success it becomes `target`, else it vanishes.

    `known` may be filled meanwhile with what `checked` has found in files that are now linked there.

    Raises ArtefactError when the disk is full, the place cannot be written, another process is at it, or something
    lies there that is no artefact; `target` then stays as it was.
    """
    draft = target.parent / f".{target.name}.draft"
    facts: dict[str, Any] = {}
    try:
        _check_place(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with held(target.parent / f".{target.name}.lock", f"is making {target}"), _fresh(draft):
            yield draft, facts
            write(draft, kind, facts, known)
            _sync_tree(draft)
            _replace(draft, target)
    except Exception as error:  # safetensors and tokenizers tell a full disk by errors of their own
        told = _explain(error, target)
        if told is None:
            raise
        raise told from error


def write(folder: Path, kind: str, facts: Mapping[str, Any], known: Mapping[str, Entry] = MappingProxyType({})) -> None:
    """Write the folder's manifest: its kind, its facts, size and sha256 of every file in it, and its own sha256.

    Files that are `known`, by their names from there, are not read again.
    """
    files = {name: found for name, found in inventory(folder, known).items() if name != NAME}
    content = {"format": _FORMAT, "kind": kind, "facts": dict(facts), "files": files}
    (folder / NAME).write_text(dump_json(content | {"sha256": digest(content)}), encoding="utf-8")


def inventory(folder: Path, known: Mapping[str, Entry] = MappingProxyType({})) -> dict[str, Entry]:
    """Size and sha256 of every file under a folder, by its name from there; those that are `known` are not read."""
    names = {path: path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()}
    found = described(path for path, name in names.items() if name not in known)
    return {name: found[path] if path in found else known[name] for path, name in names.items()}


def read(folder: Path, kind: str) -> dict[str, Any]:
    """The facts of an artefact. Raises ArtefactError if it is absent, unreadable or of another kind."""
    return _load(folder, kind)["facts"]


def verify(folder: Path, kind: str) -> dict[str, Any]:
    """The facts of an artefact after every file of it was checked. Raises ArtefactError naming each file at fault."""
    return _verified(folder, kind)["facts"]


def checked(folder: Path, kind: str, known: Mapping[Path, Entry] = MappingProxyType({})) -> dict[Path, Entry]:
    """Size and sha256 of each file of an artefact after it was checked; those that are `known` are not read.

    Raises ArtefactError naming each file at fault.
    """
    return {folder / name: found for name, found in _verified(folder, kind, known)["files"].items()}


def _verified(folder: Path, kind: str, known: Mapping[Path, Entry] = MappingProxyType({})) -> dict[str, Any]:
    content = _load(folder, kind)
    faults = list(differences(folder, content["files"], known))
    if faults:
        raise ArtefactError(*listed(f"{fault}; `dvc repro` makes it again" for fault in faults))
    return content


def artefact_digest(folder: Path, kind: str) -> str:
    """One digest that stands for all files and facts of an artefact."""
    return digest(_load(folder, kind))


def differences(
    folder: Path, files: Mapping[str, Entry], known: Mapping[Path, Entry] = MappingProxyType({})
) -> Iterator[str]:
    """Say for each file how it differs from what is recorded: missing, other content, not recorded."""
    paths = {name: folder / name for name in files}
    there = [path for path in paths.values() if path.is_file() and not path.is_symlink()]
    present = described(path for path in there if path not in known)
    present |= {path: known[path] for path in there if path in known}
    for name, recorded in files.items():
        path = paths[name]
        if path.is_symlink():
            yield f"{path}: is a link to elsewhere; set DVC's cache.type to reflink,copy"
        elif path not in present:
            yield f"{path}: missing, recorded are {_describe(recorded)}"
        elif (found := present[path]) != recorded:
            yield f"{path}: content differs, {_describe(found)} instead of {_describe(recorded)}"
    all_files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    surplus = described(all_files[name] for name in sorted(all_files.keys() - set(files) - {NAME}))
    for path, found in surplus.items():
        yield f"{path}: is not part of the artefact, {_describe(found)}"


def described(paths: Iterable[Path]) -> dict[Path, Entry]:
    """Size and sha256 of each file, in their order."""
    files = list(paths)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        digests = list(pool.map(file_digest, files))
    return {path: {"bytes": path.stat().st_size, "sha256": found} for path, found in zip(files, digests, strict=True)}


def _describe(facts: Entry) -> str:
    return f"{facts['bytes']} bytes of sha256 {facts['sha256'][:12]}…"


def _load(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / NAME
    if not path.exists():
        raise ArtefactError(f"{folder}: no {NAME} there; make it with `dvc repro`")
    content = read_object(path)
    if content.get("format") != _FORMAT or content.get("kind") != kind:
        found = f"{content.get('kind')} of format {content.get('format')}"
        raise ArtefactError(f"{folder}: must be a {kind} of format {_FORMAT}, {got(found)}; make it with `dvc repro`")
    recorded = content.pop("sha256", None)
    if digest(content) != recorded:
        raise ArtefactError(
            f"{path}: content differs, sha256 {digest(content)[:12]}… instead of {str(recorded)[:12]}…; "
            "make it again with `dvc repro`"
        )
    files, facts = content.get("files"), content.get("facts")
    if not isinstance(facts, dict) or not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise ArtefactError(f"{path}: does not list files of {folder} with their sizes; make it again with `dvc repro`")
    return content


def _is_entry(entry: tuple[str, Any]) -> bool:
    """Whether a manifest's line names a file inside its folder, with a size and a sha256."""
    name, recorded = entry
    return (
        is_inside(name)
        and isinstance(recorded, dict)
        and type(recorded.get("bytes")) is int
        and isinstance(recorded.get("sha256"), str)
    )


def _check_place(target: Path) -> None:
    """Refuse to replace what no stage has made: a wrong value under `paths` must not cost a folder of the user's."""
    if target.is_dir() and not (target / NAME).exists() and any(target.iterdir()):
        raise ArtefactError(f"{target}: holds files of no artefact, which would be lost; move them or change `paths`")


@contextlib.contextmanager
def _fresh(draft: Path) -> Iterator[None]:
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        # Safetensors writes files that only their owner may read; folders would be as the user's umask is.
        path.chmod(0o755 if path.is_dir() else 0o644)
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
    try:
        draft.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _explain(error: Exception, target: Path) -> ArtefactError | None:
    if no_room(error):
        free = shutil.disk_usage(target.parent).free // 2**20
        return ArtefactError(
            f"{target}: the disk is full ({free} MiB free); free space and run again, nothing was replaced"
        )
    if isinstance(error, OSError) and no_right(error):
        return ArtefactError(f"{target}: cannot be written ({error.strerror}); make {target.parent} writable")
    return None
