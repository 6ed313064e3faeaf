"""What to lower when memory ran out, or would: the settings that cost most of it, each with a smaller value than the present one."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from remint.core.errors import GpuTooSmall, RemintError, gpu_out_of_memory, one_line, out_of_memory
from remint.core.files import read_object
from remint.runner import recipes
from remint.runner.typed import build

# merge and eval_chat compute in float32: more than a small GPU has for a model that it can train.
_ON_CPU = "REMINT_DEVICE=cpu in the environment, which does it without the GPU"


@contextlib.contextmanager
def explained(command: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Tell a failed allocation, of the machine or of a GPU, in one line with what to set. Raises RemintError."""
    try:
        yield
    except GpuTooSmall as error:
        fitting = _fitting(settings, error.free)
        cures = [*([f"`make recipe NAME={fitting}`"] if fitting else []), *_smaller(command, settings)]
        raise RemintError(f"{command}: {error}; try {', then '.join(cures)}") from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        tries = _smaller(command, settings)
        if gpu_out_of_memory(error) and command != "train":
            tries.append(_ON_CPU)
        cure = f"try {', then '.join(tries)}" if tries else "end other programs, or take a machine with more"
        raise RemintError(f"{command}: memory ran out ({one_line(error)[:120]}); {cure}") from error


def fitting_recipe(
    names: Iterable[str], config: Mapping[str, Any], free: int, precision: str | None = None
) -> str | None:
    """Of these recipes the one that makes the most of `free` bytes of a GPU, for a base of this config.json; of one `precision`
    if given. None if none fits."""
    from remint.stages.train import footprint  # these import torch, which other commands do without
    from remint.stages.train.settings import Train

    fitting = {}
    for name in names:
        train = build(Train, recipes.settings(name)["train"], "train")
        need = footprint.needed(config, train)
        if need is not None and need <= free and precision in (None, train.precision):
            fitting[name] = need
    return max(fitting, key=lambda name: fitting[name], default=None)


def _fitting(settings: Mapping[str, Any], free: int) -> str | None:
    """The recipe of the same precision that makes the most of `free` bytes with the present base."""
    base = read_object(settings["paths"].base / "config.json", "run `make repro`, which makes it")
    return fitting_recipe(recipes.names(), base, free, settings["train"].precision)


def _smaller(command: str, settings: Mapping[str, Any]) -> list[str]:
    if command == "train":
        return _of_training(settings["train"])
    if command == "eval_chat":
        return _of_evaluation(settings["eval_chat"])
    if command == "stage_base" and settings["model"].shard_mb > 1:
        return [f"shard_mb: {settings['model'].shard_mb // 2} in conf/model/<name>.yaml"]
    return ["--max-new-tokens with less than now"] if command == "chat" else []


def _of_training(train: Any) -> list[str]:
    """What changes no value of the result comes first."""
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
