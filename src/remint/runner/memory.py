"""Advice when memory runs out: the settings that use most of it, each with a smaller value than the present one."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from remint.core import machine
from remint.core.errors import GpuTooSmall, RemintError, gpu_out_of_memory, one_line, out_of_memory
from remint.core.files import read_object
from remint.runner import recipes
from remint.runner.typed import build

# merge and eval_chat compute in float32. A small GPU that can train a model may have too little memory for that.
_ON_CPU = "REMINT_DEVICE=cpu in the environment to compute on the CPU"


@contextlib.contextmanager
def explaining_errors(command: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Turn a failed allocation, on the CPU or a GPU, into a RemintError: one line that names the settings to lower."""
    try:
        yield
    except GpuTooSmall as error:
        fitting = _fitting(settings, error.free)
        cures = [*([f"`make recipe NAME={fitting}`"] if fitting else []), *_smaller(command, settings)]
        raise RemintError(f"{command}: {error}; try {', then '.join(cures)}") from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if explained := machine.explain(error):  # a limit of this process, which no setting can lift
            raise RemintError(f"{command}: {explained[0]}; {explained[1]}") from error
        tries = _smaller(command, settings)
        if gpu_out_of_memory(error) and command != "train":
            tries.append(_ON_CPU)
        cure = f"try {', then '.join(tries)}" if tries else "end other programs, or use a machine with more memory"
        raise RemintError(f"{command}: memory ran out ({one_line(error)[:120]}); {cure}") from error


def fitting_recipe(
    names: Iterable[str], config: Mapping[str, Any], free: int, precision: str | None = None
) -> str | None:
    """The recipe that uses the most of `free` bytes of GPU memory, or None if none fits.

    `config` is the config.json of the base. If `precision` is given, only recipes of that precision count.
    """
    from remint.stages.train import footprint  # imported late: both import torch, which most commands do not need
    from remint.stages.train.settings import Train

    fitting = {}
    for name in names:
        train = build(Train, recipes.settings(name)["train"], "train")
        need = footprint.needed(config, train)
        if need is not None and need <= free and precision in (None, train.precision):
            fitting[name] = need
    return max(fitting, key=lambda name: fitting[name], default=None)


def _fitting(settings: Mapping[str, Any], free: int) -> str | None:
    """The recipe of the same precision that uses the most of `free` bytes with the present base."""
    base = read_object(settings["paths"].base / "config.json", "run `make repro` to make it")
    return fitting_recipe(recipes.names(), base, free, settings["train"].precision)


def _smaller(command: str, settings: Mapping[str, Any]) -> list[str]:
    """What to lower for a command, in the order to try; empty if there is nothing to lower."""
    if command == "train":
        return _of_training(settings["train"])
    if command == "eval_chat":
        return _of_evaluation(settings["eval_chat"])
    if command == "stage_base" and settings["model"].shard_mb > 1:
        return [f"shard_mb: {settings['model'].shard_mb // 2} in conf/model/<name>.yaml"]
    return ["a smaller --max-new-tokens"] if command == "chat" else []


def _of_training(train: Any) -> list[str]:
    """What to lower in `train`. Settings that do not change the result come first."""
    tries = []
    if not train.gradient_checkpointing:
        tries.append("train.gradient_checkpointing=true (the same bytes)")
    if train.quantization.kind != "none" and train.quantization.dequantize == "once":
        tries.append("train.quantization.dequantize=each_use (the same values)")
    if train.micro_batch > 1:
        tries.append(f"train.micro_batch={train.micro_batch // 2} with train.accumulation={train.accumulation * 2}")
    if train.max_length >= 16:
        tries.append(f"train.max_length={train.max_length // 2}")
    return tries


def _of_evaluation(section: Any) -> list[str]:
    tries = [f"eval_chat.batch={section.batch // 2}"] if section.batch > 1 else []
    return tries + ([f"eval_chat.max_new_tokens={section.max_new_tokens // 2}"] if section.max_new_tokens > 1 else [])
