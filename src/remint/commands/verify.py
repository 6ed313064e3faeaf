"""`remint verify`: check that the artefacts are unchanged, and were made with the settings that are recorded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option

from remint.core import manifest
from remint.core.errors import ArtefactError, RemintError
from remint.core.paths import MADE_BY, Paths
from remint.runner import recorded, run_cache, signature
from remint.stages.merge import provenance


def main(
    of_run_cache: Annotated[
        bool, Option("--run-cache", help="Check DVC's run cache instead, as `make share` does.")
    ] = False,
) -> None:
    """Check every artefact: its checksums, and that params.yaml and dvc.lock name what it was made with.

    For the model, also check its provenance, and its signature if it has one. Raises RemintError that names each file
    or setting that differs.
    """
    if of_run_cache:
        _verify_run_cache()
        return
    faults: list[str] = []
    for stage, kind in MADE_BY.items():
        place: Path = getattr(Paths(), kind)
        found = _faults(stage, kind, place)
        if not found:
            print(f"{place}: as recorded")
        faults += found
    if faults:
        raise ArtefactError(*faults)


def _faults(stage: str, kind: str, place: Path) -> list[str]:
    if (place / manifest.NAME).is_symlink():
        return [f"{place / manifest.NAME}: is a symbolic link; set DVC's cache.type to reflink,copy"]
    checks: list[Callable[[], object]] = [
        partial(manifest.verify, place, kind),
        partial(recorded.check, stage),
        partial(recorded.check_lock, stage),
    ]
    if kind == "model":
        checks += [partial(provenance.verify, place), partial(signature.verify, place)]
    faults: list[str] = []
    for check in checks:
        try:
            check()
        except RemintError as error:
            faults += [fault for fault in error.faults if fault not in faults]
    return faults


def _verify_run_cache() -> None:
    from dvc.repo import Repo  # slow to import

    cache = Path(Repo().cache.legacy.path)
    print(f"{cache / 'runs'}: {run_cache.verify(cache)} entries, as recorded")
