"""Compares what an artefact was made with, by its manifest, with params.yaml, conf/, the code, and dvc.lock."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from remint.core import manifest
from remint.core.draft import LOCK as DRAFT_LOCK
from remint.core.draft import check_place, hidden
from remint.core.errors import ArtefactError, RemintError
from remint.core.lock import is_free
from remint.core.paths import CONF, MADE_BY, PARAMS, SCRATCH, Paths
from remint.runner import pipeline, preflight
from remint.runner.config import compose_raw, load_yaml, place_of

LOCK = Path("dvc.lock")
# In the folder of an unfinished training.
TRAINING_LOCK = "lock"


def check(stage: str) -> None:
    """Compare the artefact of a stage with the present settings, conf/ files, code and inputs.

    Raises ArtefactError that lists what differs. An absent artefact is no fault.
    """
    place: Path = getattr(Paths(), MADE_BY[stage])
    made = _made_with(stage)
    if faults := [*_from_present(stage, made)] if made else []:
        raise ArtefactError(*(f"{place}: {fault}; `make repro` makes it again, or undo the change" for fault in faults))


def verify(stage: str) -> None:
    """Check that a stage wrote all that is in its place. Raises ArtefactError. An absent artefact is no fault."""
    place: Path = getattr(Paths(), MADE_BY[stage])
    check_place(place, MADE_BY[stage])
    if (place / manifest.NAME).exists():
        manifest.verify(place, MADE_BY[stage])


def check_lock(stage: str) -> None:
    """Compare the artefact of a stage with the settings that dvc.lock records. Raises ArtefactError."""
    place: Path = getattr(Paths(), MADE_BY[stage])
    entry = (load_yaml(LOCK).get("stages") or {}).get(stage) if LOCK.is_file() else None
    if entry is None or (made := _made_with(stage)) is None:
        return
    cure = f"make it again with `dvc repro --force --single-item {stage}`"
    if faults := [*differing(made["settings"], locked_settings(entry.get("params", {})), str(LOCK))]:
        raise ArtefactError(*(f"{place}: {fault}; {cure}" for fault in faults))


def differing(made: Mapping[str, Any], recorded: Mapping[str, Any], where: str) -> Iterator[str]:
    """One line for each setting that has another value in `recorded` than the artefact was made with."""
    flat = dict(manifest.flat(made))
    for name, value in manifest.flat(recorded):
        if name in flat and not _equal(flat[name], value):
            yield f"was made with {name} {flat[name]!r}, {where} has {value!r}"


def locked_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the `params` of an entry of dvc.lock, by section as a stage composes them."""
    sections = dict(params.get(str(PARAMS), {}))
    for file, values in params.items():
        if Path(file).parent.parent == CONF:
            sections[Path(file).parent.name] = values
    return sections


def _made_with(stage: str) -> dict[str, Any] | None:
    """Settings, dependencies and source files in the manifest of a stage's artefact; None if there is no artefact."""
    kind = MADE_BY[stage]
    place: Path = getattr(Paths(), kind)
    if not (place / manifest.NAME).exists():
        return None
    facts = manifest.read(place, kind)
    found = facts.get("made_by")
    made = found.get(stage) if isinstance(found, dict) else None
    if not isinstance(made, dict) or not isinstance(made.get("settings"), dict):
        raise ArtefactError(f"{place}: does not record what it was made with; make it again with `dvc repro`")
    return {**made, "sources": facts.get("sources")}


def _from_present(stage: str, made: Mapping[str, Any]) -> Iterator[str]:
    now = pipeline.plain(compose_raw(preflight.declared_settings(stage)))
    flat, present = dict(manifest.flat(made["settings"])), dict(manifest.flat(now))
    for name in sorted({*flat, *present}):
        if not _equal(flat.get(name), present.get(name)):
            where = place_of(name).removeprefix("in ")
            yield f"was made with {name} {flat.get(name)!r}, {where} has {present.get(name)!r}"
    if "dependencies" in made:
        files, there = made["dependencies"], pipeline.checksums(stage)
    else:  # of a data set or base, whose bytes do not depend on how the code is written
        files = made.get("sources") or {}
        there = {name: manifest.file_digest(Path(name)) for name in files if Path(name).is_file()}
    changed = [name for name in sorted({*files, *there}) if files.get(name) != there.get(name)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        yield f"was made with another {', '.join(changed[:3])}{more}"


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other) or str(one) == str(other)


def tidy(stage: str) -> None:
    """Remove what killed runs of a stage left, now that its artefact is there. Another run's folders stay.

    DVC may take a result from its run cache instead of running the stage again, which would clear this away.
    """
    kind = MADE_BY[stage]
    place: Path = getattr(Paths(), kind)
    locks = [hidden(place) / DRAFT_LOCK]
    if stage == "train":
        fingerprint = manifest.read(place, kind).get("origin", {}).get("fingerprint")
        locks += [SCRATCH / "train" / fingerprint / TRAINING_LOCK] if isinstance(fingerprint, str) else []
    for lock in locks:
        if is_free(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)


if __name__ == "__main__":  # started by the guard in DVC's process, before DVC records the stage
    try:
        verify(sys.argv[1])
        check(sys.argv[1])
        tidy(sys.argv[1])
    except RemintError as error:
        sys.exit(str(error))
