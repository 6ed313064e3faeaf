"""Ready-made params.yaml files: conf/params.yaml is the default, conf/recipe/<name>.yaml holds the differences."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remint.core.errors import RemintError
from remint.core.files import read_text
from remint.core.paths import CONF
from remint.runner.config import load_yaml, parse_yaml

_DEFAULT, _FOLDER = CONF / "params.yaml", CONF / "recipe"


def names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def summary(name: str) -> str:
    """The recipe's first line, which describes its purpose."""
    return _read(_FOLDER / f"{name}.yaml").splitlines()[0].lstrip("# ")


def is_recipe(content: bytes) -> bool:
    """Whether a params.yaml equals a recipe byte for byte."""
    return any(_composed(name).encode() == content for name in names())


def text(name: str) -> str:
    """The recipe as a complete params.yaml, with the default's comments.

    Raises RemintError if it sets an unknown setting.
    """
    path, whole = _FOLDER / f"{name}.yaml", _composed(name)
    if parse_yaml(whole, path) != _merged(load_yaml(_DEFAULT), parse_yaml(_read(path), path)):
        raise RemintError(f"{path}: a value must be on one line, as `name: value`; rewrite it")
    return whole


def _composed(name: str) -> str:
    """The text of conf/params.yaml with the recipe's values. Raises RemintError if it has no such setting."""
    path = _FOLDER / f"{name}.yaml"
    recipe, default = _read(path), _read(_DEFAULT)
    changes = dict(_values(recipe))
    lines = default.split("\n")
    lines[0] = recipe.split("\n", 1)[0]
    rows = {setting: number for number, setting, _ in _lines(default)}
    if unknown := sorted(changes.keys() - rows.keys()):
        raise RemintError(f"{path}: {unknown[0]}: no such setting in {_DEFAULT}; remove it or correct its name")
    for setting, value in changes.items():
        lines[rows[setting]] = _replaced(lines[rows[setting]], value)
    return "\n".join(lines)


def settings(name: str) -> dict[str, Any]:
    """All settings of the recipe."""
    return parse_yaml(text(name), _FOLDER / f"{name}.yaml")


def _read(path: Path) -> str:
    text = read_text(path, "`git checkout conf` restores it", RemintError)
    if not text.strip():
        raise RemintError(f"{path}: is empty; `git checkout conf` restores it")
    return text


def _lines(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, dotted name and the text after the colon, for each `name: …` line of block-style YAML."""
    above: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n")):
        name, colon, rest = line.partition(":")
        indent = len(name) - len(name.lstrip())
        if not colon or not name.strip() or name.lstrip().startswith("#"):
            continue
        above = [*((level, key) for level, key in above if level < indent), (indent, name.strip())]
        yield number, ".".join(key for _, key in above), rest


def _values(text: str) -> Iterator[tuple[str, str]]:
    """Dotted name and value, as written, of each setting; sections are left out."""
    for _, setting, rest in _lines(text):
        if rest.partition(" #")[0].strip():
            yield setting, rest.removeprefix(" ")


def _replaced(line: str, value: str) -> str:
    """A line of the default with another value. Its comment keeps its column, unless the value has its own comment."""
    name, _, rest = line.partition(":")
    before, mark, comment = rest.partition(" #")
    if not mark or " #" in value:
        return f"{name}: {value}"
    return f"{name}: {value:<{len(before) - 1}} #{comment}"


def _merged(default: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`default` with the values of `changes`, section by section."""
    return default | {
        key: _merged(default[key], value) if isinstance(value, dict) and isinstance(default.get(key), dict) else value
        for key, value in changes.items()
    }
