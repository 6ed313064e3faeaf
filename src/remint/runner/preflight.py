"""Checks the settings of all stages before torch is imported and before the first stage runs."""

import contextlib
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from remint.core import manifest
from remint.core.errors import RemintError, SettingsError, got
from remint.core.files import check_folder, read_object
from remint.core.paths import CONF, PARAMS, Paths
from remint.core.settings import Runtime
from remint.identity import Identity
from remint.runner import pipeline, places
from remint.runner.config import compose, load_yaml
from remint.stages.convert.settings import Convert
from remint.stages.eval_chat.settings import EvalChat
from remint.stages.merge.settings import Merge
from remint.stages.replicate_data.settings import ReplicateData
from remint.stages.stage_base.settings import Model
from remint.stages.train.settings import Train

# Every section of params.yaml with its type. A test compares them with the signatures of the stages' `run` functions,
# which cannot be read here: that would import torch.
SECTIONS: dict[str, Any] = {
    "seed": int,
    "runtime": Runtime,
    "paths": Paths,
    "identity": Identity,
    "replicate_data": ReplicateData,
    "model": Model,
    "train": Train,
    "convert": Convert,
    "merge": Merge,
    "eval_chat": EvalChat,
}


def settings(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of all stages, from params.yaml and the conf/ files that it names. Raises SettingsError."""
    return compose(SECTIONS, overrides)


def check_pipeline() -> dict[str, Any]:
    """Check the settings of all stages, and that each may write its artefact. Returns the settings.

    Raises RemintError that lists every fault.
    """
    faults: list[str] = []
    found: dict[str, Any] = {}
    for check in (_check_sections, lambda: found.update(settings()), places.check_all):
        try:
            check()
        except RemintError as error:
            faults += error.faults
    if faults:
        raise SettingsError(*dict.fromkeys(faults))  # one that stops every check comes from each of them
    return found


def _check_sections() -> None:
    """Refuse a section of params.yaml that no stage reads: its values would have no effect."""
    if faults := [
        f"{PARAMS}: {name}: no such section; {_nearest(name)}" for name in load_yaml(PARAMS) if name not in SECTIONS
    ]:
        raise SettingsError(*faults)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, SECTIONS, n=1)
    return f"write {near[0]} or remove it" if near else "remove it"


def check_all() -> None:
    """Check the pipeline. A base model of the source `local_folder` must also exist. Raises RemintError.

    If the base is there, answers must fit into its positions.
    """
    if not Path(".git").exists():
        raise SettingsError(
            f"{Path.cwd()}: is not a git repository, which DVC needs, as after unpacking an archive of the sources; "
            "make it one with `git init`"
        )
    found = check_pipeline()
    model, base = found["model"], found["paths"].base
    folder = Path(model.location).expanduser()
    if model.source == "local_folder" and not base.exists():
        where = f"{CONF / 'model' / str(load_yaml(PARAMS)['model'])}.yaml explains where to get it"
        if not os.path.lexists(folder):
            raise SettingsError(
                f"model.location: no such folder, got {model.location!r}; put {model.name} there: {where}"
            )
        check_folder(folder, f"put {model.name} there: {where}", SettingsError)
    present = _facts(base, "base").get("name") == model.name
    if faults := list(_too_long(found, base if present else folder)):
        raise SettingsError(*faults)


def _too_long(found: dict[str, Any], base: Path) -> Iterator[str]:
    """Faults of the lengths of answers. A config.json that cannot be read is reported by the stage that reads it."""
    positions = None
    with contextlib.suppress(RemintError):
        positions = read_object(base / "config.json").get("max_position_embeddings")
    lengths = {"train.sample_tokens": found["train"].sample_tokens}
    lengths["eval_chat.max_new_tokens"] = found["eval_chat"].max_new_tokens
    for setting, tokens in lengths.items():
        if type(positions) is int and tokens >= positions:
            yield f"params: {setting}: must be below the {positions} positions of {base}, {got(tokens)}; lower it"


def other_inputs(stage: str, overrides: Sequence[str]) -> list[str]:
    """Warnings for inputs that were built for another base or identity than params.yaml names.

    DVC would rebuild such inputs. A stage that is started by hand reads them as they are.
    """
    with contextlib.suppress(SettingsError):  # a mistake in another stage's settings must not stop this stage
        found = settings(overrides)
        base, dataset = found["paths"].base, found["paths"].dataset
        identity = _facts(dataset, "dataset").get("identity")
        names = {
            base: _facts(base, "base").get("name"),
            dataset: identity.get("name") if isinstance(identity, dict) else None,
        }
        wanted = {base: found["model"].name, dataset: found["identity"].name}
        declared = pipeline.dependencies(stage, found["paths"])
        return [
            f"{place}: belongs to {names[place]!r}, but {PARAMS} names {wanted[place]!r}; `make repro` rebuilds it"
            for place in (base, dataset)
            if place in declared and names[place] not in (None, wanted[place])
        ]
    return []


def _facts(place: Path, kind: str) -> dict[str, Any]:
    """The facts in an artefact's manifest; empty if it cannot be read, which the stage itself will report."""
    with contextlib.suppress(RemintError):
        return manifest.read(place, kind)
    return {}


def declared_settings(stage: str) -> dict[str, Any]:
    """The part of SECTIONS that dvc.yaml declares for a stage, and `paths`, which every stage gets."""
    names = {*pipeline.sections(stage), "paths"}
    return {name: kind for name, kind in SECTIONS.items() if name in names}
