"""`remint recipe`: replace params.yaml by a ready-made one."""

import os
import re
from collections.abc import Sequence
from typing import Annotated

from typer import Argument, Option

from remint.core.errors import RemintError
from remint.core.files import check_file
from remint.core.paths import PARAMS
from remint.runner import recipes

# Families of recipes for GPUs of different sizes, with the fields of their base's config.json that set its size.
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
    force: Annotated[bool, Option("--force", help="Overwrite your own changes.")] = False,
) -> None:
    """Replace params.yaml by a ready-made one.

    A family's name selects the recipe that uses the most of the GPU's free memory.
    """
    known, why = recipes.names(), ""
    if not name:
        raise RemintError(
            "recipe: needs a name, got none; `make recipes` lists them, `make recipe NAME=smoke` puts one in place"
        )
    if name in _FAMILIES:
        name, why = _for_the_gpu(name, known)
    if name not in known:
        raise RemintError(f"recipe: no such recipe, got {name!r}; choose from {', '.join(known)}")
    text = recipes.text(name).encode()
    if os.path.lexists(PARAMS):
        check_file(PARAMS, "move away what is there", RemintError)
    if PARAMS.is_file() and not recipes.is_recipe(PARAMS.read_bytes()) and not force:
        raise RemintError(
            f"{PARAMS}: holds your own changes, which no recipe has; commit or copy them, then add FORCE=1"
        )
    draft = PARAMS.with_name(f".{PARAMS.name}.draft")
    try:
        draft.write_bytes(text)
        draft.replace(PARAMS)
    finally:
        draft.unlink(missing_ok=True)
    print(f"{PARAMS}: now the recipe {name}{why}; `make repro` runs it")


def _for_the_gpu(family: str, known: Sequence[str]) -> tuple[str, str]:
    """The recipe of a family that uses the most of the GPU's free memory, and the reason, to be appended to a message.

    Raises RemintError if there is no GPU or no recipe fits.
    """
    import torch  # slow to import, and no other recipe needs it

    from remint.runner.memory import fitting_recipe

    members = [name for name in known if re.fullmatch(rf"{family}-\d+gb", name)]
    members.sort(key=lambda name: int(name.removeprefix(f"{family}-").removesuffix("gb")))
    choices = f"choose one by name, like `make recipe NAME={members[0]}`, from {', '.join(members)}"
    if not torch.cuda.is_available():
        raise RemintError(f"recipe: {family} depends on the free memory of a GPU, but torch finds no GPU; {choices}")
    free = torch.cuda.mem_get_info()[0]
    if (chosen := fitting_recipe(members, _FAMILIES[family], free)) is None:
        raise RemintError(
            f"recipe: no {family} recipe fits the {free / 2**30:.1f} GiB of free GPU memory; "
            f"end other programs, or {choices}, and lower train.micro_batch"
        )
    return chosen, f", which uses the most of the {free / 2**30:.1f} GiB of free GPU memory"
