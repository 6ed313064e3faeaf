"""Run one stage: compose its settings, start its processes, open tracking, call its `run`."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from remint.core.log import silent
from remint.runner import config, fingerprint, memory, preflight, workers
from remint.runner.process import end_with_parent


def run_stage(stage: str, overrides: Sequence[str] = (), print_settings: bool = False) -> int:
    """Run a stage with the settings of params.yaml and `overrides` like `train.lr=1e-3`; returns the exit status.

    With `print_settings` its composed settings are printed instead. Raises RemintError.
    """
    if os.environ.get("DVC_STAGE"):
        preflight.settings()  # in an experiment, too, a mistake in a late stage is reported before an early one runs
    declared = preflight.declared_settings(stage)
    raw = config.compose_raw(declared, overrides)
    arguments = config.to_objects(declared, raw, overrides)
    if print_settings:
        print(OmegaConf.to_yaml(OmegaConf.create(_plain(OmegaConf.to_container(raw, resolve=True)))), end="")
        return 0
    rank, by_dvc = workers.rank(), bool(os.environ.get("DVC_STAGE"))
    if rank is not None or by_dvc:
        end_with_parent()
    else:
        for warning in preflight.other_inputs(stage, overrides):
            print(f"warning: {warning}", file=sys.stderr)
    if stage == "train" and rank is None and arguments["train"].processes > 1:
        return workers.start(arguments["train"].processes, [stage, *overrides])
    _run(stage, raw, arguments, rank)
    return 0


def _run(stage: str, raw: DictConfig, arguments: dict[str, Any], rank: int | None) -> None:
    """Call the stage's `run` with its settings and with what else it asks for by name."""
    run = import_module(f"remint.stages.{stage}.run").run
    key = fingerprint.of_stage(stage, raw)
    supplied: dict[str, Any] = {"fingerprint": key, "dependencies": fingerprint.dependencies(stage, raw.paths)}
    arguments |= {name: value for name, value in supplied.items() if name in run.__annotations__}
    tracked = import_module("remint.runner.tracking").stage_run(stage, key, raw) if not rank else nullcontext(silent)
    with tracked as log, memory.explained(stage, arguments):
        run(**arguments, log=log)


def _plain(value: Any) -> Any:
    """Settings with paths as text, which YAML can show."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value
