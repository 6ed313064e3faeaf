"""Artefacts that are complete or absent: written to a draft folder with a manifest of checksums, synced, renamed."""

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

from remint.core.errors import ArtefactError, got, lacks_permission, lacks_space, listed
from remint.core.files import is_inside, read_object
from remint.core.lock import held

NAME = "manifest.json"
# A manifest's record of one file: {"bytes": …, "sha256": …}.
Entry = Mapping[str, Any]
_FORMAT = 2
# Number of files hashed in parallel. hashlib releases the GIL, and one core hashes more slowly than most disks read.
_AT_ONCE = min(8, os.cpu_count() or 1)


def dump_json(content: object) -> str:
    """JSON whose bytes depend only on the content: sorted keys, fixed separators, one newline at the end."""
    return json.dumps(content, ensure_ascii=False, sort_keys=True, indent=2) + "\n"


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, each with its dotted name."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def digest(content: object) -> str:
    """sha256 (hex) of bytes, or of the canonical JSON of any other value."""
    data = content if isinstance(content, bytes) else dump_json(content).encode()
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def artefact(
    target: Path, kind: str, known: Mapping[str, Entry] = MappingProxyType({})
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a new folder to fill and a dict of facts for its manifest.

    On success the folder is synced and replaces `target`. On any error it is removed.

    `known` holds size and sha256 of files that the caller links into the folder, as `checked` found them; these files
    are not read again. The caller may add to it until the block ends.

    Raises ArtefactError if the disk is full, `target` cannot be written, another process is making it, or it holds
    files that no stage made. `target` then stays as it was.
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
    except Exception as error:  # safetensors and tokenizers report a full disk by their own exception classes
        explained = _explain(error, target)
        if explained is None:
            raise
        raise explained from error


def write(folder: Path, kind: str, facts: Mapping[str, Any], known: Mapping[str, Entry] = MappingProxyType({})) -> None:
    """Write the folder's manifest: its kind, its facts, size and sha256 of every file, and the manifest's own sha256.

    Files in `known`, by their names relative to the folder, are not read again.
    """
    files = {name: found for name, found in inventory(folder, known).items() if name != NAME}
    content = {"format": _FORMAT, "kind": kind, "facts": dict(facts), "files": files}
    (folder / NAME).write_text(dump_json(content | {"sha256": digest(content)}), encoding="utf-8")


def inventory(folder: Path, known: Mapping[str, Entry] = MappingProxyType({})) -> dict[str, Entry]:
    """Size and sha256 of every file under a folder, by relative name. Files in `known` are not read."""
    names = {path: path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()}
    found = described(path for path, name in names.items() if name not in known)
    return {name: found[path] if path in found else known[name] for path, name in names.items()}


def read(folder: Path, kind: str) -> dict[str, Any]:
    """The facts of an artefact. Raises ArtefactError if it is absent, unreadable or of another kind."""
    return _load(folder, kind)["facts"]


def verify(folder: Path, kind: str) -> dict[str, Any]:
    """Check every file of an artefact and return its facts. Raises ArtefactError that names each wrong file."""
    return _verified(folder, kind)["facts"]


def checked(folder: Path, kind: str, known: Mapping[Path, Entry] = MappingProxyType({})) -> dict[Path, Entry]:
    """Check every file of an artefact and return size and sha256 by path. Files in `known` are not read.

    Raises ArtefactError that names each wrong file.
    """
    return {folder / name: found for name, found in _verified(folder, kind, known)["files"].items()}


def _verified(folder: Path, kind: str, known: Mapping[Path, Entry] = MappingProxyType({})) -> dict[str, Any]:
    content = _load(folder, kind)
    faults = list(differences(folder, content["files"], known))
    if faults:
        raise ArtefactError(*listed(f"{fault}; make it again with `dvc repro`" for fault in faults))
    return content


def artefact_digest(folder: Path, kind: str) -> str:
    """One digest for all files and facts of an artefact, computed from its manifest."""
    return digest(_load(folder, kind))


def differences(
    folder: Path, files: Mapping[str, Entry], known: Mapping[Path, Entry] = MappingProxyType({})
) -> Iterator[str]:
    """Yield one line for each file that is a symbolic link, is missing, has other content, or is not recorded."""
    paths = {name: folder / name for name in files}
    there = [path for path in paths.values() if path.is_file() and not path.is_symlink()]
    present = described(path for path in there if path not in known)
    present |= {path: known[path] for path in there if path in known}
    for name, recorded in files.items():
        path = paths[name]
        if path.is_symlink():
            yield f"{path}: is a symbolic link; set DVC's cache.type to reflink,copy"
        elif path not in present:
            yield f"{path}: missing, the record has {_describe(recorded)}"
        elif (found := present[path]) != recorded:
            yield f"{path}: content differs, {_describe(found)} instead of {_describe(recorded)}"
    all_files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    surplus = described(all_files[name] for name in sorted(all_files.keys() - set(files) - {NAME}))
    for path, found in surplus.items():
        yield f"{path}: is not part of the artefact, {_describe(found)}"


def described(paths: Iterable[Path]) -> dict[Path, Entry]:
    """Size and sha256 of each file, in the given order."""
    files = list(paths)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        digests = list(pool.map(file_digest, files))
    return {path: {"bytes": path.stat().st_size, "sha256": found} for path, found in zip(files, digests, strict=True)}


def _describe(facts: Entry) -> str:
    return f"{facts['bytes']} bytes with sha256 {facts['sha256'][:12]}…"


def _load(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of an artefact, without its own sha256. Raises ArtefactError if it is absent, changed or invalid."""
    path = folder / NAME
    if not path.exists():
        raise ArtefactError(f"{folder}: has no {NAME}; make it with `dvc repro`")
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
        raise ArtefactError(
            f"{path}: must list the files of {folder} with size and sha256; make it again with `dvc repro`"
        )
    return content


def _is_entry(entry: tuple[str, Any]) -> bool:
    """Whether an entry of a manifest names a file inside its folder and records its size and sha256."""
    name, recorded = entry
    return (
        is_inside(name)
        and isinstance(recorded, dict)
        and type(recorded.get("bytes")) is int
        and isinstance(recorded.get("sha256"), str)
    )


def _check_place(target: Path) -> None:
    """Refuse to replace a folder that no stage made: a wrong value under `paths` must not delete the user's files."""
    if target.is_dir() and not (target / NAME).exists() and any(target.iterdir()):
        raise ArtefactError(
            f"{target}: holds files that no stage made, and they would be lost; move them or change `paths`"
        )


@contextlib.contextmanager
def _fresh(draft: Path) -> Iterator[None]:
    """Make an empty draft folder. Remove it at the end if it was not renamed."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        # safetensors creates files that only the owner may read, and the modes of folders follow the user's umask.
        # Fixed modes let other users read the artefact.
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
    """Rename the draft to `target`. The old artefact is removed last, and put back if the rename fails."""
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
    """The ArtefactError to raise for a full disk or a missing permission; None for any other error."""
    if lacks_space(error):
        free = shutil.disk_usage(target.parent).free // 2**20
        return ArtefactError(
            f"{target}: the disk is full ({free} MiB free); free space and run again, nothing was replaced"
        )
    if isinstance(error, OSError) and lacks_permission(error):
        return ArtefactError(f"{target}: cannot be written ({error.strerror}); make {target.parent} writable")
    return None
