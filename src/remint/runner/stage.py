"""Runs one stage: composes its settings, starts its processes, opens tracking, calls its `run`."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from remint.core.declared import Declared
from remint.core.log import silent
from remint.core.process import end_with_parent
from remint.runner import config, memory, pipeline, places, preflight, workers


def run_stage(stage: str, overrides: Sequence[str] = (), print_settings: bool = False) -> int:
    """Run a stage with the settings of params.yaml and `overrides` like `train.lr=1e-3`. Returns the exit status.

    With `print_settings` it only prints the composed settings. Raises RemintError.
    """
    if os.environ.get("DVC_STAGE"):
        preflight.check_pipeline()  # report mistakes in later stages before this one runs, in experiments too
    sections = preflight.declared_settings(stage)
    raw = config.compose_raw(sections, overrides)
    arguments = config.to_objects(sections, raw, overrides)
    if print_settings:
        print(OmegaConf.to_yaml(OmegaConf.create(_plain(OmegaConf.to_container(raw, resolve=True)))), end="")
        return 0
    rank = workers.rank()
    if rank is not None:
        end_with_parent()
    elif not os.environ.get("DVC_STAGE"):
        for warning in preflight.other_inputs(stage, overrides):
            print(f"warning: {warning}", file=sys.stderr)
    if stage == "train" and rank is None and arguments["train"].processes > 1:
        return workers.start(arguments["train"].processes, [stage, *overrides])
    places.check(stage, arguments["paths"])
    started = pipeline.declared(stage, sections, raw, arguments["paths"], overrides)
    _run(started, raw, arguments, rank)
    return 0


def _run(declared: Declared, raw: DictConfig, arguments: dict[str, Any], rank: int | None) -> None:
    """Call the stage's `run` with its settings, what it declared, and a log."""
    stage = declared.stage
    run = import_module(f"remint.stages.{stage}.run").run
    tracked = (
        import_module("remint.runner.tracking").stage_run(stage, declared.fingerprint, raw)
        if not rank
        else nullcontext(silent)
    )
    with tracked as log, memory.explaining_errors(stage, arguments):
        run(**arguments, declared=declared, log=log)


def _plain(value: Any) -> Any:
    """Settings with paths as text, because YAML cannot represent Path objects."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value
