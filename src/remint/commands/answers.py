"""`remint answers`: keep the base's own answers, which training asked for, in a file to commit."""

from pathlib import Path
from typing import Annotated

from typer import Argument


def main(
    file: Annotated[Path, Argument(help="File to write; name it in replicate_data.base_answers.")] = Path(
        "data/source/base_answers.json"
    ),
) -> None:
    """Keep the base's own answers, which training asked for, in a file to commit.

    With this file, training does not ask the base again, and every machine trains on the same answers.
    """
    from remint.core.paths import Paths
    from remint.runner import kept_answers

    kept_answers.keep(Paths(), file)
