"""`remint recipes`: list the ready-made params.yaml files."""

from typing import Annotated

from typer import Argument

from remint.core.errors import RemintError
from remint.runner import recipes


def main(pattern: Annotated[str, Argument(help="Part of a name, like internlm2.")] = "") -> None:
    """List the ready-made params.yaml files."""
    found = [name for name in recipes.names() if pattern.lower() in name.lower()]
    if not found:
        raise RemintError(f"recipes: no recipe matches, got {pattern!r}; leave the pattern out to list all")
    width = max(len(name) for name in found)
    for name in found:
        print(f"{name:<{width}}  {recipes.summary(name)}")
