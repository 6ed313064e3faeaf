"""The fingerprint of a stage: one checksum over its settings, code and inputs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from remint.core.errors import SettingsError, got
from remint.core.manifest import NAME, digest, file_digest
from remint.core.paths import PARAMS, PIPELINE
from remint.runner.config import load_yaml


def of_stage(stage: str, config: DictConfig) -> str:
    """sha256 (hex) over the stage's composed settings and every dependency that dvc.yaml declares for it."""
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    # Paths are left out: they do not change a result, and inputs are compared by content.
    places = settings.pop("paths", {})
    return digest({"stage": stage, "settings": settings, "dependencies": dependencies(stage, places)})


def stages() -> list[str]:
    """Names of the stages, in pipeline order."""
    return list(_pipeline())


def dependencies(stage: str, places: Mapping[str, str]) -> dict[str, str]:
    """sha256 (hex) of every file that dvc.yaml declares for a stage. An artefact counts by its manifest alone.

    `places` are the `paths` of this run, which the command line may have changed.
    Raises SettingsError if a dependency is missing.
    """
    return {file.as_posix(): file_digest(file) for path in declared(stage, places) for file in _files(path)}


def declared(stage: str, places: Mapping[str, str] | None = None) -> list[Path]:
    """The stage's dependencies in dvc.yaml. `${paths.x}` is filled in from `places`, else from params.yaml."""
    known = {**(load_yaml(PARAMS).get("paths") or {}), **(places or {})}
    return [Path(_filled(entry, known)) for entry in _pipeline()[stage]["deps"]]


def sections(stage: str) -> list[str]:
    """The sections of params.yaml that dvc.yaml declares for a stage."""
    return [name for name in _pipeline()[stage]["params"] if isinstance(name, str)]


def _pipeline() -> dict[str, Any]:
    return load_yaml(PIPELINE)["stages"]


def _filled(entry: str, places: Mapping[str, str]) -> str:
    return re.sub(r"\$\{paths\.(\w+)\}", lambda match: str(places[match[1]]), entry)


def _files(path: Path) -> list[Path]:
    if (path / NAME).is_file():
        return [path / NAME]
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SettingsError(f"{PIPELINE}: a dependency is missing, {got(str(path))}; run `dvc repro` to make it")
    return [file for file in sorted(path.rglob("*")) if file.is_file() and "__pycache__" not in file.parts]
