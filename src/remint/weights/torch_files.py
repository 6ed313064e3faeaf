"""PyTorch's own files (.bin, .pth): pickles, of which nothing is run and only plain tensors are taken."""

from pathlib import Path
from typing import Any

import torch

from remint.core.errors import ArtefactError, got, listed


class Ignored:
    """What an object of a foreign class is read as: nothing of it is kept, and none of its code is looked for."""

    def __new__(cls, *_: Any) -> "Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def load(path: Path, ignore_objects: bool = False) -> Any:
    """What torch.save wrote, on the CPU, its tensors mapped from the disk. Raises ArtefactError for all but plain data.

    A training checkpoint holds objects of the trainer as well: `ignore_objects` reads each as an Ignored.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if ignore_objects else []
        with torch.serialization.safe_globals([(Ignored, name) for name in foreign]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged or hostile file may fail anywhere in the reader
        raise ArtefactError(
            f"{path}: cannot be read as plain tensors ({_reason(error)}); get the file again, or as safetensors"
        ) from None


def _reason(error: Exception) -> str:
    """What is wrong, without the advice that torch adds: to read the file in the way that runs what it asks for."""
    first_sentence = str(error.__context__ or error).strip().split(". ")[0]
    return first_sentence.partition("\n")[0][:200]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict by name."""
    return plain(load(path), path)


def plain(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """`content` of `path` as tensors by name. Raises ArtefactError naming every entry that is something else."""
    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: must hold tensors by name, {got(type(content).__name__)}; get the file again")
    wrong = {name: value for name, value in content.items() if not isinstance(name, str) or not _is_plain(value)}
    if wrong:
        raise ArtefactError(
            *listed(
                f"{path}: {name!r}: must be a plain tensor, {got(type(value).__name__)}; get the file again"
                for name, value in wrong.items()
            )
        )
    return content


def _is_plain(value: Any) -> bool:
    """A dense tensor of torch's own class, no larger than what the file stores for it."""
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()
