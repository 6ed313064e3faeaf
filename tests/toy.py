"""The project with stages that compute nothing: the same dvc.yaml, settings and commands, and an answer in a second."""

import os
import shutil
from pathlib import Path

from remint.core.paths import MADE_BY
from tests.workplace import STAGES, Workplace, clone

# A stage that writes small files. While .scratch/hold exists it waits, before and after it publishes its artefact.
_RUN = '''
"""A stage for tests."""

import time
from pathlib import Path

from remint.core.draft import artefact
from remint.stages.merge import provenance

HERE = Path({root!r}) / ".scratch"


def wait(where):
    while (HERE / ("hold-" + where)).exists():
        (HERE / ("at-" + where)).touch()
        time.sleep(0.02)


def run(*, paths, declared, log, **settings):
    with artefact(paths.{kind}, "{kind}", before_publishing=declared.check_unchanged) as (draft, facts):
        for name in {names!r}:
            (draft / name).write_text(declared.fingerprint)
        facts.update(made_by={{"{stage}": declared.record}}, name="A", identity={{"name": "A", "maker": "B"}})
        if "{kind}" == "model":
            source = {{"kind": "local_folder", "location": "folder", "revision": None}}
            base, dataset = {{"source": source, "source_files": {{}}}}, {{"identity": {{}}, "sources": {{}}}}
            provenance.write(draft, base, dataset, facts["made_by"])
        if {metrics}:
            (draft / "metrics.json").write_text('{{"merged": {{"name": 1}}}}')
        wait("inside")
    wait("after")
'''
_REPORT = ("curves.csv", "report.html", "transcript.jsonl")
# Tracking imports MLflow, which takes longer than everything else here.
_UNTRACKED = """
import contextlib
from remint.core.log import silent


def stage_run(*_):
    return contextlib.nullcontext(silent)
"""


def new(root: Path) -> Workplace:
    """A committed copy of the project at `root` with toy stages, before its first run."""
    made = clone(root, "cpu", {})
    for stage, kind in MADE_BY.items():
        names = _REPORT if kind == "report" else ("file", "sub.txt")
        text = _RUN.format(root=str(root), stage=stage, kind=kind, names=names, metrics=kind == "report")
        (root / f"src/remint/stages/{stage}/run.py").write_text(text, encoding="utf-8")
    (root / "src/remint/runner/tracking.py").write_text(_UNTRACKED, encoding="utf-8")
    (root / ".scratch").mkdir()
    made.run("git", "init", "-q", "-b", "main")
    made.run("git", "add", "-A")
    made.run("git", "commit", "-q", "-m", "start")
    return made


def built(root: Path) -> Workplace:
    """The same after its first `dvc repro`, committed and shared to the folder `remote` beside it."""
    made = new(root)
    assert made.repro() == STAGES
    made.run("git", "add", "-A")
    made.run("git", "commit", "-q", "-m", "built")
    made.run("dvc", "remote", "add", "-q", "-d", "team", str(root.parent / "remote"))
    made.run("dvc", "push", "-q", "--run-cache")
    made.run("git", "commit", "-q", "-a", "-m", "remote")
    for kind in MADE_BY.values():
        shutil.copytree(made.root / "data" / kind, _kept(made) / kind)
    for place in _run_caches(made):
        shutil.copytree(place, _kept(made) / place.parent.name)
    return made


def restore(made: Workplace) -> None:
    """Undo everything that a test has changed."""
    for path in [*(made.root / ".scratch").glob("hold-*"), *(made.root / ".scratch").glob("at-*")]:
        path.unlink()
    for path in [*made.root.glob("data/*"), *made.root.glob("data/.*"), made.root / "thesis"]:
        if path.name in ("source", ".gitignore"):
            continue
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
    made.run("git", "checkout", "-q", "--", ".")
    made.run("git", "clean", "-q", "-d", "--force", "src", "conf", "data")
    for path in (made.root / "docker").iterdir():
        os.utime(path, (0, 0))  # make would set up the environment again for a newer one
    for kind in MADE_BY.values():  # DVC would need seconds for it
        shutil.copytree(_kept(made) / kind, made.root / "data" / kind)
    for place in _run_caches(made):
        shutil.rmtree(place)
        shutil.copytree(_kept(made) / place.parent.name, place)


def _run_caches(made: Workplace) -> tuple[Path, Path]:
    """The run cache, and the remote's."""
    return made.root / ".dvc/cache/runs", made.root.parent / "remote/runs"


def _kept(made: Workplace) -> Path:
    """A copy of the artefacts and of the run caches outside of the project."""
    return made.root.parent / "kept"
