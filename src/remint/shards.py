"""Read and write a model's safetensors shard by shard, so that memory is bounded by the largest shard, not the model."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from remint.core.errors import ArtefactError, one_line
from remint.core.files import is_inside, read_object
from remint.manifest import dump_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The library puts larger types first, and of those with one size the one that its list has later.
_ORDER = ("F32", "BF16", "F16")
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {kind: dtype for dtype, kind in _KINDS.items()}
# Numbers in a block of rows: what is computed with them stays in the cache of a processor's core.
_BLOCK = 2**18

Change = Callable[[str, slice, torch.Tensor], torch.Tensor]


def files(folder: Path, single: str = SINGLE) -> list[Path]:
    """The shards of a model in order: the file `single`, or those that its index names.

    Raises ArtefactError if one is absent.
    """
    index = folder / f"{single}.index.json"
    if not index.exists():
        if not (folder / single).exists():
            raise ArtefactError(f"{folder}: holds no {single} and no {index.name}; get the weights again")
        return [folder / single]
    weight_map = read_object(index, "get the file again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ArtefactError(f"{index}: is no index of shards; get the file again")
    names = sorted(set(weight_map.values()))
    wrong = [name for name in names if Path(name).name != name or not is_inside(name)]
    missing = [name for name in names if name not in wrong and not (folder / name).is_file()]
    if wrong or missing:
        raise ArtefactError(
            *(f"{index}: {name!r} is no plain file name; get the file again" for name in wrong),
            *(f"{folder / name}: missing, though the index names it; get the file again" for name in missing),
        )
    return [folder / name for name in names]


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the headers alone."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files(folder):
        with _opened(path) as shard:
            found.update({name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()})  # noqa: SIM118
    return found


def names(path: Path) -> list[str]:
    """The names of a shard's tensors, sorted."""
    with _opened(path) as shard:
        return sorted(shard.keys())


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one shard, one at a time, in the order of their names."""
    with _opened(path) as shard:
        for name in sorted(shard.keys()):
            with _told(path):
                tensor = shard.get_tensor(name)
            yield name, tensor


def rewrite(source: Path, target: Path, change: Change, dtype: torch.dtype | None, whole: Callable[[str], bool]) -> int:
    """Write the shard `source` anew with every tensor changed, in `dtype` or each tensor's own; returns the tensors' bytes.

    `change` takes a tensor's name, a range of its rows and these rows. It gets all of them at once if `whole` says so, else a few
    megabytes: the library reads and writes whole tensors and shards. The bytes are those that it would write. As many threads
    as torch has read, change and write such pieces side by side, so that the cores are busy while the disk is.
    """
    with _opened(source):  # it has looked whether the header fits the file
        pass
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        size = int.from_bytes(_read(old, 8, 0).numpy().data, "little")
        found = json.loads(_read(old, size, 8).numpy().tobytes())
        found.pop("__metadata__", None)
        data = 8 + size
        kinds = {name: _KINDS[dtype] if dtype else facts["dtype"] for name, facts in found.items()}
        order = sorted(found, key=lambda name: (_ORDER.index(kinds[name]), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in order:
            start, end = end, end + math.prod(found[name]["shape"]) * _DTYPES[kinds[name]].itemsize
            header[name] = {"dtype": kinds[name], "shape": found[name]["shape"], "data_offsets": [start, end]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        _write(new, text, 0)

        def rewrite_rows(name: str, rows: slice) -> None:
            shape, stored = found[name]["shape"], _DTYPES[found[name]["dtype"]]
            width = math.prod(shape[1:])
            start = data + found[name]["data_offsets"][0] + rows.start * width * stored.itemsize
            raw = _read(old, (rows.stop - rows.start) * width * stored.itemsize, start)
            block = raw.view(stored).view(-1, *shape[1:])
            place = header[name]["data_offsets"][0] + rows.start * width * _DTYPES[kinds[name]].itemsize
            _write(new, change(name, rows, block).contiguous().view(torch.uint8).numpy().data, len(text) + place)

        _side_by_side(
            rewrite_rows, [(name, rows) for name in order for rows in _pieces(found[name]["shape"], whole(name))]
        )
        return end


class Writer:
    """Collect tensors and write them as shards of at most `limit` bytes (one larger tensor makes a larger shard)."""

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0
        self.total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; a full shard goes to disk at once."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self._limit:
            self.cut()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self.total += size

    def cut(self) -> None:
        """End the present shard here."""
        if self._pending:
            save_file(self._pending, self._folder / f"part-{len(self._shards):05d}", metadata={"format": "pt"})
            self._shards.append(list(self._pending))
            self._pending, self._bytes = {}, 0

    def close(self) -> None:
        """Write what is left and give the shards their final names, with an index where there are several."""
        self.cut()
        name_shards(self._folder, self._shards, self.total)


def name_shards(folder: Path, names: Sequence[Iterable[str]], total: int) -> None:
    """Give the files part-00000, …, which hold the tensors of `names`, their final names; several get an index."""
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


def _pieces(shape: Sequence[int], whole: bool) -> Iterator[slice]:
    """Ranges of a tensor's rows that are worked on at a time."""
    step = shape[0] if whole else max(1, _BLOCK // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        yield slice(first, min(shape[0], first + step))


def _side_by_side(work: Callable[..., None], items: Iterable[tuple[Any, ...]]) -> None:
    """`work` on each item, in as many threads as torch has, each of which computes alone."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done in [pool.submit(work, *item) for item in items]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # this thread has them still; it is for those that begin later


def _read(file: FileIO, size: int, start: int) -> torch.Tensor:
    """So many bytes of the file as uint8. Raises ArtefactError if it has become shorter than it was."""
    data = torch.empty(size, dtype=torch.uint8)  # not cleared first, as a bytearray would be
    left = data.numpy().data
    while left:
        if (count := os.preadv(file.fileno(), [left], start)) == 0:
            raise ArtefactError(f"{file.name}: became shorter while it was read; let nothing write to it and run again")
        left, start = left[count:], start + count
    return data


def _write(file: FileIO, data: Any, start: int) -> None:
    """All of the data: an unbuffered file may take a part of it at a time."""
    left = memoryview(data).cast("B")
    while left:
        count = os.pwrite(file.fileno(), left, start)
        left, start = left[count:], start + count


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """The open file; safetensors itself refuses a header whose sizes or offsets do not fit the file."""
    if not path.is_file():
        raise ArtefactError(f"{path}: is no readable safetensors file; get the file again")
    with _told(path):
        shard = safe_open(path, framework="pt")
    with shard:
        yield shard


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ArtefactError(
            f"{path}: is no readable safetensors file ({one_line(error)}); get the file again"
        ) from None
