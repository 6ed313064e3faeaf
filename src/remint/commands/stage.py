"""`remint STAGE`: run one stage of the pipeline. dvc.yaml runs the same command as the stage's `cmd`."""

from collections.abc import Callable
from typing import Annotated

from typer import Argument, Option

from remint.runner import workers


def check_pipeline() -> None:
    """Raise SettingsError if dvc.yaml cannot be read or its stages are not complete."""
    from remint.runner import pipeline  # slow to import, and needed only for this message

    pipeline.check_syntax()


def command_of(stage: str) -> Callable[..., int]:
    """The function that Typer calls for the command of a stage."""

    def main(
        overrides: Annotated[
            list[str] | None, Argument(metavar="[key=value]…", help="Settings for this run alone, like train.lr=1e-3.")
        ] = None,
        cfg: Annotated[bool, Option("--cfg", help="Print the composed settings and exit.")] = False,
    ) -> int:
        from remint.runner.stage import run_stage

        # Hydra's own programs take `--cfg job`, so `job` is accepted here, too.
        settings = [entry for entry in overrides or () if not (cfg and entry == "job")]
        return run_stage(stage, settings, print_settings=cfg)

    main.__doc__ = f"Run the stage {stage} with the settings of params.yaml."
    return main


def local_rank() -> int | None:
    """This process's rank among the processes that torchrun started on this machine; None if it is the only one.

    Raises SettingsError if torchrun's variables are not valid.
    """
    return workers.local_rank()
