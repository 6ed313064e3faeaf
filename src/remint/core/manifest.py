"""The manifest of an artefact: what it is, what it was made from, and size and sha256 of each of its files."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from remint.core.errors import ArtefactError, got, listed
from remint.core.files import check_folder, is_inside, read_object

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


def read_files(folder: Path) -> dict[str, Entry]:
    """Size and sha256 of the files of an artefact, by name, as its manifest lists them. Raises ArtefactError."""
    kind = read_object(folder / NAME).get("kind")
    return _load(folder, str(kind))["files"]


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
    damaged, surplus = (
        list(lines) for lines in (_damaged(folder, content["files"], known), _surplus(folder, content["files"]))
    )
    if damaged or surplus:
        faults = [f"{fault}; make it again with `dvc repro`" for fault in damaged]
        raise ArtefactError(*listed([*faults, *(f"{fault}; move it away" for fault in surplus)]))
    return content


def artefact_digest(folder: Path, kind: str) -> str:
    """One digest for all files and facts of an artefact, computed from its manifest."""
    return digest(_load(folder, kind))


def differences(
    folder: Path, files: Mapping[str, Entry], known: Mapping[Path, Entry] = MappingProxyType({})
) -> Iterator[str]:
    """Yield one line for each file that is a symbolic link, is missing, has other content, or is not recorded."""
    yield from _damaged(folder, files, known)
    yield from _surplus(folder, files)


def _damaged(folder: Path, files: Mapping[str, Entry], known: Mapping[Path, Entry]) -> Iterator[str]:
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


def _surplus(folder: Path, files: Mapping[str, Entry]) -> Iterator[str]:
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
    if os.path.lexists(folder):
        check_folder(folder, "move it away, then run `dvc repro`")
    if not os.path.lexists(path):
        first = "move its files away and " if _is_filled(folder) else ""
        raise ArtefactError(f"{folder}: has no {NAME}; {first}make it with `dvc repro`")
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


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
