"""Ready-made params.yaml files: list them, put one in place."""

from collections.abc import Sequence
from pathlib import Path

from remint.core.config import load_yaml
from remint.core.errors import RemintError
from remint.core.paths import CONF, PARAMS

_FOLDER = CONF / "recipe"


def main(command: str, arguments: Sequence[str]) -> int:
    """`recipes [PATTERN]` lists, `recipe NAME [--force]` replaces params.yaml."""
    if command == "recipes":
        return _list(arguments[0] if arguments else "")
    names = [argument for argument in arguments if not argument.startswith("-")]
    if len(names) != 1:
        raise RemintError(
            f"recipe: needs one name, got {names}; `make recipes` lists them, `make recipe NAME=smoke` takes one"
        )
    return _choose(names[0], "--force" in arguments)


def _list(pattern: str) -> int:
    found = [path for path in sorted(_FOLDER.glob("*.yaml")) if pattern.lower() in path.stem.lower()]
    if not found:
        raise RemintError(f"recipes: none matches, got {pattern!r}; without a pattern all are listed")
    width = max(len(path.stem) for path in found)
    for path in found:
        print(f"{path.stem:<{width}}  {_summary(path)}")
    return 0


def _summary(path: Path) -> str:
    """The recipe's first line, which says what it is for."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _choose(name: str, force: bool) -> int:
    known = sorted(file.stem for file in _FOLDER.glob("*.yaml"))
    if name not in known:
        raise RemintError(f"recipe: no such recipe, got {name!r}; choose from {', '.join(known)}")
    path = _FOLDER / f"{name}.yaml"
    load_yaml(path)
    recipes = [file.read_bytes() for file in _FOLDER.glob("*.yaml")]
    if PARAMS.is_file() and PARAMS.read_bytes() not in recipes and not force:
        raise RemintError(f"{PARAMS}: holds changes of yours that no recipe has; commit or copy them, then add FORCE=1")
    draft = PARAMS.with_name(f".{PARAMS.name}.draft")
    try:
        draft.write_bytes(path.read_bytes())
        draft.replace(PARAMS)
    finally:
        draft.unlink(missing_ok=True)
    print(f"{PARAMS}: now the recipe {name}; `make repro` runs it")
    return 0
