"""One rebuild of a commit: a fresh clone without any cache, run in this environment or in a very different one."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from remint.core import signals
from remint.core.errors import RemintError, Stopped
from remint.core.files import parse_json
from remint.core.paths import CONF, PARAMS
from remint.core.process import end_with_parent
from remint.runner.config import load_yaml

LOCK = "dvc.lock"
_DVC = (sys.executable, "-m", "dvc")
_NOBODY = 65534  # by convention the user without permissions
# Variables that a rebuild must not inherit: they name this machine's caches, tracking stores, repositories and modules.
_LEFT_HERE = ("DVC", "MLFLOW", "GIT_", "PYTHON")

# Seconds that the processes of a rebuild have to end after a signal: a training saves its step first.
_GRACE_S = 60.0


@dataclass(frozen=True)
class Rebuild:
    """The folder and environment of one rebuild. Neither may affect the result."""

    label: str
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    user: int | None = None
    umask: int = -1
    prefix: Sequence[str] = ()


def clone(here: Path, folder: Path, commit: str) -> None:
    """Clone `commit` into `folder`, with links to the virtual environment and to a base model too large for git."""
    git(here, "clone", "--quiet", "--no-hardlinks", "--no-checkout", str(here), str(folder))
    git(folder, "checkout", "--quiet", "--detach", commit)
    (folder / ".venv").symlink_to(sys.prefix)
    model = load_yaml(folder / CONF / "model" / f"{load_yaml(folder / PARAMS)['model']}.yaml")
    source = folder / model["location"]
    if model["source"] == "local_folder" and not source.exists() and (here / model["location"]).is_dir():
        source.symlink_to(here / model["location"])  # stage_base verifies all its checksums


def warn_if_stale(folder: Path) -> None:
    """Print the stages for which dvc.lock records other code, data or settings than the commit contains."""
    status = subprocess.run(
        [*_DVC, "status", "--json"], cwd=folder, env=_environment(folder), capture_output=True, text=True, check=True
    )
    for stage, entries in parse_json(status.stdout, "dvc status --json", "run it to see why", RemintError).items():
        changed = [entry["changed deps"] for entry in entries if isinstance(entry, dict) and "changed deps" in entry]
        # A "deleted" dependency is the output of an earlier stage, which a fresh clone does not have.
        names = [name for deps in changed for name, state in deps.items() if state != "deleted"]
        names += [entry for entry in entries if isinstance(entry, str)]
        if names:
            print(f"the committed {LOCK} is out of date: {stage} has other {', '.join(names)}")


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_HERE)}
    own = {"DVC_SITE_CACHE_DIR": str(folder / ".dvc/tmp/site"), "DVC_NO_ANALYTICS": "1"}
    return kept | own | {"PYTHONUNBUFFERED": "1"}  # print each stage when it starts, not when a buffer is full


def elsewhere(place: Path) -> Rebuild:
    """A rebuild whose environment differs from this one as much as possible. Prints what differs and what does not."""
    home = place / "home"
    home.mkdir()
    variables = {
        "HOME": str(home),
        "LC_ALL": "C",
        "LANG": "tr_TR.ISO-8859-9",
        "TZ": "Pacific/Kiritimati",  # UTC+14: for most of the world it is tomorrow there
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
    """A command prefix that runs a program as the user nobody, and ''. If that is impossible: () and the reason.

    That user must be able to read the virtual environment and `place`. If files are unreadable for it, it gets the
    capability dac_read_search.
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
    return (), f"it cannot read {sys.prefix} or {place}"


def run(rebuild: Rebuild) -> None:
    """Run every stage in the clone. The output is written to a log file in the same parent folder.

    Raises RemintError with the last lines of the log if a stage fails. On SIGTERM or SIGINT all processes of the rebuild
    are ended first, then Stopped is raised.
    """
    if rebuild.user is not None:
        for path in (rebuild.folder, rebuild.folder.parent / "home", *rebuild.folder.rglob("*")):
            os.chown(path, rebuild.user, rebuild.user, follow_symlinks=False)
    started, log = time.monotonic(), rebuild.folder.with_name(f"{rebuild.folder.name}.log")
    print(f"\n{rebuild.label} in {rebuild.folder}", flush=True)
    # No cache is read or written, whatever DVC's settings for this user or machine are.
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
            start_new_session=True,  # signals reach it through us alone
            preexec_fn=end_with_parent,
        ) as process,
        _forwarding(process.pid) as received,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith("Running stage '"):
                print(f"  {duration(time.monotonic() - started):>12}  {line.split(chr(39))[1]}", flush=True)
    print(f"  {duration(time.monotonic() - started):>12}  ended", flush=True)
    if received:
        raise Stopped(f"reproduce: stopped in {rebuild.label}; nothing was compared", 128 + received[0])
    if process.returncode:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise RemintError(
            f"reproduce: {rebuild.label} failed with status {process.returncode}; see {log}, which ends\n{end}"
        )


@contextlib.contextmanager
def _forwarding(group: int) -> Iterator[list[int]]:
    """Yield a list of the received signals. The first one ends the process group; what is left after a while is killed."""
    received: list[int] = []

    def end(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)

    killer = threading.Timer(_GRACE_S, end, [signal.SIGKILL])

    def receive(number: int, _: object) -> None:
        received.append(number)
        end(signal.SIGKILL if len(received) > 1 else signal.SIGTERM)
        if len(received) == 1:
            killer.start()

    with signals.handled(receive):
        try:
            yield received
        finally:
            killer.cancel()


def git(where: Path, *arguments: str) -> str:
    """The output of a git command. Raises RemintError with git's own message if the command fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True)
    except FileNotFoundError:
        raise RemintError("reproduce: git was not found; install it, because a commit is rebuilt") from None
    if done.returncode:
        raise RemintError(
            f"reproduce: git {arguments[0]}: {done.stderr.strip()}; commit what `make repro` has made first"
        )
    return done.stdout


def duration(seconds: float) -> str:
    """Minutes and seconds, as text for the user."""
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"
