"""What dvc.yaml declares for a stage, and the content of it when the stage starts."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from remint.core import manifest
from remint.core.declared import Declared
from remint.core.errors import RemintError, SettingsError, got
from remint.core.files import check_file
from remint.core.manifest import NAME, file_digest
from remint.core.paths import MADE_BY, PIPELINE, Paths
from remint.runner.config import compose_raw, load_yaml, place_of

# What tells that a file may have changed, without reading it: size in bytes, time of the last change, inode.
_Stat = tuple[int, int, int]
_RESTORE = f"`git checkout {PIPELINE}` restores it"
# Kinds of files that dvc.yaml declares one by one. All other dependencies are folders.
_FILES = (".lock", ".py")


def stages() -> list[str]:
    """Names of the stages, in pipeline order."""
    return list(_pipeline())


def sections(stage: str) -> list[str]:
    """The sections of params.yaml that dvc.yaml declares for a stage."""
    return [name for name in _part(stage, "params") if isinstance(name, str)]


def outs(stage: str) -> list[Path]:
    """The outputs and metrics that dvc.yaml declares for a stage."""
    entries = _pipeline()[stage]
    named = [*entries.get("outs", []), *entries.get("metrics", [])]
    return [Path(entry if isinstance(entry, str) else next(iter(entry))) for entry in named]


def dependencies(stage: str, paths: Paths = Paths()) -> list[Path]:  # noqa: B008  (it is immutable)
    """The dependencies that dvc.yaml declares for a stage. `paths` are the folders of this run."""
    own = dict(zip(vars(Paths()).values(), vars(paths).values(), strict=True))
    return [own.get(Path(str(entry)), Path(str(entry))) for entry in _part(stage, "deps")]


def checksums(stage: str, paths: Paths = Paths()) -> dict[str, str]:  # noqa: B008
    """sha256 (hex) of every file that dvc.yaml declares for a stage. An artefact counts by its manifest alone.

    Raises SettingsError if a dependency is missing.
    """
    return {file.as_posix(): file_digest(file) for path in dependencies(stage, paths) for file in _files(path)}


def plain(config: DictConfig) -> dict[str, Any]:
    """The composed settings as plain values, without `paths`.

    The folders do not change a result, and inputs are compared by content.
    """
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    return {str(name): value for name, value in settings.items() if name != "paths"}


def declared(
    stage: str, kinds: Mapping[str, Any], config: DictConfig, paths: Paths, overrides: Sequence[str]
) -> Declared:
    """What the stage starts with: `config`, composed from sections of these `kinds` and `overrides`, and all files."""
    settings, before = plain(config), checksums(stage, paths)
    inputs = [path for path in dependencies(stage, paths) if (path / NAME).is_file()]
    stats = {file: _stat(file) for folder in inputs for file in sorted(folder.rglob("*")) if file.is_file()}

    def changes() -> list[str]:
        try:
            found = [*_differences(settings, plain(compose_raw(kinds, overrides)), overrides)]
            found += _changed_files(before, checksums(stage, paths))
            return found + _changed_inputs(inputs, stats)
        except RemintError as error:
            return [f"{fault.partition(';')[0]}, which changed" for fault in error.faults]

    return Declared(stage, settings, before, changes)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """One line for each setting that has another value now."""
    old, new = (dict(manifest.flat(values)) for values in (before, now))
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            where = place_of(name, overrides).removeprefix("in ")
            yield f"{where}: {name} was {old.get(name)!r} and is {new.get(name)!r}, changed"


def _changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """One line for each declared file that was changed, added or removed."""
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"{name}: was {'added' if name not in before else 'removed' if name not in now else 'changed'}"


def _changed_inputs(folders: Sequence[Path], stats: Mapping[Path, _Stat]) -> list[str]:
    """One line for each file of an artefact that is no longer what its manifest lists.

    Only files whose size, time or inode changed are read.
    """
    same = [file for file, stat in stats.items() if file.is_file() and _stat(file) == stat]
    changed = []
    for folder in folders:
        files = manifest.read_files(folder)
        known = {file: files[name] for file in same if (name := _name(file, folder)) in files}
        changed += [f"{line.partition(',')[0]}, changed" for line in manifest.differences(folder, files, known)]
    return changed


def _name(file: Path, folder: Path) -> str | None:
    return file.relative_to(folder).as_posix() if folder in file.parents else None


def _stat(file: Path) -> _Stat:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def check_syntax() -> None:
    """Raise SettingsError unless dvc.yaml has lists of dependencies and settings for each stage of this project.

    A stage that the user added may have neither.
    """
    pipeline = _pipeline()
    for stage, content in pipeline.items():
        if stage not in MADE_BY and isinstance(content, dict):
            continue
        _part(stage, "deps", pipeline)
        _part(stage, "params", pipeline)


def _pipeline() -> dict[str, Any]:
    """The stages of dvc.yaml. Raises SettingsError if it names none."""
    stages = load_yaml(PIPELINE).get("stages")
    if not isinstance(stages, dict) or not stages:
        raise SettingsError(f"{PIPELINE}: stages: must be a mapping of names to stages, {got(stages)}; {_RESTORE}")
    return stages


def _part(stage: str, part: str, pipeline: Mapping[str, Any] | None = None) -> list[Any]:
    """One list of a stage in dvc.yaml, like its `deps`. Raises SettingsError if there is none."""
    content = (_pipeline() if pipeline is None else pipeline).get(stage)
    found = content.get(part) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise SettingsError(f"{PIPELINE}: stages.{stage}: must have a list {part!r}, {got(content)}; {_RESTORE}")
    return found


def _files(path: Path) -> list[Path]:
    if (path / NAME).is_file():
        return [path / NAME]
    if path.suffix in _FILES and os.path.lexists(path):
        check_file(path, "`git checkout` restores it", SettingsError)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SettingsError(f"{PIPELINE}: a dependency is missing, {got(str(path))}; run `dvc repro` to make it")
    return [file for file in sorted(path.rglob("*")) if file.is_file() and "__pycache__" not in file.parts]
