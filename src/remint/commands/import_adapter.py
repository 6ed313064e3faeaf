"""`remint import-adapter`: turn an adapter that XTuner trained for InternLM2 into one for the base."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from remint.core.settings import check_ranges


def main(
    path: Annotated[Path, Argument(help="XTuner's .pth, or a folder with adapter_config.json.")],
    to: Annotated[
        Path | None, Option(help="Folder to write; default: `imported` in the adapter's parent folder.")
    ] = None,
    alpha: Annotated[float | None, Option(help="lora_alpha, if the .pth does not record it.")] = None,
) -> None:
    """Turn an adapter of XTuner 0.1 for InternLM2 into one for the base.

    The base and the dataset must exist: `remint stage_base` and `remint replicate_data` make them.
    """
    from remint.core.paths import Paths

    check_ranges("import-adapter", (alpha is None or 0 < alpha <= 1e6, "alpha", alpha, "must be above 0"))
    from remint.runner import memory, xtuner

    paths = Paths()
    with memory.explaining_errors("import-adapter", {}):
        source = xtuner.read_source(path, alpha)
        xtuner.to_llama(source, path, paths.base, paths.dataset, to or paths.adapter.parent / "imported")
