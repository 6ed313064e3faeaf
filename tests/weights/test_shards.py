"""A safetensors file with a false header is refused before memory is allocated."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from remint.core.errors import ArtefactError
from remint.weights import shards


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
    with pytest.raises(ArtefactError, match="not a readable safetensors"):
        shards.shapes(tmp_path)
    with pytest.raises(ArtefactError, match="not a readable safetensors"):
        list(shards.tensors(tmp_path / shards.SINGLE))


@pytest.mark.parametrize("length", [0, 17, 10**8 + 1, 2**63 - 1, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    write(tmp_path, {"a": tensor([4], 0, 16)}, length=length)
    with pytest.raises(ArtefactError, match="not a readable safetensors"):
        shards.shapes(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"weight_map": 1}', "not an index of shards"),
        ('{"weight_map": {"a": 1}}', "not an index of shards"),
        ('{"weight_map": {"a": "../outside"}}', "not a plain file name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a plain file name"),
        ('{"weight_map": {"a": "x\\u001b[2J"}}', "not a plain file name"),
        ('{"weight_map": {"a": ""}}', "not a plain file name|missing"),
        ('{"weight_map": {"a": "' + "x" * 300 + '"}}', "not a plain file name"),
        ('{"weight_map": {"a": ".."}}', "not a plain file name|missing"),
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, index, said):
    save_file({"a": torch.zeros(1)}, tmp_path / "outside")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / shards.INDEX).write_text(index)
    with pytest.raises(ArtefactError, match=said):
        shards.files(tmp_path / "x")
