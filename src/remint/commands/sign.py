"""`remint sign`: sign the merged model with an SSH key."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from remint.runner import signature


def main(key: Annotated[Path, Argument(help="Private key, like ~/.ssh/id_ed25519.")]) -> None:
    """Sign the merged model with an SSH key."""
    signature.sign(key)
