"""`remint STAGE`: run one stage of the pipeline by hand; the same command is the stage's `cmd` in dvc.yaml."""

from collections.abc import Callable
from typing import Annotated

from typer import Argument, Option


def command_of(stage: str) -> Callable[..., int]:
    """The command that runs a stage."""

    def main(
        overrides: Annotated[
            list[str] | None, Argument(metavar="[key=value]…", help="Settings for this run alone, like train.lr=1e-3.")
        ] = None,
        cfg: Annotated[bool, Option("--cfg", help="Print the composed settings and exit.")] = False,
    ) -> int:
        from remint.runner.stage import run_stage

        # Hydra's own programs are called with `--cfg job`.
        settings = [word for word in overrides or () if not (cfg and word == "job")]
        return run_stage(stage, settings, print_settings=cfg)

    main.__doc__ = f"Run the stage {stage} with the settings of params.yaml."
    return main
