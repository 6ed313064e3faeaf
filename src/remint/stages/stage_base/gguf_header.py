"""Check a GGUF's header against its file before any reader trusts it: counts, lengths, types and offsets of tensors.

Readers loop over the counts in the header and allocate the sizes that it claims. A file of a hundred bytes could
make them allocate all memory. The layout is that of the GGUF specification, versions 2 and 3, little-endian.
"""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from remint.core.errors import ArtefactError
from remint.core.files import check_file

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT = "general.alignment"
# Far above any real model. Readers create an object for each item.
_MOST_FIELDS, _MOST_TENSORS, _MOST_ELEMENTS = 10_000, 100_000, 10_000_000


class _HeaderError(Exception):
    """The header is invalid."""


def check_header(path: Path) -> None:
    """Raise ArtefactError if the header is invalid or claims more than the file holds."""
    check_file(path, "get the file again")
    try:
        with path.open("rb") as file:
            _Header(file, os.fstat(file.fileno()).st_size).check()
    except (_HeaderError, OSError) as error:
        raise ArtefactError(f"{path}: is not a readable GGUF ({error}); get the file again") from None


class _Header:
    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self._elements = 0

    def check(self) -> None:
        if self._take(4) != _MAGIC or self._number("I") not in _VERSIONS:
            raise _HeaderError(f"it must start with GGUF and version {' or '.join(map(str, _VERSIONS))}")
        tensors = self._count("tensors", _MOST_TENSORS)
        fields = self._fields(self._count("fields", _MOST_FIELDS))
        alignment = fields.get(_ALIGNMENT, 32)
        if not (isinstance(alignment, int) and alignment in (8, 16, 32, 64, 128, 256, 512, 1024)):
            raise _HeaderError(f"{_ALIGNMENT} is {alignment}")
        spans = self._spans(tensors, alignment)
        start = -(-self._file.tell() // alignment) * alignment
        end = 0
        for offset, length in sorted(spans):
            if offset < end or start + offset + length > self._size:
                raise _HeaderError("tensors overlap or extend beyond the end of the file")
            end = offset + length

    def _fields(self, count: int) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for _ in range(count):
            name = self._text()
            if name in found:
                raise _HeaderError(f"the field {name!r} occurs twice")
            found[name] = self._value(self._number("I"))
        return found

    def _value(self, kind: int) -> int | None:
        """Skip a value. Returns it if it is an unsigned 32-bit number, else None."""
        if kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            self._elements += count
            if inner == _ARRAY or self._elements > _MOST_ELEMENTS:
                raise _HeaderError("it holds nested arrays or too many array elements")
            if inner == _STRING:
                for _ in range(count):
                    self._text()
            else:
                self._skip(count * self._bytes_of(inner))
        elif kind == _STRING:
            self._text()
        elif kind == 4:
            return self._number("I")
        else:
            self._skip(self._bytes_of(kind))
        return None

    def _spans(self, count: int, alignment: int) -> list[tuple[int, int]]:
        """(offset, bytes) of each tensor. Offsets count from the start of the tensor data."""
        spans, names = [], set()
        for _ in range(count):
            name, dimensions = self._text(), self._number("I")
            if name in names or not 1 <= dimensions <= 4:
                raise _HeaderError(f"the tensor {name!r} occurs twice or has {dimensions} dimensions")
            names.add(name)
            elements = math.prod(self._number("Q") for _ in range(dimensions))
            kind, offset = self._number("I"), self._number("Q")
            if kind not in {known.value for known in GGMLQuantizationType}:
                raise _HeaderError(f"the tensor {name!r} has the unknown type {kind}")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if offset % alignment or elements % block:
                raise _HeaderError(f"the tensor {name!r} is not aligned")
            spans.append((offset, elements // block * block_bytes))
        return spans

    def _bytes_of(self, kind: int) -> int:
        if kind not in _SCALAR_BYTES:
            raise _HeaderError(f"a field has the unknown type {kind}")
        return _SCALAR_BYTES[kind]

    def _count(self, what: str, most: int) -> int:
        count = self._number("Q")
        if count > most:
            raise _HeaderError(f"it claims {count} {what}")
        return count

    def _text(self) -> str:
        try:
            return self._take(self._number("Q")).decode()
        except UnicodeDecodeError:
            raise _HeaderError("a string is not UTF-8") from None

    def _number(self, form: str) -> int:
        value: int = struct.unpack(f"<{form}", self._take(struct.calcsize(form)))[0]
        return value

    def _take(self, count: int) -> bytes:
        self._check_room(count)
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        self._check_room(count)
        self._file.seek(count, os.SEEK_CUR)

    def _check_room(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise _HeaderError("the file ends too early")
