"""`remint recipe`: put a ready-made params.yaml in place."""

import re
from collections.abc import Sequence
from typing import Annotated

from typer import Argument, Option

from remint.core.errors import RemintError
from remint.core.paths import PARAMS
from remint.runner import recipes

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


def main(
    name: Annotated[str, Argument(help="A recipe of `remint recipes`, or a family like internlm2.")] = "",
    force: Annotated[bool, Option("--force", help="Overwrite changes of yours.")] = False,
) -> None:
    """Put a ready-made params.yaml in place.

    A family's name stands for the recipe of it that makes the most of the GPU's free memory.
    """
    known, why = recipes.names(), ""
    if not name:
        raise RemintError(
            "recipe: needs a name, got none; `make recipes` lists them, `make recipe NAME=smoke` takes one"
        )
    if name in _FAMILIES:
        name, why = _for_the_gpu(name, known)
    if name not in known:
        raise RemintError(f"recipe: no such recipe, got {name!r}; choose from {', '.join(known)}")
    text = recipes.text(name).encode()
    if PARAMS.is_file() and not recipes.is_recipe(PARAMS.read_bytes()) and not force:
        raise RemintError(f"{PARAMS}: holds changes of yours that no recipe has; commit or copy them, then add FORCE=1")
    draft = PARAMS.with_name(f".{PARAMS.name}.draft")
    try:
        draft.write_bytes(text)
        draft.replace(PARAMS)
    finally:
        draft.unlink(missing_ok=True)
    print(f"{PARAMS}: now the recipe {name}{why}; `make repro` runs it")


def _for_the_gpu(family: str, known: Sequence[str]) -> tuple[str, str]:
    """The recipe of a family that makes the most of the GPU's free memory, and the words for that. Raises RemintError."""
    import torch  # slow to import, and no other recipe needs it

    from remint.runner.memory import fitting_recipe

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
