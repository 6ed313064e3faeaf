"""What may be wrong with settings, told before anything heavy is imported and before the first of the stages runs."""

from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

from remint import fingerprint
from remint.core.config import Runtime, compose, load_yaml
from remint.core.errors import SettingsError
from remint.core.paths import CONF, PARAMS, Paths
from remint.identity import Identity
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
