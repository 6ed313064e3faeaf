"""Rewrite a shard with every tensor changed, a few megabytes at a time."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from remint.core.errors import ArtefactError
from remint.core.files import parse_json
from remint.weights.shards import opened

# safetensors writes larger types first. Among types of one size, the one later in its own list comes first.
_ORDER = ("F32", "BF16", "F16")
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {kind: dtype for dtype, kind in _KINDS.items()}
# Numbers in a block of rows: few enough that the computation stays in the cache of one CPU core.
_BLOCK = 2**18

Change = Callable[[str, slice, torch.Tensor], torch.Tensor]


def rewrite(source: Path, target: Path, change: Change, dtype: torch.dtype | None, whole: Callable[[str], bool]) -> int:
    """Write the shard `source` to `target` with every tensor changed. Returns the size of all tensors in bytes.

    The tensors are written in `dtype`, or each in its own if that is None. `change` takes a tensor's name, a range of
    its rows and these rows. It gets all rows at once if `whole(name)` is true, else a few megabytes of them.

    The bytes are the same as those of safetensors, which can only write complete shards. As many threads as torch uses
    process the pieces in parallel, so that the cores work while the disk is busy.

    Raises ArtefactError if the shard is unreadable or becomes shorter meanwhile.
    """
    with opened(source):  # opening it checks that the header fits the file
        pass
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        size = int.from_bytes(_read(old, 8, 0).numpy().data, "little")
        found = parse_json(_read(old, size, 8).numpy().tobytes(), str(source), "run `dvc repro` to make it again")
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


def _pieces(shape: Sequence[int], whole: bool) -> Iterator[slice]:
    """The ranges of rows in which a tensor is processed: all rows at once, or about _BLOCK numbers each."""
    step = shape[0] if whole else max(1, _BLOCK // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        yield slice(first, min(shape[0], first + step))


def _side_by_side(work: Callable[..., None], items: Iterable[tuple[Any, ...]]) -> None:
    """Run `work` on each item in as many threads as torch uses. Each of them computes with one torch thread."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done in [pool.submit(work, *item) for item in items]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # unchanged for this thread; resets the default for threads that start later


def _read(file: FileIO, size: int, start: int) -> torch.Tensor:
    """`size` bytes of the file from `start`, as uint8. Raises ArtefactError if the file has become shorter."""
    data = torch.empty(size, dtype=torch.uint8)  # not zeroed first, unlike a bytearray
    left = data.numpy().data
    while left:
        if (count := os.preadv(file.fileno(), [left], start)) == 0:
            raise ArtefactError(f"{file.name}: became shorter while it was read; stop what writes to it and run again")
        left, start = left[count:], start + count
    return data


def _write(file: FileIO, data: Any, start: int) -> None:
    """Write all of the data at `start`. One call on an unbuffered file may write only a part of it."""
    left = memoryview(data).cast("B")
    while left:
        count = os.pwrite(file.fileno(), left, start)
        left, start = left[count:], start + count
