"""What may be wrong with settings, told before anything heavy is imported and before the first of the stages runs."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_type_hints

from remint import fingerprint
from remint.core.config import Runtime, compose, load_yaml
from remint.core.errors import RemintError, SettingsError
from remint.core.files import read_object
from remint.core.paths import CONF, PARAMS, Paths
from remint.identity import Identity
from remint.manifest import NAME
from remint.stages.convert.settings import Convert
from remint.stages.eval_chat.settings import EvalChat
from remint.stages.merge.settings import Merge
from remint.stages.replicate_data.settings import ReplicateData
from remint.stages.stage_base.settings import Model
from remint.stages.train.settings import Train


def check() -> None:
    """Read params.yaml and the files of conf/ that it names, for all stages at once. Raises SettingsError."""
    compose(_all)


def command() -> None:
    """The same, and whether the base model is there if it has to be brought by hand; says so if all is well."""
    settings = compose(_all)
    model, base = settings["model"], settings["paths"].base
    folder = Path(model.location).expanduser()
    if model.source == "local_folder" and not folder.is_dir() and not base.exists():
        raise SettingsError(
            f"model.location: no such folder, got {model.location!r}; put {model.name} there: "
            f"{CONF / 'model' / str(load_yaml(PARAMS)['model'])}.yaml says where it can be had"
        )
    print(f"{PARAMS}: in order")


def other_inputs(stage: str, overrides: Sequence[str]) -> list[str]:
    """What lies in `data` and is not what params.yaml names, of what a stage reads: DVC would make it anew, a stage does not."""
    with contextlib.suppress(SettingsError):  # of another stage: it is not asked to run
        settings = compose(_all, overrides)
        base, dataset = settings["paths"].base, settings["paths"].dataset
        wanted = {base: settings["model"].name, dataset: settings["identity"].name}
        declared = fingerprint.declared(stage, {name: str(path) for name, path in vars(settings["paths"]).items()})
        return [
            f"{place}: is of {found!r}, and {PARAMS} names {wanted[place]!r}; `make repro` makes it anew"
            for place in (base, dataset)
            if place in declared and (found := _name(place)) not in (None, wanted[place])
        ]
    return []


def _name(place: Path) -> object:
    """The name of base model or assistant that an artefact's manifest records, None if there is none."""
    with contextlib.suppress(RemintError):
        facts = read_object(place / NAME).get("facts")
        facts = facts if isinstance(facts, dict) else {}
        identity = facts.get("identity")
        return identity.get("name") if isinstance(identity, dict) else facts.get("name")
    return None


def asks_as(stage: str) -> Callable[..., None]:
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
