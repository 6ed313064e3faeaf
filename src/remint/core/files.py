"""Read JSON that others may have written: only regular files of limited size. Every fault names its file."""

import contextlib
import errno
import json
import math
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from remint.core.errors import ArtefactError, RemintError, brief, got

# The exception class to raise, called with the message.
Fault = Callable[[str], RemintError]
# A tokenizer with a million tokens takes 100 MB. Every other file that is read in one piece is far smaller.
_MAX_BYTES = 256 * 2**20
_AGAIN = "make it again with `dvc repro`"
_NOT_THERE = "not found"
_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class _DoubleKey(Exception):  # noqa: N818  (no ValueError: that would be reported as wrong syntax)
    """An object of a JSON text has a key twice."""


def read_text(path: Path, cure: str, fault: Fault = ArtefactError, limit: int = _MAX_BYTES) -> str:
    """The text of a UTF-8 file without its byte order mark.

    `limit` is the largest accepted size in bytes. Raises `fault` if the file cannot be read; the message ends in
    `cure`, the advice what to do.
    """
    with _reading_errors(path, cure, fault):
        if (size := path.stat().st_size) > limit:
            raise fault(f"{path}: must be at most {limit >> 20} MiB, got {size >> 20} MiB; {cure}")
        return path.read_text(encoding="utf-8-sig")


def read_object(path: Path, cure: str = _AGAIN) -> dict[str, Any]:
    """The content of a JSON file that holds an object. Raises ArtefactError for any other file."""
    return _object(read_text(path, cure), str(path), cure)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of an artefact's JSONL file. Raises ArtefactError if a line is not an object.

    Only a line feed ends a line: U+2028 and similar characters are text.
    """
    rows = []
    with _reading_errors(path, _AGAIN, ArtefactError), path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            rows.append(_object(line, f"{path}: line {number}", _AGAIN))
    return rows


def _object(text: str, where: str, cure: str) -> dict[str, Any]:
    content = parse_json(text, where, cure)
    if not isinstance(content, dict):
        raise ArtefactError(f"{where}: must hold an object, {got(content)}; {cure}")
    # Half of a surrogate pair can only come from an escape. It could neither be written as UTF-8 nor printed.
    if "\\ud" in text.lower() and not is_encodable(json.dumps(content, ensure_ascii=False)):
        raise ArtefactError(f"{where}: holds half of a surrogate pair; {cure}")
    return content


def parse_json(text: str | bytes, where: str, cure: str, fault: Fault = ArtefactError, one_key: str = "") -> Any:
    """The value of a JSON text. Raises `fault`, with `where` in front and `cure` at the end, if it is not valid.

    More is refused than by Python's reader: a key that an object has twice (`one_key` is the advice then, by default
    `cure`), NaN and Infinity, which are not JSON, and a number that a float cannot hold.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_of, parse_constant=_refuse_constant, parse_float=_finite)
    except _DoubleKey as error:
        raise fault(f"{where}: {error}; {one_key or cure}") from None
    except RecursionError:
        raise fault(f"{where}: is nested too deeply; {cure}") from None
    except json.JSONDecodeError as error:
        # If the text is a single line, `where` may already name its line in a longer file.
        line = f"line {error.lineno}, " if "\n" in error.doc.strip() else ""
        raise fault(f"{where}: is not valid JSON at {line}column {error.colno}: {error.msg}; {cure}") from None
    except ValueError as error:
        raise fault(f"{where}: is not valid JSON: {error}; {cure}") from None


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values. Raises _DoubleKey, with both values, if a key is there twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise _DoubleKey(f"an object has the key {brief(key)} twice, {got(seen[key])} and {brief(value)}")
            seen[key] = value
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def check_file(path: Path, cure: str, fault: Fault = ArtefactError) -> None:
    """Raise `fault` unless `path` is a regular file or a link to one. The message says what is there instead."""
    if (found := kind_of(path, cure, fault)) != "a file":
        raise fault(f"{path}: {_NOT_THERE if found is None else f'must be a file, got {found}'}; {cure}")


def check_folder(path: Path, cure: str, fault: Fault = ArtefactError) -> None:
    """Raise `fault` unless `path` is a folder or a link to one. The message says what is there instead."""
    if (found := kind_of(path, cure, fault)) != "a folder":
        raise fault(f"{path}: {_NOT_THERE if found is None else f'must be a folder, got {found}'}; {cure}")


def kind_of(path: Path, cure: str, fault: Fault) -> str | None:
    """What is at `path`, in words like "a file"; None if there is nothing. Raises `fault` if the system does not tell."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to something that does not exist" if path.is_symlink() else None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads back to itself"
        raise fault(f"{path}: cannot be read ({error.strerror}); {cure}") from None
    except ValueError:  # a null character
        return "a name that no file can have"
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")


def is_inside(name: str) -> bool:
    """Whether a name that others wrote stays inside its folder and is printable and short enough for a file system."""
    parts = PurePosixPath(name).parts
    short = name.isprintable() and all(len(part.encode()) <= 255 for part in parts) and len(name.encode()) <= 1000
    return bool(parts) and short and not name.startswith("/") and ".." not in parts


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can encode the text: an escape or a terminal can produce half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _reading_errors(path: Path, cure: str, fault: Fault) -> Iterator[None]:
    try:
        check_file(path, cure, fault)  # reading from a pipe could block forever
        yield
    except FileNotFoundError:
        raise fault(f"{path}: {_NOT_THERE}; {cure}") from None
    except UnicodeDecodeError as error:
        raise fault(f"{path}: byte {error.start} is not UTF-8, the only encoding that is read; {cure}") from None
    except OSError as error:
        raise fault(f"{path}: cannot be read ({error.strerror}); {cure}") from None
