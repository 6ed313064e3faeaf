"""One rebuild of a commit: a clone of its own, without any cache, run in these surroundings or in quite other ones."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from remint.core.errors import RemintError
from remint.core.paths import CONF, PARAMS
from remint.runner.config import load_yaml

LOCK = "dvc.lock"
_DVC = (sys.executable, "-m", "dvc")
_NOBODY = 65534  # the user without rights, by convention
# What would lead a rebuild back here: another cache, tracking store, repository or set of modules.
_LEFT_HERE = ("DVC", "MLFLOW", "GIT_", "PYTHON")


@dataclass(frozen=True)
class Rebuild:
    """Where and under what one rebuild runs: none of it may show in a result."""

    label: str
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    user: int | None = None
    umask: int = -1
    prefix: Sequence[str] = ()


def clone(here: Path, folder: Path, commit: str) -> None:
    """The commit's files in a folder of their own, with the environment linked in, and a base model too large for git."""
    git(here, "clone", "--quiet", "--no-hardlinks", "--no-checkout", str(here), str(folder))
    git(folder, "checkout", "--quiet", "--detach", commit)
    (folder / ".venv").symlink_to(sys.prefix)
    model = load_yaml(folder / CONF / "model" / f"{load_yaml(folder / PARAMS)['model']}.yaml")
    source = folder / model["location"]
    if model["source"] == "local_folder" and not source.exists() and (here / model["location"]).is_dir():
        source.symlink_to(here / model["location"])  # stage_base compares its every checksum


def say_if_stale(folder: Path) -> None:
    """Name the stages that dvc.lock records with other code, data or settings than the commit has."""
    status = subprocess.run(
        [*_DVC, "status", "--json"], cwd=folder, env=_environment(folder), capture_output=True, text=True, check=True
    )
    for stage, entries in json.loads(status.stdout).items():
        changed = [entry["changed deps"] for entry in entries if isinstance(entry, dict) and "changed deps" in entry]
        # Missing are the outputs of earlier stages, which a clone does not have.
        names = [name for deps in changed for name, state in deps.items() if state != "deleted"]
        names += [entry for entry in entries if isinstance(entry, str)]
        if names:
            print(f"the committed {LOCK} is of another state: {stage} has other {', '.join(names)}")


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_HERE)}
    own = {"DVC_SITE_CACHE_DIR": str(folder / ".dvc/tmp/site"), "DVC_NO_ANALYTICS": "1"}
    return kept | own | {"PYTHONUNBUFFERED": "1"}  # a stage is told when it starts, not when a buffer is full


def elsewhere(place: Path) -> Rebuild:
    """A rebuild in which everything around it is exchanged that can be; says what is and what is not."""
    home = place / "home"
    home.mkdir()
    variables = {
        "HOME": str(home),
        "LC_ALL": "C",
        "LANG": "tr_TR.ISO-8859-9",
        "TZ": "Pacific/Kiritimati",  # where it is tomorrow for most of us
        "PYTHONHASHSEED": "97",
        "OMP_NUM_THREADS": "1",
    }
    becoming, reason = _becoming_nobody(place)
    cores = sorted(os.sched_getaffinity(0)) if shutil.which("taskset") else []
    fewer = ("taskset", "-c", str(cores[-1])) if len(cores) > 1 else ()
    varied = ["a folder with spaces", "an empty HOME", "umask 077"]
    varied += [f"{name}={value}" for name, value in variables.items() if name != "HOME"]
    varied += [f"user {_NOBODY}"] if becoming else []
    varied += [f"one of {len(cores)} cores"] if fewer else []
    skipped = [] if becoming else [f"another user ({reason})"]
    skipped += [] if fewer else ["fewer cores (needs taskset and two of them)"]
    print(f"elsewhere means {', '.join(varied)}" + "".join(f"; skipped: {text}" for text in skipped))
    user = _NOBODY if becoming else None
    return Rebuild("rebuild elsewhere", place / "a folder with spaces", variables, user, 0o077, (*fewer, *becoming))


def _becoming_nobody(place: Path) -> tuple[tuple[str, ...], str]:
    """The start of a command that runs as the user without rights; where there is none, () and why not.

    The environment and `place` must be within that user's reach, unless it is allowed to read everything.
    """
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return (), "needs root and setpriv"
    nobody = ("setpriv", "--reuid", str(_NOBODY), "--regid", str(_NOBODY), "--clear-groups")
    reading = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
    trial = "import dvc, os; os.listdir(os.getcwd())"
    child = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {trial!r}]).returncode)"
    for prefix in (nobody, (*nobody, *reading)):
        if not subprocess.run([*prefix, sys.executable, "-c", child], cwd=place, capture_output=True).returncode:
            return prefix, ""
    return (), f"{sys.prefix} or {place} is out of its reach"


def run(rebuild: Rebuild) -> None:
    """Run every stage, its output in a file beside the clone. Raises RemintError with the end of it if one fails."""
    if rebuild.user is not None:
        for path in (rebuild.folder, rebuild.folder.parent / "home", *rebuild.folder.rglob("*")):
            os.chown(path, rebuild.user, rebuild.user, follow_symlinks=False)
    started, log = time.monotonic(), rebuild.folder.with_name(f"{rebuild.folder.name}.log")
    print(f"\n{rebuild.label} in {rebuild.folder}", flush=True)
    # Neither taken from a cache nor put into one, whatever DVC's settings for this user or machine say.
    command = [*rebuild.prefix, *_DVC, "repro", "--force", "--no-run-cache", "--no-commit"]
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=rebuild.folder,
            env=_environment(rebuild.folder) | dict(rebuild.variables),
            umask=rebuild.umask,
            encoding="utf-8",
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith("Running stage '"):
                print(f"  {duration(time.monotonic() - started):>12}  {line.split(chr(39))[1]}", flush=True)
    print(f"  {duration(time.monotonic() - started):>12}  ended", flush=True)
    if process.returncode:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise RemintError(
            f"reproduce: {rebuild.label} failed with status {process.returncode}; see {log}, which ends\n{end}"
        )


def git(where: Path, *arguments: str) -> str:
    """What a git command prints. Raises RemintError with git's own words if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True)
    except FileNotFoundError:
        raise RemintError("reproduce: git was not found; install it, a commit is what is rebuilt") from None
    if done.returncode:
        raise RemintError(
            f"reproduce: git {arguments[0]}: {done.stderr.strip()}; commit what `make repro` has made first"
        )
    return done.stdout


def duration(seconds: float) -> str:
    """Minutes and seconds for a person."""
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"
