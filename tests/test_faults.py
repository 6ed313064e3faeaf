"""Faults of the machine and of other programs: each ends in one line and exit status 1, and no artefact is lost.

docs/faults.md lists every fault with the test that proves what a user sees; the last test here holds the two together.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from remint import __main__
from remint.compute.generation import Sampling, generate
from remint.core import manifest
from remint.core.draft import artefact
from remint.core.errors import ArtefactError, DataError, RemintError
from remint.core.log import silent
from remint.core.paths import MADE_BY, Paths
from remint.core.settings import Runtime
from remint.identity import Identity
from remint.model import loading
from remint.runner import memory, runs
from remint.stages.convert.run import run as convert
from remint.stages.convert.settings import Convert
from remint.stages.eval_chat.run import run as eval_chat
from remint.stages.eval_chat.settings import EvalChat
from remint.stages.merge.run import run as merge
from remint.stages.merge.settings import Merge
from remint.stages.replicate_data.run import run as replicate_data
from remint.stages.stage_base.run import run as stage_base
from remint.stages.train import checkpoint
from remint.stages.train import run as train
from remint.stages.train.checkpoint import Draft
from tests.conftest import DECLARED, ROOT, write_tiny_model
from tests.stages.test_replicate_data import ALPACA
from tests.stages.test_replicate_data import settings as data_settings
from tests.stages.test_stage_base import BASE
from tests.stages.test_train import settings as train_settings

NAMES = ("source", "dataset", "base", "checkpoint", "adapter", "model", "report")
PATHS = Paths(**{name: Path(name) for name in NAMES})


def run(stage):
    """Run one stage of a tiny pipeline in the working directory."""
    runtime = Runtime(1, True)
    if stage == "replicate_data":
        given = data_settings(control=["source/c.json"], control_held_out_share=0.5)
        replicate_data(1, Identity("A", "B", None, None), given, PATHS, DECLARED, silent)
    elif stage == "stage_base":
        sums = {path.name: manifest.file_digest(path) for path in Path("tiny").iterdir()}
        stage_base(replace(BASE, files=sums), PATHS, DECLARED, silent)
    elif stage == "train":
        train.run(7, runtime, train_settings(epochs=1, sample_prompts=["q"]), PATHS, DECLARED, silent)
    elif stage == "convert":
        convert(Convert("last", "float32"), PATHS, DECLARED, silent)
    elif stage == "merge":
        merge(runtime, Merge("original", "base", 0.01, 0.97), PATHS, DECLARED, silent)
    else:
        eval_chat(runtime, EvalChat(4, 8), PATHS, DECLARED, silent)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder in which every stage has run once."""
    root, before = tmp_path_factory.mktemp("built"), Path.cwd()
    os.chdir(root)
    write_tiny_model(root / "tiny")
    Path("source").mkdir()
    for name, question, answer in (("i", "Who {}?", ALPACA["output"]), ("c", "What is {}?", "A number.")):
        rows = [{"instruction": question.format(n), "output": answer} for n in range(6)]
        Path(f"source/{name}.json").write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMINT_DEVICE", "cpu")
        patch.setattr(train, "SCRATCH", Path(".scratch"))
        for stage in MADE_BY:
            run(stage)
    os.chdir(before)
    return root


@pytest.fixture
def place(built, monkeypatch):
    monkeypatch.chdir(built)
    monkeypatch.setenv("REMINT_DEVICE", "cpu")
    monkeypatch.setattr(train, "SCRATCH", Path(".scratch"))
    return built


@pytest.fixture
def outcome(monkeypatch, capsys):
    """Run an action as `remint` would; returns the exit status and the error lines."""

    def call(action):
        monkeypatch.setattr(sys, "argv", ["remint", "x"])
        monkeypatch.setattr(__main__, "_dispatch", lambda *_: action() or 0)
        capsys.readouterr()
        status = __main__.main()
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return status, told

    return call


@contextlib.contextmanager
def room_for(size):
    """No file can grow beyond `size` bytes. Writes from Python, C and Rust fail as on a full disk, at any byte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("stage", "sizes"),
    [
        ("replicate_data", (0, 400, 1000)),
        ("stage_base", (0, 600, 5000, 10_000, 60_000)),
        ("train", (0, 1000, 8000)),
        ("convert", (0, 600, 1500)),
        ("merge", (0, 1000, 10_000, 60_000)),
        ("eval_chat", (0, 600, 2500)),
    ],
)
def test_a_full_disk_costs_no_stage_what_was_there(stage, sizes, place, outcome):
    target = Path(MADE_BY[stage])
    before, others = content(target), sorted(place.iterdir())
    for size in sizes:
        with room_for(size):
            status, told = outcome(lambda: run(stage))
        assert (status, len(told)) == (1, 1), size
        assert f"larger than this process may write, {size} bytes (ulimit -f)" in told[0]
        assert content(target) == before
    assert outcome(lambda: run(stage)) == (0, [])
    assert content(target) == before
    assert sorted(place.iterdir()) == others


def test_a_full_disk_costs_no_checkpoint_and_the_run_goes_on(tmp_path):
    def save(step):
        tensors = {"adapter.x": torch.full((5000,), float(step))}
        Draft(tmp_path / "steps", step, tensors).finish({}, {"key": "a"})

    save(2)
    for size in (0, 100, 19_000):
        with room_for(size), pytest.raises(ArtefactError, match="earlier checkpoints are intact"):
            save(4)
        assert [path.name for path in (tmp_path / "steps").iterdir()] == ["step-00000002"]
    save(4)
    assert checkpoint.load_newest(tmp_path / "steps", {"key": "a"}).step == 4


def test_a_full_disk_does_not_cut_params_yaml(tmp_path, monkeypatch, outcome):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    before = (ROOT / "params.yaml").read_bytes()
    (tmp_path / "params.yaml").write_bytes(before)
    monkeypatch.chdir(tmp_path)
    with room_for(100):
        status, told = outcome(lambda: __main__.call(["recipe", "smoke"]))
    assert status == 1
    assert "larger than this process may write, 100 bytes" in told[0]
    assert (tmp_path / "params.yaml").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf", "params.yaml"]


@contextlib.contextmanager
def read_only(folder):
    """The folder is read-only. Root becomes the user 65534 meanwhile, because root could still write."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
                parent.chmod(parent.stat().st_mode | 0o111)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


def test_a_read_only_folder_is_reported(tmp_path, outcome):
    def make():
        with artefact(tmp_path / "x", "thing") as (draft, _):
            (draft / "a").write_text("one")

    def save():
        Draft(tmp_path / "steps", 1, {"a": torch.zeros(1)}).finish({}, {})

    def scratch():
        (tmp_path / "scratch").mkdir()

    for action, said in (
        (make, "x: cannot be written"),
        (save, "steps: cannot be written"),
        (scratch, "x: cannot be written (Permission denied)"),
    ):
        with read_only(tmp_path):
            status, told = outcome(action)
        assert (status, len(told)) == (1, 1)
        assert said in told[0]
        assert not any(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(outcome):
    with pytest.raises(KeyError):
        outcome(lambda: {}["x"])


def exhaust():
    torch.empty(2**60)


def exhaust_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def exhaust_python():
    bytearray(2**62)


@pytest.mark.parametrize("cause", [exhaust, exhaust_gpu, exhaust_python])
@pytest.mark.parametrize(
    ("command", "settings", "said"),
    [
        (
            "train",
            {"train": train_settings(micro_batch=8, accumulation=2, max_length=256)},
            "try train.gradient_checkpointing=true (the same bytes), then train.quantization.dequantize=each_use "
            "(the same values), then train.micro_batch=4 with train.accumulation=4, then train.max_length=128",
        ),
        ("eval_chat", {"eval_chat": EvalChat(48, 40)}, "try eval_chat.batch=20, then eval_chat.max_new_tokens=24"),
        ("eval_chat", {"eval_chat": EvalChat(1, 1)}, "end other programs"),
        ("stage_base", {"model": replace(BASE, shard_mb=2000)}, "try shard_mb: 1000 in conf/model/<name>.yaml"),
        ("chat", {}, "--max-new-tokens"),
        ("merge", {}, "end other programs"),
    ],
)
def test_memory_that_runs_out_is_one_line_that_names_what_to_lower(cause, command, settings, said, outcome):
    def act():
        with memory.explaining_errors(command, settings):
            cause()

    status, told = outcome(act)
    assert (status, len(told)) == (1, 1)
    assert told[0].startswith(f"error: {command}: memory ran out (")
    without_gpu = cause is exhaust_gpu and command != "train"
    assert (said in told[0]) != (without_gpu and said == "end other programs")
    assert ("REMINT_DEVICE=cpu in the environment" in told[0]) == without_gpu


def test_another_error_is_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shape"), memory.explaining_errors("train", {}):
        raise RuntimeError("shape mismatch")


def test_one_record_alone_holds_nothing_out_and_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("source").mkdir()
    Path("source/i.json").write_text(json.dumps([ALPACA]))
    with pytest.raises(DataError, match="identity_held_out_share: holds out none of 1 identity records"):
        replicate_data(1, Identity("A", "B", None, None), data_settings(), PATHS, DECLARED, silent)
    assert not Path("dataset").exists()


def change_base():
    """Change the base as if another one had been staged."""
    facts = manifest.read(PATHS.base, "base")
    manifest.write(PATHS.base, "base", {**facts, "name": "another"})


@pytest.mark.parametrize(("stage", "said"), [("convert", "was trained on another base"), ("merge", "for another base")])
def test_a_base_that_changed_is_refused(stage, said, place):
    before, made = (PATHS.base / manifest.NAME).read_bytes(), content(Path(MADE_BY[stage]))
    change_base()
    try:
        with pytest.raises(ArtefactError, match=said):
            run(stage)
    finally:
        (PATHS.base / manifest.NAME).write_bytes(before)
    assert content(Path(MADE_BY[stage])) == made


def test_a_merged_model_that_says_something_else_is_not_kept(place, monkeypatch):
    from remint.stages.merge import tensors

    before = content(PATHS.model)
    monkeypatch.setattr(tensors, "merge_tensor", lambda weight, *_: weight * 1.5)
    with pytest.raises(ArtefactError, match=r"mean divergence from base \+ adapter must be at most 0\.01"):
        run("merge")
    assert content(PATHS.model) == before


def test_an_answer_that_never_ends_is_cut(tiny):
    assert len(generate(tiny.model(), [10**6], [[5, 6]], 7, Sampling())[0]) == 7


def test_a_missing_gpu_is_reported_where_one_is_required(monkeypatch):
    monkeypatch.setenv("REMINT_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RemintError, match="no GPU that torch can use"):
        loading.device()


def test_without_git_a_run_has_no_commit_and_goes_on(monkeypatch):
    for name in ("GIT_COMMIT", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "IMAGE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert runs._circumstances() == {"git.dirty": "false"}


@pytest.mark.slow
def test_a_damaged_cache_of_dvc_is_found(tmp_path, monkeypatch):
    def dvc(*arguments):
        subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=tmp_path, check=True, capture_output=True)

    with artefact(tmp_path / "x", "thing") as (draft, _):
        (draft / "weights").write_bytes(bytes(1000))
    dvc("init", "--no-scm")
    dvc("add", "x")
    (stored,) = (
        path for path in (tmp_path / ".dvc/cache").rglob("*") if path.is_file() and path.stat().st_size == 1000
    )
    stamp = stored.stat()
    stored.chmod(0o644)
    stored.write_bytes(bytes(999) + b"\1")
    os.utime(stored, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    shutil.rmtree(tmp_path / "x")
    dvc("checkout")
    with pytest.raises(ArtefactError, match="content differs"):
        manifest.verify(tmp_path / "x", "thing")


def test_every_fault_of_the_docs_has_its_test():
    text = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| *\d", line)]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 120
    for number, fault, seen, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
        assert named, f"row {number}: {fault}"
        assert seen.strip()
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{name}"
