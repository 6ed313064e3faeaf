"""Guards in DVC's own process: DVC removes nothing that no stage wrote, and records nothing but what ran.

DVC removes a stage's output before it starts the stage, and it records settings and inputs as they are when the stage
has ended. No check inside a stage can see either. So these functions wrap four of DVC's own when DVC imports them
(dvc_hook.py). Stages of dvc.yaml that do not run remint are left alone.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from remint.core.errors import RemintError
from remint.core.manifest import check_place
from remint.core.paths import ARTEFACTS, MADE_BY, Paths


def guard_stage(module: Any) -> None:
    """`dvc repro` and `dvc exp run`: judge a place before it is removed, and a result before it is recorded."""
    stage_class = module.Stage
    remove_outs, save_outs = stage_class.remove_outs, stage_class.save_outs

    @wraps(remove_outs)
    def judged(self: Any, *arguments: Any, **options: Any) -> None:
        _check_places(_places_of(self))
        self.__dict__["_remint_started"] = [dep.get_hash() for dep in self.deps] if _name(self) else None
        remove_outs(self, *arguments, **options)

    @wraps(save_outs)
    def compared(self: Any, *arguments: Any, **options: Any) -> None:
        if name := _name(self):
            _check_unchanged(self, name)
            _run("-m", "remint.runner.recorded", name, cwd=self.wdir)
        save_outs(self, *arguments, **options)

    stage_class.remove_outs, stage_class.save_outs = judged, compared


def guard_checkout(module: Any) -> None:
    """`dvc checkout`, `dvc pull`, `dvc exp run` and `dvc exp apply`: judge the places that would change."""
    apply = module.apply

    @wraps(apply)
    def judged(diff: Any, path: str, *arguments: Any, **options: Any) -> None:
        changing = [*diff.changes, *(entry.key for entry in diff.dirs_failed)]
        known = {tuple(place.parts): kind for place, kind in _fixed_places()}
        touched = {key: kind for key, kind in known.items() if any(changed[: len(key)] == key for changed in changing)}
        _check_places((Path(path, *key), kind) for key, kind in touched.items())
        apply(diff, path, *arguments, **options)

    module.apply = judged


def guard_push(module: Any) -> None:
    """`dvc push --run-cache`: share no result under settings that did not make it."""
    push = module.StageCache.push

    @wraps(push)
    def verified(self: Any, *arguments: Any, **options: Any) -> Any:
        _run("-m", "remint", "verify", "--run-cache", cwd=self.repo.root_dir)
        return push(self, *arguments, **options)

    module.StageCache.push = verified


def _check_unchanged(stage: Any, name: str) -> None:
    """Compare the dependencies that DVC is about to record with those at the stage's start."""
    started = stage.__dict__.pop("_remint_started", None)
    changed = [str(dep) for dep, before in zip(stage.deps, started or (), strict=False) if dep.hash_info != before]
    if changed:
        raise _refusal(
            f"{name}: {', '.join(changed)} changed while the stage ran, so its result is not recorded; undo the change "
            "and run the same command, or run it as it is to start anew"
        )


def _places_of(stage: Any) -> Iterator[tuple[Path, str]]:
    """The places of a stage's outputs, with the kind of artefact; none for a stage that does not run remint."""
    if (kind := MADE_BY.get(_name(stage) or "")) is None:
        return
    fixed = Path(stage.repo.root_dir, *(place for place, own in _fixed_places() if own == kind))
    outs = [Path(out.fs_path) for out in stage.outs]
    yield from {fixed if fixed == out or fixed in out.parents else out: kind for out in outs}.items()


def _fixed_places() -> Iterator[tuple[Path, str]]:
    yield from ((getattr(Paths(), kind), kind) for kind in ARTEFACTS)


def _check_places(places: Iterable[tuple[Path, str]]) -> None:
    for place, kind in places:
        shown = Path(os.path.relpath(place))
        try:
            check_place(shown, kind)
        except RemintError as error:
            raise _refusal(str(error)) from None


def _name(stage: Any) -> str | None:
    """The name of the remint stage that a stage of dvc.yaml runs."""
    _, found, rest = str(stage.cmd or "").partition("python -m remint ")
    return rest.split()[0] if found and rest.split() else None


def _run(*arguments: str, cwd: str) -> None:
    """Run Python on the code of the working tree. Raises DVC's exception with the last lines of stderr if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cwd, "src"))}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise _refusal(done.stderr.strip().removeprefix("error: ")[-2000:])


def _refusal(message: str) -> Exception:
    from dvc.exceptions import DvcException

    return DvcException(message)
