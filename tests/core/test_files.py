"""Foreign files are read only if they are valid; a pipe, a file beyond the limit or code is never read or executed."""

import json
import os
import re
from pathlib import Path

import pytest

from remint.core import files
from remint.core.errors import ArtefactError, DataError, RemintError, got
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON"),
        (b"[1]", "must hold an object, got [1]"),
        (b'{"a": NaN}', "is not valid JSON: NaN is not a number of JSON"),
        (b'{"a": -Infinity}', "is not valid JSON: -Infinity is not a number of JSON"),
        (b'{"a": [1e999]}', "is not valid JSON: the number 1e999 is too large"),
        (b'{"a": ["\\uD800"]}', "half of a surrogate pair"),
    ],
    ids=["cut", "bytes", "nested", "number", "list", "nan", "infinity", "large", "surrogate"],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, said):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtefactError) as caught:
        files.read_object(tmp_path / "x.json", "get it again")
    assert said in str(caught.value)
    assert str(caught.value).endswith("; get it again")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "an object has the key 'a' twice, got 1 and 3; get it again"),
        ('{"x": [{"y": {"a": [1], "a": "2"}}]}', "an object has the key 'a' twice, got [1] and '2'; get it again"),
        ('{"a": 1, "\\u0061": 1}', "an object has the key 'a' twice, got 1 and 1; get it again"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_values(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArtefactError) as caught:
        files.read_object(tmp_path / "x.json", "get it again")
    assert str(caught.value) == f"{tmp_path / 'x.json'}: {said}"


def test_no_other_module_parses_json():
    """Any other parser would accept what files.parse_json refuses. Two modules only read what the other has written."""
    found = [
        path.name
        for path in sorted((ROOT / "src/remint").rglob("*.py"))
        if re.search(r"\bjson\.loads?\(", path.read_text(encoding="utf-8"))
    ]
    assert found == ["files.py", "recorder.py", "tracking.py"]


def test_a_file_that_cannot_be_read_is_reported():
    with pytest.raises(ArtefactError, match=r"/proc/self/mem: cannot be read \(Input/output error\)"):
        files.read_text(Path("/proc/self/mem"), "get it again")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(DataError, match="must be a file, got a pipe"):
        files.read_text(tmp_path / "x.json", "get it again", DataError)


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(300 << 20)  # sparse: takes no disk space
    with pytest.raises(ArtefactError, match="at most 256 MiB, got 300 MiB"):
        files.read_object(tmp_path / "x.json")


def test_only_a_line_feed_ends_a_row(tmp_path):
    rows = [{"text": "a\u2028b\u0085c\rd"}, {"text": "e"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8", newline="")
    assert files.read_rows(tmp_path / "x.jsonl") == rows


@pytest.mark.parametrize("line", ["{", "[]", "7"])
def test_a_row_that_is_no_object_is_refused_with_its_line(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(f"{{}}\n{line}\n")
    with pytest.raises(ArtefactError, match="line 2"):
        files.read_rows(tmp_path / "x.jsonl")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, list(range(10**6)), nested(5000), 1 << 40_000, {"k" * 10**6: 1}],
    ids=["text", "list", "nested", "number", "key"],
)
def test_a_value_is_shown_in_a_line_however_large_it_is(value):
    assert len(got(value)) <= 100


def test_no_fault_can_drive_a_terminal():
    error = RemintError("a file named \x1b[2J\x9b31m\u202e\udcff: bad")
    assert str(error) == error.faults[0] == "a file named [2J31m\\xff: bad"
