"""Safetensors whose header lies are refused before anything is allocated."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from remint import shards
from remint.core.errors import ArtefactError


def write(folder, header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / shards.SINGLE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor([10**12], 0, 4 * 10**12)},
        {"a": tensor([2**63, 4], 0, 16)},
        {"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)},
        {"a": tensor([4], 8, 24)},
        {"a": tensor([-4], 0, 16)},
        {"a": tensor([4], -16, 0)},
        {"a": tensor([3], 0, 16)},
        {"a": tensor([4], 0, 16, "PICKLE")},
        {"a": 7},
        b"{",
        b"[" * 5000,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    write(tmp_path, header)
    with pytest.raises(ArtefactError, match="no readable safetensors"):
        shards.shapes(tmp_path)
    with pytest.raises(ArtefactError, match="no readable safetensors"):
        list(shards.tensors(tmp_path / shards.SINGLE))


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
    monkeypatch.setattr(shards, "_BLOCK", block)
    save_file(TENSORS, tmp_path / "old", metadata={"format": "pt"})
    seen = {}

    def doubled(name, rows, part):
        assert rows.stop - rows.start == len(part)
        assert torch.equal(part, TENSORS[name][rows])
        seen.setdefault(name, []).append(part.numel())
        return (part * 2).to(dtype or part.dtype)

    tensors = {name: t for name, t in TENSORS.items() if name != "one"}
    save_file(tensors, tmp_path / "old", metadata={"format": "pt"})
    size = shards.rewrite(tmp_path / "old", tmp_path / "new", doubled, dtype, whole=lambda name: name == "c")
    expected = {name: (t * 2).to(dtype or t.dtype) for name, t in tensors.items()}
    save_file(expected, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "new").read_bytes() == (tmp_path / "expected").read_bytes()
    assert size == sum(t.numel() * t.element_size() for t in expected.values())
    assert seen["c"] == [33]
    assert max(seen["b"]) == min(600, max(30, block // 30 * 30))


def test_a_fault_in_one_piece_ends_the_rewriting(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(20_000, 2)}, tmp_path / "old", metadata={"format": "pt"})
    monkeypatch.setattr(shards, "_BLOCK", 2)
    seen = []

    def failing(name, rows, part):
        assert torch.get_num_threads() == 1
        seen.append(rows)
        raise ValueError(f"of {name}")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="of a"):
        shards.rewrite(tmp_path / "old", tmp_path / "new", failing, None, whole=lambda _: False)
    assert torch.get_num_threads() == before
    assert len(seen) < 20_000


def test_a_damaged_shard_is_not_rewritten(tmp_path):
    write(tmp_path, {"a": tensor([3], 0, 16)})
    with pytest.raises(ArtefactError, match="no readable safetensors"):
        shards.rewrite(tmp_path / shards.SINGLE, tmp_path / "new", lambda *_: None, None, whole=lambda _: False)
    assert not (tmp_path / "new").exists()


def test_a_shard_that_becomes_shorter_meanwhile_is_told(tmp_path):
    def cut(name, rows, block):
        if not cuts:
            cuts.append(os.truncate(tmp_path / "old", 2**20))
        return block

    cuts = []
    save_file({"a": torch.zeros(2**22)}, tmp_path / "old")
    with pytest.raises(ArtefactError, match="old: became shorter while it was read"):
        shards.rewrite(tmp_path / "old", tmp_path / "new", cut, None, whole=lambda _: False)


@pytest.mark.parametrize("length", [0, 17, 10**8 + 1, 2**63 - 1, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    write(tmp_path, {"a": tensor([4], 0, 16)}, length=length)
    with pytest.raises(ArtefactError, match="no readable safetensors"):
        shards.shapes(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "no valid JSON"),
        ("[]", "must hold an object"),
        ('{"weight_map": 1}', "no index of shards"),
        ('{"weight_map": {"a": 1}}', "no index of shards"),
        ('{"weight_map": {"a": "../outside"}}', "no plain file name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no plain file name"),
        ('{"weight_map": {"a": "x\\u001b[2J"}}', "no plain file name"),
        ('{"weight_map": {"a": ""}}', "no plain file name|missing"),
        ('{"weight_map": {"a": "' + "x" * 300 + '"}}', "no plain file name"),
        ('{"weight_map": {"a": ".."}}', "no plain file name|missing"),
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, index, said):
    save_file({"a": torch.zeros(1)}, tmp_path / "outside")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / shards.INDEX).write_text(index)
    with pytest.raises(ArtefactError, match=said):
        shards.files(tmp_path / "x")
