"""Read and write a model's safetensors shard by shard: the largest shard, not the model, determines memory use."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from remint.core.errors import ArtefactError, one_line
from remint.core.files import check_file, is_inside, read_object
from remint.core.manifest import dump_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def files(folder: Path, single: str = SINGLE) -> list[Path]:
    """The shards of a model in order: the file `single`, or the files that its index names.

    Raises ArtefactError if a shard is missing or the index is not valid.
    """
    index = folder / f"{single}.index.json"
    if not os.path.lexists(index):
        if not os.path.lexists(folder / single):
            raise ArtefactError(f"{folder}: holds no {single} and no {index.name}; get the weights again")
        return [folder / single]
    weight_map = read_object(index, "get the file again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ArtefactError(f"{index}: is not an index of shards; get the file again")
    names = sorted(set(weight_map.values()))
    wrong = [name for name in names if Path(name).name != name or not is_inside(name)]
    missing = [name for name in names if name not in wrong and not (folder / name).is_file()]
    if wrong or missing:
        raise ArtefactError(
            *(f"{index}: {name!r} is not a plain file name; get the file again" for name in wrong),
            *(f"{folder / name}: missing, though the index names it; get the file again" for name in missing),
        )
    return [folder / name for name in names]


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, read only from the headers."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files(folder):
        with opened(path) as shard:
            found.update({name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()})  # noqa: SIM118
    return found


def names(path: Path) -> list[str]:
    """The names of a shard's tensors, sorted."""
    with opened(path) as shard:
        return sorted(shard.keys())


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one shard, one at a time, in the order of their names."""
    with opened(path) as shard:
        for name in sorted(shard.keys()):
            with _reading_errors(path):
                tensor = shard.get_tensor(name)
            yield name, tensor


class Writer:
    """Collect tensors and write them as shards of at most `limit` bytes. A larger tensor gets a larger shard."""

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0
        self.total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor. A full shard is written to disk at once."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self._limit:
            self.cut()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self.total += size

    def cut(self) -> None:
        """Write the current shard and start a new one."""
        if self._pending:
            save_file(self._pending, self._folder / f"part-{len(self._shards):05d}", metadata={"format": "pt"})
            self._shards.append(list(self._pending))
            self._pending, self._bytes = {}, 0

    def close(self) -> None:
        """Write the last shard and give all shards their final names. Several shards get an index."""
        self.cut()
        name_shards(self._folder, self._shards, self.total)


def name_shards(folder: Path, names: Sequence[Iterable[str]], total: int) -> None:
    """Give the files part-00000, … their final names. Several files get an index.

    `names` lists the tensors of each file; `total` is the size of all tensors in bytes.
    """
    if len(names) == 1:
        (folder / "part-00000").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, held in enumerate(names):
        final = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"part-{number:05d}").rename(folder / final)
        weight_map.update(dict.fromkeys(held, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(dump_json(index), encoding="utf-8")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """The open file. Raises ArtefactError if it cannot be read.

    safetensors itself refuses a header whose sizes or offsets do not fit the file.
    """
    check_file(path, "get the file again")
    with _reading_errors(path):
        shard = safe_open(path, framework="pt")
    with shard:
        yield shard


@contextlib.contextmanager
def _reading_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ArtefactError(
            f"{path}: is not a readable safetensors file ({one_line(error)}); get the file again"
        ) from None
