"""`remint export`: write the merged model in the layout of its base."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


class Layout(StrEnum):
    """The supported layouts."""

    internlm2 = "internlm2"


def main(
    layout: Annotated[Layout, Argument(help="Model family whose tensor names, config and tokenizer files to write.")],
    folder: Annotated[
        Path | None, Argument(help="Folder to write; default: `export` in the model's parent folder.")
    ] = None,
    model: Annotated[Path | None, Option(help="Folder of the model; default: the pipeline's.")] = None,
) -> None:
    """Write the merged model in another layout, for tools that require it."""
    from remint.core.paths import Paths
    from remint.runner import memory
    from remint.serving import export

    paths = Paths()
    with memory.explaining_errors("export", {}):
        export.to_internlm2(model or paths.model, paths.base, folder or paths.model.parent / "export")
