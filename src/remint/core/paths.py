"""The folders that the pipeline reads and writes."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from remint.core.errors import SettingsError, got

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")
CONF = Path("conf")
# Unfinished work: never an artefact, never in git, safe to delete when nothing runs. DVC can run an experiment in a
# temporary tree; this folder is still in the repository then, so that the next try finds it.
SCRATCH = Path(os.environ.get("DVC_ROOT", "")) / ".scratch"


@dataclass(frozen=True)
class Paths:
    """Folders relative to the root of the repository, one for the sources and one for each artefact.

    The pipeline uses these values, which dvc.yaml repeats. They are no settings: a wrong one would make DVC remove a
    folder of the user. A command typed by hand may name others, like `remint merge paths.model=data/other`.
    """

    source: Path = Path("data/source")
    dataset: Path = Path("data/dataset")
    base: Path = Path("data/base")
    checkpoint: Path = Path("data/checkpoint")
    adapter: Path = Path("data/adapter")
    model: Path = Path("data/model")
    report: Path = Path("data/report")

    def __post_init__(self) -> None:
        faults = [
            f"paths.{name}: must be inside the repository, {got(str(path))}; "
            f"use a relative path without '..', like data/{name}"
            for name, path in vars(self).items()
            if path.is_absolute() or ".." in path.parts or path == Path()
        ]
        faults += [
            f"paths.{name}: must not share a folder with paths.{other}, {got(str(path))}; give each its own"
            for name, path in vars(self).items()
            for other, place in vars(self).items()
            if name != other and (path == place or place in path.parents)
        ]
        if faults:
            raise SettingsError(*faults)


# Users write the sources; a stage makes every other folder. The kind of an artefact is the name of its folder here.
ARTEFACTS = tuple(field.name for field in fields(Paths) if field.name != "source")
# The kind of artefact that each stage makes.
MADE_BY = {
    "replicate_data": "dataset",
    "stage_base": "base",
    "train": "checkpoint",
    "convert": "adapter",
    "merge": "model",
    "eval_chat": "report",
}
