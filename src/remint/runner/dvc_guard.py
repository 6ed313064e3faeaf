"""Guards in DVC's own process: DVC removes nothing that no stage wrote, and records nothing but what ran.

DVC removes a stage's output before it starts the stage, and it records settings and inputs as they are when the stage
has ended. No check inside a stage can see either. So these functions wrap some of DVC's own when DVC imports
them (dvc_hook.py). Stages of dvc.yaml that do not write to the folders of remint's artefacts are left alone.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from remint.core.declared import AGAIN
from remint.core.draft import check_draft, check_place
from remint.core.errors import RemintError
from remint.core.paths import ARTEFACTS, MADE_BY, Paths
from remint.core.process import end_with_parent

_FIXED = tuple((getattr(Paths(), kind), kind) for kind in ARTEFACTS)
# A stage's command, however Python or the entry point is called.
_COMMAND = re.compile(r"\bremint\s+(\w+)")


def guard_stage(module: Any) -> None:
    """`dvc repro` and `dvc exp run`: judge a place before it is removed, and a result before it is recorded."""
    stage_class = module.Stage
    run, remove_outs, save_outs = stage_class.run, stage_class.remove_outs, stage_class.save_outs

    @wraps(run)
    def watched(self: Any, *arguments: Any, **options: Any) -> None:
        self.__dict__["_remint_started"] = [dep.get_hash() for dep in self.deps] if _kinds_of(self) else None
        run(self, *arguments, **options)

    @wraps(remove_outs)
    def judged(self: Any, *arguments: Any, **options: Any) -> None:
        if _kinds_of(self):  # what the stage itself would refuse after this removal
            root = Path(self.repo.root_dir)
            _check_places(_places_of(self) | {(root / place, kind) for place, kind in _FIXED})
        remove_outs(self, *arguments, **options)

    @wraps(save_outs)
    def compared(self: Any, *arguments: Any, **options: Any) -> None:
        _check_unchanged(self)
        for stage, kind in MADE_BY.items():
            if kind in _kinds_of(self):
                _run("-m", "remint.runner.recorded", stage, cwd=self.wdir)
        save_outs(self, *arguments, **options)

    stage_class.run, stage_class.remove_outs, stage_class.save_outs = watched, judged, compared


def guard_checkout(module: Any) -> None:
    """`dvc checkout`, `dvc pull`, `dvc exp run` and `dvc exp apply`: judge the places that would change."""
    apply = module.apply

    @wraps(apply)
    def judged(diff: Any, path: str, *arguments: Any, **options: Any) -> None:
        changing = [Path(*key) for key in (*diff.changes, *(entry.key for entry in diff.dirs_failed))]
        places = {found for key in changing for found in _places_at(key, Path(path))}
        outs = _declared_outs(Path(path))
        _check_places(
            places | {(out, kind) for key in changing for out, kind in outs if Path(path, key).is_relative_to(out)}
        )
        apply(diff, path, *arguments, **options)

    module.apply = judged


def guard_links(module: Any) -> None:
    """`dvc checkout` after an output was taken out of dvc.yaml: DVC removes what it had linked there."""
    remove_links = module.State.remove_links

    @wraps(remove_links)
    def judged(self: Any, unused: Iterable[str], fs: Any) -> None:
        paths = list(unused)
        _check_places({found for path in paths for found in _places_at(Path(path), Path(self.root_dir))})
        remove_links(self, paths, fs)

    module.State.remove_links = judged


def guard_apply(module: Any) -> None:
    """`dvc exp apply`: judge all places and the edited files before anything is overwritten."""
    apply = module._apply

    @wraps(apply)
    def judged(repo: Any, *arguments: Any, **options: Any) -> None:
        root = Path(repo.root_dir)
        _check_places({(root / place, kind) for place, kind in _FIXED})
        command = ["git", "status", "--porcelain", "-z", "--untracked-files=no"]
        changed = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.split("\0")
        names = sorted({line[3:] for line in changed} - {"", "dvc.lock", "params.yaml"})
        if names:
            raise _refusal(
                f"{', '.join(names)}: changed and not committed, and the change would be lost; commit it first"
            )
        edited = any(line[3:] == "params.yaml" for line in changed)
        apply(repo, *arguments, **options)
        if edited:  # as after `dvc exp run`, so it is no reason to refuse
            print("params.yaml as it was: git show refs/exps/apply/stash:params.yaml", file=sys.stderr)

    module._apply = judged


def guard_push(module: Any) -> None:
    """`dvc push --run-cache`: share no result under settings that did not make it."""
    push = module.StageCache.push

    @wraps(push)
    def verified(self: Any, *arguments: Any, **options: Any) -> Any:
        _run("-m", "remint", "verify", "--run-cache", cwd=self.repo.root_dir)
        return push(self, *arguments, **options)

    module.StageCache.push = verified


def _check_unchanged(stage: Any) -> None:
    """Compare the dependencies that DVC is about to record with those at the stage's start."""
    started = stage.__dict__.pop("_remint_started", None)
    changed = [str(dep) for dep, before in zip(stage.deps, started or (), strict=False) if dep.hash_info != before]
    if changed:
        raise _refusal(
            f"{stage.name}: {', '.join(changed)} changed while the stage ran, so its result is not recorded; {AGAIN}"
        )


def _places_of(stage: Any) -> set[tuple[Path, str]]:
    """The places of artefacts that a stage's outputs touch, each with its kind.

    An output of a remint stage in another place is judged as if it were the artefact's place.
    """
    root = Path(stage.repo.root_dir)
    own = MADE_BY.get(stage_of(stage.cmd) or "")
    found: set[tuple[Path, str]] = set()
    for out in stage.outs:
        path = Path(out.fs_path)
        touched = _places_at(path.relative_to(root), root) if path.is_relative_to(root) else set()
        found |= touched or ({(path, own)} if own else set())
    return found


def _kinds_of(stage: Any) -> set[str]:
    """The kinds of artefacts that a stage writes; none for a stage of the user that has nothing to do with remint."""
    own = MADE_BY.get(stage_of(stage.cmd) or "")
    return {kind for _, kind in _places_of(stage)} | ({own} if own else set())


def stage_of(cmd: object) -> str | None:
    """The name of the remint stage that the `cmd` of a stage of dvc.yaml runs; None if it runs none."""
    command = " ".join(map(str, cmd)) if isinstance(cmd, list) else str(cmd or "")
    return next((name for name in _COMMAND.findall(command) if name in MADE_BY), None)


def _places_at(path: Path, root: Path) -> set[tuple[Path, str]]:
    """The fixed places that are, contain or lie in a path relative to `root`, as paths under `root`."""
    return {
        (root / place, kind)
        for place, kind in _FIXED
        if path == place or place in path.parents or path in place.parents
    }


def _declared_outs(root: Path) -> list[tuple[Path, str]]:
    """The outputs of remint's stages in dvc.yaml, wherever they are, each with its kind of artefact."""
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, TypeError):
        stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        return [
            (root / (out if isinstance(out, str) else next(iter(out))), kind)
            for stage in stages.values()
            if (kind := MADE_BY.get(stage_of(stage.get("cmd")) or ""))
            for out in stage.get("outs") or ()
            if kind != "report"  # its outputs are single files of the fixed place
        ]
    return []


def _check_places(places: Iterable[tuple[Path, str]]) -> None:
    for place, kind in places:
        shown = Path(os.path.relpath(place))
        try:
            check_place(shown, kind)
            check_draft(shown)
        except RemintError as error:
            raise _refusal(str(error)) from None


def _run(*arguments: str, cwd: str) -> None:
    """Run Python on the code of the working tree. Raises DVC's exception with the last lines of stderr if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cwd, "src"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=end_with_parent,
    )
    if done.returncode:
        raise _refusal(done.stderr.strip().removeprefix("error: ")[-2000:])


def _refusal(message: str) -> Exception:
    from dvc.exceptions import DvcException

    return DvcException(message)
