"""What may be wrong with settings, told before anything heavy is imported and before the first of the stages runs."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from remint.core import manifest
from remint.core.errors import RemintError, SettingsError
from remint.core.paths import CONF, PARAMS, Paths
from remint.core.settings import Runtime
from remint.identity import Identity
from remint.runner import fingerprint
from remint.runner.config import compose, load_yaml
from remint.stages.convert.settings import Convert
from remint.stages.eval_chat.settings import EvalChat
from remint.stages.merge.settings import Merge
from remint.stages.replicate_data.settings import ReplicateData
from remint.stages.stage_base.settings import Model
from remint.stages.train.settings import Train


def settings(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What params.yaml and the files of conf/ that it names say to all stages, read at once. Raises SettingsError."""
    return compose(_all, overrides)


def check_all() -> None:
    """Read them, and see whether the base model is there if it has to be brought by hand. Raises SettingsError."""
    found = settings()
    model, base = found["model"], found["paths"].base
    folder = Path(model.location).expanduser()
    if model.source == "local_folder" and not folder.is_dir() and not base.exists():
        raise SettingsError(
            f"model.location: no such folder, got {model.location!r}; put {model.name} there: "
            f"{CONF / 'model' / str(load_yaml(PARAMS)['model'])}.yaml says where it can be had"
        )


def other_inputs(stage: str, overrides: Sequence[str]) -> list[str]:
    """What lies in `data` and is not what params.yaml names, of what a stage reads: DVC would make it anew, a stage does not."""
    with contextlib.suppress(SettingsError):  # of another stage: it is not asked to run
        asked = settings(overrides)
        base, dataset = asked["paths"].base, asked["paths"].dataset
        identity = _facts(dataset, "dataset").get("identity")
        names = {
            base: _facts(base, "base").get("name"),
            dataset: identity.get("name") if isinstance(identity, dict) else None,
        }
        wanted = {base: asked["model"].name, dataset: asked["identity"].name}
        declared = fingerprint.declared(stage, {name: str(path) for name, path in vars(asked["paths"]).items()})
        return [
            f"{place}: is of {names[place]!r}, and {PARAMS} names {wanted[place]!r}; `make repro` makes it anew"
            for place in (base, dataset)
            if place in declared and names[place] not in (None, wanted[place])
        ]
    return []


def _facts(place: Path, kind: str) -> dict[str, Any]:
    """What an artefact's manifest records; nothing if there is none to read, which the stage itself will tell."""
    with contextlib.suppress(RemintError):
        return manifest.read(place, kind)
    return {}


def declared_settings(stage: str) -> Callable[..., None]:
    """A function that asks for the settings that the stage's `run` asks for, without importing that."""
    types, names = get_type_hints(_all), {*fingerprint.sections(stage), "paths"}

    def run() -> None: ...

    run.__annotations__ = {name: kind for name, kind in types.items() if name in names}
    return run


def _all(
    seed: int,
    runtime: Runtime,
    paths: Paths,
    identity: Identity,
    replicate_data: ReplicateData,
    model: Model,
    train: Train,
    convert: Convert,
    merge: Merge,
    eval_chat: EvalChat,
) -> None: ...
