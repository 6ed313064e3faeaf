"""A shard is rewritten piece by piece into the bytes that the safetensors library would write."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from remint.core.errors import ArtefactError
from remint.stages.merge import rewrite as rewriting
from remint.stages.merge.rewrite import rewrite
from remint.weights import shards


def write(folder, header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / shards.SINGLE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TENSORS = {
    "b": torch.arange(600.0).view(20, 30),
    "a": torch.arange(60.0).bfloat16().view(3, 4, 5),
    "ü": torch.arange(7.0).half(),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(5.0),
    "c": torch.arange(33.0).bfloat16(),
}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 64, 2**20])
def test_a_shard_is_rewritten_in_blocks_to_the_bytes_that_the_library_writes(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr(rewriting, "_BLOCK", block)
    save_file(TENSORS, tmp_path / "old", metadata={"format": "pt"})
    seen = {}

    def doubled(name, rows, part):
        assert rows.stop - rows.start == len(part)
        assert torch.equal(part, TENSORS[name][rows])
        seen.setdefault(name, []).append(part.numel())
        return (part * 2).to(dtype or part.dtype)

    tensors = {name: t for name, t in TENSORS.items() if name != "one"}
    save_file(tensors, tmp_path / "old", metadata={"format": "pt"})
    size = rewrite(tmp_path / "old", tmp_path / "new", doubled, dtype, whole=lambda name: name == "c")
    expected = {name: (t * 2).to(dtype or t.dtype) for name, t in tensors.items()}
    save_file(expected, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "new").read_bytes() == (tmp_path / "expected").read_bytes()
    assert size == sum(t.numel() * t.element_size() for t in expected.values())
    assert seen["c"] == [33]
    assert max(seen["b"]) == min(600, max(30, block // 30 * 30))


def test_a_fault_in_one_piece_ends_the_rewriting(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(20_000, 2)}, tmp_path / "old", metadata={"format": "pt"})
    monkeypatch.setattr(rewriting, "_BLOCK", 2)
    seen = []

    def failing(name, rows, part):
        assert torch.get_num_threads() == 1
        seen.append(rows)
        raise ValueError(f"of {name}")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="of a"):
        rewrite(tmp_path / "old", tmp_path / "new", failing, None, whole=lambda _: False)
    assert torch.get_num_threads() == before
    assert len(seen) < 20_000


def test_a_damaged_shard_is_not_rewritten(tmp_path):
    write(tmp_path, {"a": tensor([3], 0, 16)})
    with pytest.raises(ArtefactError, match="not a readable safetensors"):
        rewrite(tmp_path / shards.SINGLE, tmp_path / "new", lambda *_: None, None, whole=lambda _: False)
    assert not (tmp_path / "new").exists()


def test_a_shard_that_becomes_shorter_during_the_merge_is_refused(tmp_path):
    def cut(name, rows, block):
        if not cuts:
            cuts.append(os.truncate(tmp_path / "old", 2**20))
        return block

    cuts = []
    save_file({"a": torch.zeros(2**22)}, tmp_path / "old")
    with pytest.raises(ArtefactError, match="old: became shorter while it was read"):
        rewrite(tmp_path / "old", tmp_path / "new", cut, None, whole=lambda _: False)
