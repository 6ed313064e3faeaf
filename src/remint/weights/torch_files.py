"""Read PyTorch's own files (.bin, .pth). They are pickles: none of their code runs, only plain tensors are accepted."""

from pathlib import Path
from typing import Any

import torch

from remint.core.errors import ArtefactError, got, listed
from remint.core.files import check_file


class Ignored:
    """Replaces an object of any class that is not torch's. Its content is dropped and its class is not imported."""

    def __new__(cls, *_: Any) -> "Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def load(path: Path, ignore_objects: bool = False) -> Any:
    """The content of a file that torch.save wrote, on the CPU, with memory-mapped tensors.

    A training checkpoint also holds objects of the trainer: `ignore_objects` reads each of them as an Ignored.
    Raises ArtefactError if the file holds anything but plain data.
    """
    check_file(path, "name a file that torch.save wrote")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if ignore_objects else []
        with torch.serialization.safe_globals([(Ignored, name) for name in foreign]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail anywhere in the reader
        raise ArtefactError(
            f"{path}: cannot be read as plain tensors ({_reason(error)}); get the file again, or get safetensors"
        ) from None


def _reason(error: Exception) -> str:
    """The first sentence of the error, without torch's advice to load the file in a way that runs its code."""
    first_sentence = str(error.__context__ or error).strip().split(". ")[0]
    return first_sentence.partition("\n")[0][:200]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict by name. Raises ArtefactError if the file holds anything else."""
    return plain(load(path), path)


def plain(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """`content` of `path` as tensors by name. Raises ArtefactError that names every other entry."""
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
    """Whether it is a dense tensor of torch's own class, no larger than its data in the file."""
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()
