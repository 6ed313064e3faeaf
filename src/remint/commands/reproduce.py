"""`remint reproduce`: rebuild the committed pipeline elsewhere, from scratch, and compare every byte.

A rebuild is compared with:

- the committed dvc.lock, by DVC's own hashes. DVC computes them independently from names and contents. The manifests
  of the artefacts would prove less: the code under test writes them.
- the artefacts under data/, if there are any, and the first rebuild: file by file, by size and sha256. dvc.lock has one
  hash per folder, which does not show which of its files differs.

A rebuild shares only the virtual environment (.venv) with the folder that it is started from. DVC gets an empty cache,
MLflow an empty database, and there are no checkpoints to continue from.
"""

import filecmp
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Option

from remint.core import manifest
from remint.core.errors import RemintError, Stopped, got
from remint.core.paths import Paths
from remint.runner.config import load_yaml
from remint.runner.rebuild import LOCK, Rebuild, clone, duration, elsewhere, git, run, warn_if_stale

_FIXED = list(vars(Paths()).values())
_SHOWN = 12  # differences printed per artefact


def main(
    times: Annotated[int, Option(metavar="N", help="Number of rebuilds.")] = 1,
    vary: Annotated[bool, Option("--vary", help="Rebuild once more as another user in another environment.")] = False,
) -> None:
    """Rebuild the last commit elsewhere and compare every byte.

    The rebuilds are kept if a byte differs or a stage fails.
    """
    if times < 1:
        raise RemintError(f"reproduce: --times must be 1 or more, {got(times)}; give the number of rebuilds")
    here, started = Path.cwd(), time.monotonic()
    commit = git(here, "rev-parse", "HEAD").strip()
    lock = git(here, "show", f"{commit}:./{LOCK}")
    place = Path(tempfile.mkdtemp(prefix="remint-reproduce-"))
    place.chmod(0o755)  # another user must be able to enter
    committed = place / f"committed-{LOCK}"
    try:
        committed.write_text(lock, encoding="utf-8")
        _print_uncommitted(here)
        rebuilds = [Rebuild(f"rebuild {n}", place / f"rebuild-{n}") for n in range(1, times + 1)]
        rebuilds += [elsewhere(place)] if vary else []
        print(f"commit {commit[:12]}: a rebuild takes as long as `make repro` from scratch", flush=True)
        for rebuild in rebuilds:
            clone(here, rebuild.folder, commit)
            if rebuild is rebuilds[0]:
                warn_if_stale(rebuild.folder)
            run(rebuild)
        differing = compare(here, rebuilds, committed)
    except (Stopped, KeyboardInterrupt):
        shutil.rmtree(place)
        raise
    except BaseException:
        print(f"kept for inspection: {place}", flush=True)
        raise
    if differing:
        raise RemintError(
            f"reproduce: not identical: {', '.join(differing)}; see above, the rebuilds are kept in {place}"
        )
    shutil.rmtree(place)
    print(f"\nreproduced: every byte of commit {commit[:12]}, in {duration(time.monotonic() - started)}")


def compare(here: Path, rebuilds: Sequence[Rebuild], committed: Path) -> list[str]:
    """Print one row per artefact, with its differences below. Returns the names of the artefacts that differ.

    `committed` is the dvc.lock that every rebuild should equal. `here` contains the present artefacts, if any.
    """
    first, expected = rebuilds[0].folder, _hashes(committed)
    outs = {*expected, *_hashes(first / LOCK)}
    differing = []
    places = sorted({_place(out) for out in outs}, key=_order)
    width = max([18, *(len(place) + 2 for place in places)])
    print(f"\n{'':<{width}}{'files':>6}{'bytes':>16}  sha256")
    for place in places:
        mine = sorted(out for out in outs if _place(out) == place)
        faults = []
        for rebuild in rebuilds:
            made = _hashes(rebuild.folder / LOCK)
            changed = [out for out in mine if made.get(out) != expected.get(out)]
            faults += [f"{rebuild.label}: {out}: {made.get(out)}, committed {expected.get(out)}" for out in changed]
            for label, folder in ((f"{place} here", here), (rebuilds[0].label, first)):
                if (folder / place).exists() and folder != rebuild.folder:
                    found = _differences(rebuild.folder / place, folder / place)
                    faults += [f"{rebuild.label} against {label}: {fault}" for fault in found]
        files = _inventory(first / place)
        size = sum(facts["bytes"] for facts in files.values())
        _row(f"{place:<{width}}{len(files):>6}{size:>16,}  {manifest.digest(files)[:12]}", faults)
        differing += [place] if faults else []
    faults = [
        f"{r.folder / LOCK}: not the committed one"
        for r in rebuilds
        if not filecmp.cmp(r.folder / LOCK, committed, False)
    ]
    _row(f"{LOCK:<{width}}{1:>6}{committed.stat().st_size:>16,}  {manifest.file_digest(committed)[:12]}", faults)
    return differing + ([LOCK] if faults else [])


def _place(out: str) -> str:
    """The artefact that an output of dvc.yaml belongs to; the output itself if it is of a stage of the user's own."""
    return next((str(place) for place in _FIXED if place in (Path(out), *Path(out).parents)), out)


def _order(place: str) -> tuple[int, str]:
    """The artefacts in the order of the stages, then all others."""
    return _FIXED.index(Path(place)) if Path(place) in _FIXED else len(_FIXED), place


def _differences(rebuilt: Path, other: Path) -> list[str]:
    if not (rebuilt.is_file() or other.is_file()):
        return list(manifest.differences(rebuilt, manifest.inventory(other)))
    same = rebuilt.is_file() and other.is_file() and filecmp.cmp(rebuilt, other, shallow=False)
    return [] if same else [f"{rebuilt}: content differs"]


def _inventory(place: Path) -> dict[str, manifest.Entry]:
    """Size and sha256 of every file in a folder, or of a single file."""
    return {place.name: manifest.described([place])[place]} if place.is_file() else manifest.inventory(place)


def _row(text: str, faults: Sequence[str]) -> None:
    """Print one row of the comparison with its verdict, then its differences."""
    print(f"{text}  {'DIFFERS' if faults else 'identical'}")
    for line in [*faults[:_SHOWN], *([f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else [])]:
        print(f"    {line}")


def _hashes(lock: Path) -> dict[str, str]:
    """DVC's hash of each output that a dvc.lock records."""
    return {out["path"]: out["md5"] for stage in load_yaml(lock)["stages"].values() for out in stage.get("outs", [])}


def _print_uncommitted(here: Path) -> None:
    """Print the changes that a rebuild of the last commit does not contain."""
    changed = [line[3:] for line in git(here, "status", "--porcelain").splitlines()]
    if changed:
        names = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        print(f"not committed, so not part of the rebuild: {names}")
