"""Judges where artefacts may be written, before anything starts: nothing that a stage did not write may be lost."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from remint.core.draft import check_place
from remint.core.errors import ArtefactError, RemintError, SettingsError, got
from remint.core.paths import MADE_BY, PIPELINE, Paths
from remint.runner import pipeline

# The only folder with files that git tracks in which a stage may write, and the hidden one that is never in git.
_WRITABLE, _HIDDEN = "data", ".scratch"
# What git tracks in this project, in case git is not available.
_OWN = ("src", "conf", "docker", "docs", "tests", "benchmarks")


def check_all() -> None:
    """Check the places of all stages, and that dvc.yaml has the same ones. Raises RemintError that lists all faults."""
    faults: list[str] = []
    for stage in pipeline.stages():
        try:
            check_outs(stage)
            check(stage, Paths())
        except RemintError as error:
            faults += error.faults
    if faults:
        raise ArtefactError(*faults)


def check(stage: str, paths: Paths) -> None:
    """Refuse a place of a stage's artefact that is in or above what git tracks, outside the repository, or not free.

    Raises RemintError that names it.
    """
    if (kind := MADE_BY.get(stage)) is None:
        return
    place: Path = getattr(paths, kind)
    if faults := [*_where_faults(place)]:
        raise SettingsError(*(f"paths.{kind}: {fault}, {got(place.as_posix())}; use data/{kind}" for fault in faults))
    check_place(place, kind)


def check_outs(stage: str) -> None:
    """Refuse outputs in dvc.yaml outside the fixed place of a stage: DVC removes them before the stage starts."""
    if (kind := MADE_BY.get(stage)) is None:
        return
    place: Path = getattr(Paths(), kind)
    for out in pipeline.outs(stage):
        if out != place and place not in out.parents:
            raise SettingsError(
                f"{PIPELINE}: stages.{stage}.outs: must be {place} or in it, got {out.as_posix()!r}; the folders of the "
                f"pipeline are fixed, `git checkout {PIPELINE}` restores it"
            )


def _where_faults(place: Path) -> Iterator[str]:
    root = Path.cwd().resolve()
    real = place.resolve()
    if root not in real.parents:
        yield "must be inside the repository, and not behind a link that leads out of it"
        return
    inside = real.relative_to(root)
    tracked = _tracked()
    top = inside.parts[0]
    if top != _WRITABLE and (top in _OWN or any(path.parts[0] == top for path in tracked)):
        yield "must not be in a folder of the project"
    elif top.startswith(".") and (top != _HIDDEN or inside == Path(_HIDDEN)):
        yield "must not be a hidden folder"
    elif any(path == inside or inside in path.parents for path in tracked):
        yield "must not hold files that git tracks"
    elif inside == Path(_WRITABLE):
        yield "must not be the folder of all data"
    elif other := [fixed for fixed in vars(Paths()).values() if fixed in inside.parents]:
        yield f"must not be inside {other[0]}, another place of the pipeline"


def _tracked() -> list[Path]:
    """Every file that git tracks; [] without git."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=False)
        return [Path(name) for name in done.stdout.decode("utf-8", "surrogateescape").split("\0") if name]
    return []
