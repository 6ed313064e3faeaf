"""Artefacts that are complete or absent: written to a draft folder, synced, renamed. Nothing of the user is replaced."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from remint.core import machine, manifest
from remint.core.errors import ArtefactError, RemintError
from remint.core.files import read_object
from remint.core.lock import held

LOCK = "lock"


@contextlib.contextmanager
def artefact(
    target: Path,
    kind: str,
    known: Mapping[str, manifest.Entry] = MappingProxyType({}),
    before_publishing: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a new folder to fill and a dict of facts for its manifest.

    On success the folder is synced and replaces `target`. On any error it is removed. `before_publishing` is called
    when the folder is complete; if it raises, nothing is replaced.

    `known` holds size and sha256 of files that the caller links into the folder, as `manifest.checked` found them;
    these files are not read again. The caller may add to it until the block ends.

    Raises ArtefactError if the disk is full, `target` cannot be written, another process is making it, or it holds
    anything that no stage wrote. `target` then stays as it was.
    """
    facts: dict[str, Any] = {}
    try:
        check_place(target, kind)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _draft(target) as (new, old):
            yield new, facts
            manifest.write(new, kind, facts, known)
            _sync_tree(new)
            before_publishing()
            check_place(target, kind)
            _replace(new, target, old, kind)
    except Exception as error:  # safetensors and tokenizers report a full disk by their own exception classes
        explained = _explain(error, target)
        if explained is None:
            raise
        raise explained from error


def hidden(target: Path) -> Path:
    """The folder beside an artefact in which its draft is written."""
    return target.with_name(f".{target.name}.draft")


def check_place(place: Path, kind: str) -> None:
    """Refuse a place whose content would be lost if an artefact of `kind` were written there.

    A place is free if there is nothing, or if a stage wrote all that is there: an artefact of this kind. A damaged file
    of an artefact still counts as the artefact's. Raises ArtefactError that names what no stage wrote.
    """
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        what = "a symbolic link" if place.is_symlink() else "a file"
        raise ArtefactError(f"{place}: must be a folder or absent, got {what}; move it away, a stage writes here")
    if names := foreign(place, kind):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ArtefactError(
            f"{place}: holds what no stage wrote, and it would be lost: {shown}; move it away, a stage writes here"
        )


def check_draft(target: Path) -> None:
    """Refuse a folder in the place of an artefact's draft that no stage made. Raises ArtefactError."""
    folder = hidden(target)
    filled = folder.is_dir() and any(folder.iterdir())
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or (filled and not (folder / LOCK).exists()):
        raise ArtefactError(f"{folder}: must be absent, got what no stage wrote; move it away, a stage writes here")


def foreign(place: Path, kind: str) -> list[str]:
    """Names of the files in a folder that are not part of an artefact of `kind`, sorted; [] if there is no folder.

    If the folder has no manifest of that kind that can be read, these are all files. Raises ArtefactError if a folder
    in it cannot be read: it may hold anything.
    """
    present = set(_files_in(place)) if place.is_dir() else set()
    if not present:
        return []
    with contextlib.suppress(RemintError):
        content = read_object(place / manifest.NAME)
        if content.get("kind") == kind and isinstance(content.get("files"), dict):
            present -= {manifest.NAME, *content["files"]}
    return sorted(present)


def _files_in(place: Path) -> Iterator[str]:
    """The relative names of all that is in a folder and is no folder itself; of links to folders, too."""

    def refuse(error: OSError) -> None:
        where = os.path.relpath(error.filename, place.parent)
        raise ArtefactError(
            f"{place.parent / where}: cannot be read ({error.strerror}), so it may hold what no stage wrote; make it "
            "readable, or move it away"
        )

    for folder, folders, files in os.walk(place, onerror=refuse):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        yield from (Path(folder, name).relative_to(place).as_posix() for name in (*files, *links))


@contextlib.contextmanager
def _draft(target: Path) -> Iterator[tuple[Path, Path]]:
    """Yield an empty new folder for an artefact, and a path to which the old artefact can be moved.

    Both are in a hidden folder beside `target`, which is removed at the end. Its lock file allows one process at a
    time, and tells it from a folder of the user: what a killed run left has one.
    """
    folder = hidden(target)
    lock, new, old = folder / LOCK, folder / "new", folder / "old"
    check_draft(target)
    folder.mkdir(exist_ok=True)
    try:
        # A signal may interrupt the clearing. The lock file then stays, so that the next run knows whose the rest is.
        with held(lock, f"is making {target}", keep=lambda: new.exists() or old.exists()):
            if old.exists() and not target.exists():  # killed between the two renames of _replace
                old.rename(target)
            _clear(new, old)
            new.mkdir()
            try:
                yield new, old
            finally:
                _clear(new, old)
    finally:
        with contextlib.suppress(OSError):  # another process may have its lock there
            folder.rmdir()


def _clear(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


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


def _replace(new: Path, target: Path, old: Path, kind: str) -> None:
    """Rename `new` to `target`. What was there is moved to `old` first, and put back if that fails."""
    if target.exists():
        target.rename(old)
    try:
        if names := foreign(old, kind):  # since the last check of the place
            raise ArtefactError(f"{target}: {names[0]} appeared meanwhile, and no stage wrote it; move it away")
        new.rename(target)
    except (OSError, ArtefactError):
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)


def _explain(error: Exception, target: Path) -> ArtefactError | None:
    """The ArtefactError to raise for a limit of the machine, such as a full disk; None for any other error."""
    if isinstance(error, RemintError) or (explained := machine.explain(error, target.parent)) is None:
        return None
    what, cure = explained
    return ArtefactError(f"{target}: {what}, so nothing was replaced; {cure}")
