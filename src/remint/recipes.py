"""Ready-made params.yaml files: list them, put one in place."""

import re
from collections.abc import Sequence
from pathlib import Path

from remint.core.config import load_yaml
from remint.core.errors import RemintError
from remint.core.paths import CONF, PARAMS

_FOLDER = CONF / "recipe"
# Families of recipes that differ in the GPU they are for, with what the config.json of their base says of its size.
_FAMILIES = {
    "internlm2": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 24,
        "vocab_size": 92544,
    }
}


def main(command: str, arguments: Sequence[str]) -> int:
    """`recipes [PATTERN]` lists, `recipe NAME [--force]` replaces params.yaml.

    A family's name, like internlm2, stands for the one of its recipes that the free memory of the GPU here allows.
    """
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
    why = ""
    if name in _FAMILIES:
        name, why = _for_the_gpu(name, known)
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
    print(f"{PARAMS}: now the recipe {name}{why}; `make repro` runs it")
    return 0


def _for_the_gpu(family: str, known: Sequence[str]) -> tuple[str, str]:
    """The recipe of a family that makes the most of the GPU's free memory, and the words for that. Raises RemintError."""
    import torch  # slow to import, and no other recipe needs it

    from remint.memory import fitting_recipe

    members = [name for name in known if re.fullmatch(rf"{family}-\d+gb", name)]
    members.sort(key=lambda name: int(name.removeprefix(f"{family}-").removesuffix("gb")))
    choices = f"take one by its name, like `make recipe NAME={members[0]}`, of {', '.join(members)}"
    if not torch.cuda.is_available():
        raise RemintError(f"recipe: {family} goes by the free memory of a GPU, and torch sees none here; {choices}")
    free = torch.cuda.mem_get_info()[0]
    if (chosen := fitting_recipe(members, _FAMILIES[family], free)) is None:
        raise RemintError(
            f"recipe: none of {family} fits the {free / 2**30:.1f} GiB of GPU memory that are free; end other programs, or {choices}, "
            "and lower train.micro_batch"
        )
    return chosen, f", which makes the most of the {free / 2**30:.1f} GiB of GPU memory that are free"
