"""What may be wrong with settings, told before anything heavy is imported and before the first of the stages runs."""

from collections.abc import Callable
from typing import get_type_hints

from remint import fingerprint
from remint.core.config import Runtime, compose
from remint.core.paths import Paths
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
