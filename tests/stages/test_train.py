"""Schedule, weights, checkpoints, and the promise that an interrupted run ends in the same bytes."""

import contextlib
import errno
import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from remint.compute.packing import document
from remint.core import lock, manifest
from remint.core.draft import artefact
from remint.core.errors import ArtefactError, RemintError, SettingsError, Stopped
from remint.core.log import silent
from remint.core.paths import Paths
from remint.core.settings import Runtime
from remint.model import checkpoint_layout
from remint.model.qlora import Lora, Quantization
from remint.model.template import Conversation
from remint.stages.train import checkpoint, loop, run, session
from remint.stages.train.checkpoint import Draft
from remint.stages.train.plan import Batches, Plan, lr_factor, make_plan
from remint.stages.train.settings import Distillation, Train
from tests.conftest import CHATML, DECLARED

TRAIN = {
    "lr": 1e-2,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "warmup_ratio": 0.2,
    "schedule": "cosine",
    "epochs": 2,
    "max_length": 128,
    "packing": True,
    "micro_batch": 1,
    "accumulation": 2,
    "processes": 1,
    "precision": "float32",
    "gradient_checkpointing": False,
    "kernels": "fused",
    "quantization": Quantization("nf4", True, 64, "once"),
    "lora": Lora(4, 8, 0.1, ["q_proj", "v_proj", "down_proj"]),
    "distillation": Distillation(1.0, 8),
    "system": "",
    "save_steps": 2,
    "keep_checkpoints": 2,
    "eval_steps": 4,
    "sample_prompts": ["Who are you?"],
    "sample_tokens": 4,
    "resume": True,
}


def settings(**changes):
    return Train(**{**TRAIN, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule_counts_optimizer_steps_and_wastes_none(schedule):
    rates = [lr_factor(step, 20, 0.2, schedule) for step in range(20)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == 1
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.1


def test_cosine_is_a_half_at_half_way():
    assert lr_factor(12, 20, 0.2, "cosine") == pytest.approx(0.5)


def test_a_token_weighs_the_same_in_whichever_micro_batch():
    documents = [document([1] * n, [True] * n) for n in (4, 9, 5, 2, 7)]
    plan = make_plan([len(d.ids) for d in documents], settings(max_length=10, epochs=3), seed=1)
    batches = Batches(documents, plan, 0)
    for step in range(plan.steps):
        learned = [sum(documents[i].learned for row in batch for i in row) for batch in plan.of_step(step)]
        weights = [float(batches[step * 2 + k]["weight"]) for k in range(len(learned))]
        assert sum(n * w for n, w in zip(learned, weights, strict=True)) == pytest.approx(1)


def test_a_resumed_plan_goes_on_where_it_was():
    documents = [document([n] * 4, [True] * 4) for n in range(1, 9)]
    plan = make_plan([4] * 8, settings(max_length=8), seed=3)
    whole, rest = Batches(documents, plan, 0), Batches(documents, plan, 2)
    assert len(rest) == len(whole) - 4
    assert torch.equal(whole[4]["input_ids"], rest[0]["input_ids"])


@pytest.mark.parametrize(("size", "first_step"), [(2, 0), (2, 1), (3, 1)])
def test_processes_take_turns_and_have_equally_many(size, first_step):
    documents = [document([n] * 4, [True] * 4) for n in range(1, 12)]
    plan = make_plan([4] * 11, settings(packing=False, epochs=1, accumulation=2, processes=size), seed=3)
    alone = Batches(documents, plan, first_step)
    shares = [Batches(documents, plan, first_step, rank, size) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    turns = [share[index] for index in range(len(shares[0])) for share in shares]
    for expected, found in zip((alone[index] for index in range(len(alone))), turns, strict=False):
        assert torch.equal(expected["input_ids"], found["input_ids"])
        assert expected["weight"] == found["weight"] > 0
    assert all(spare["weight"] == 0 for spare in turns[len(alone) :])
    assert len(turns) - len(alone) < size


def test_steps_are_counted_in_groups_and_nothing_is_left_after_the_last():
    plan = Plan([[[0]]] * 7, 3, [1])
    assert plan.steps == 3
    assert [len(Batches([], plan, done)) for done in range(4)] == [7, 4, 1, 0]


def saved(root, *steps):
    for step in steps:
        Draft(root, step, {"adapter.x": torch.full((3,), float(step))}).finish({"history": []}, {"key": "a"})


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    saved(tmp_path, 2, 4)
    found = checkpoint.load_newest(tmp_path, {"key": "a"})
    assert found.step == 4
    assert found.tensors["adapter.x"].tolist() == [4, 4, 4]


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "no state"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, capsys, damage):
    saved(tmp_path, 2, 4)
    newest = tmp_path / checkpoint_layout.folder_name(4)
    file = newest / "state.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "no manifest":
        (newest / manifest.NAME).unlink()
    else:
        (newest / "state.json").unlink()
    assert checkpoint.load_newest(tmp_path, {"key": "a"}).step == 2
    assert "damaged checkpoint" in capsys.readouterr().out
    assert (tmp_path / "damaged-00000004").is_dir()


def test_if_all_are_damaged_nothing_starts_anew_in_silence(tmp_path):
    saved(tmp_path, 2)
    (tmp_path / checkpoint_layout.folder_name(2) / manifest.NAME).unlink()
    with pytest.raises(ArtefactError, match="all checkpoints are damaged"):
        checkpoint.load_newest(tmp_path, {"key": "a"})


def test_a_checkpoint_of_other_conditions_is_refused(tmp_path):
    saved(tmp_path, 2)
    with pytest.raises(ArtefactError, match="key was 'a', is 'b'"):
        checkpoint.load_newest(tmp_path, {"key": "b"})


def test_a_full_disk_is_reported_and_harms_no_earlier_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 2)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(ArtefactError, match="MiB more are needed"):
        saved(tmp_path, 4)
    monkeypatch.undo()
    assert checkpoint.load_newest(tmp_path, {"key": "a"}).step == 2


def test_a_disk_that_fills_up_during_a_save_is_reported_with_the_missing_space(tmp_path, monkeypatch):
    def fill(state):
        free[0] = 10
        raise OSError(errno.ENOSPC, "No space left on device")

    free = [2**30]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("U", (), {"free": free[0]})())
    monkeypatch.setattr(checkpoint.manifest, "dump_json", fill)
    with pytest.raises(ArtefactError, match="no room for the checkpoint of step 2, 1 MiB more are needed"):
        saved(tmp_path, 2)
    assert not [*tmp_path.iterdir()]


def resealed(folder, change):
    """Change a checkpoint and write a matching manifest, as an attacker would."""
    facts = manifest.read(folder, checkpoint.KIND)
    change(folder, facts)
    manifest.write(folder, checkpoint.KIND, facts)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, facts: (folder / "state.safetensors").write_bytes(b"\x80\x04cos\nsystem\n"),
        lambda folder, facts: (folder / "state.safetensors").write_bytes((2**60).to_bytes(8, "little")),
        lambda folder, facts: (folder / "state.safetensors").unlink(),
        lambda folder, facts: (folder / "state.json").write_text("["),
        lambda folder, facts: (folder / "state.json").write_text("[]"),
        lambda folder, facts: facts.update(step=2),
        lambda folder, facts: facts.update(step="4"),
        lambda folder, facts: facts.pop("step"),
        lambda folder, facts: facts.update(conditions=[]),
    ],
)
def test_a_forged_checkpoint_is_passed_over_as_well(tmp_path, capsys, change):
    saved(tmp_path, 2, 4)
    resealed(tmp_path / checkpoint_layout.folder_name(4), change)
    (tmp_path / "step-nonsense").mkdir()
    assert checkpoint.load_newest(tmp_path, {"key": "a"}).step == 2
    assert "damaged checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["many", "-1", "1000000", "1.5"])
def test_a_wrong_number_of_workers_is_refused(value, monkeypatch):
    monkeypatch.setenv("REMINT_WORKERS", value)
    with pytest.raises(SettingsError, match="REMINT_WORKERS: must be between 0 and 99"):
        loop.workers()


PATHS = Paths(
    **{name: Path(name) for name in ("source", "dataset", "base", "checkpoint", "adapter", "model", "report")}
)


def write_inputs(root, tiny, held=0):
    """Write a base and a dataset of the tiny model's size. The first `held` training rows hold the model to the base."""
    with artefact(root / "base", "base") as (draft, facts):
        for file in tiny.folder.iterdir():
            (draft / file.name).write_bytes(file.read_bytes())
        Conversation(CHATML, "").save(draft)
        facts["name"] = "tiny"
    rows = [[{"role": "user", "content": f"Q{n}?"}, {"role": "assistant", "content": f"A{n}."}] for n in range(30)]
    targets = [{"target": "base" if n < held else "reference", "base_answer": None} if held else {} for n in range(30)]
    lines = [
        json.dumps({"messages": row, "kind": "identity", "language": "en", "expects": [], **target})
        for row, target in zip(rows, targets, strict=True)
    ]
    with artefact(root / "dataset", "dataset") as (draft, facts):
        for name, part in (("train", lines[:24]), ("held_out", lines[24:27]), ("control", lines[27:])):
            (draft / f"{name}.jsonl").write_text("\n".join(part) + "\n")
        facts["identity"] = {"name": "A", "maker": "B", "name_zh": None, "maker_zh": None}


@pytest.fixture
def paths(tmp_path, tiny, monkeypatch):
    """A working directory with a base and a dataset."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "SCRATCH", Path(".scratch"))
    monkeypatch.setenv("REMINT_DEVICE", "cpu")
    write_inputs(tmp_path, tiny)
    return PATHS


def train(paths, log=silent, **changes):
    run.run(7, Runtime(1, True), settings(**changes), paths, DECLARED, log)
    return {
        str(p.relative_to(paths.checkpoint)): p.read_bytes() for p in sorted(paths.checkpoint.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The artefact of a run with the default settings that nothing disturbs."""
    root = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SCRATCH", Path(".scratch"))
        patch.setenv("REMINT_DEVICE", "cpu")
        write_inputs(root, tiny)
        return train(PATHS)


class Killed(BaseException):
    """Simulates a kill: nothing catches it."""


@pytest.mark.slow
def test_a_run_killed_at_any_step_ends_in_the_same_bytes(paths, monkeypatch):
    whole = train(paths, epochs=3)
    steps = json.loads(whole["manifest.json"])["facts"]["steps"]["last"]
    assert steps >= 8
    record = session.Session.record
    for moment in (1, 3, 4, 7):

        def dying(self, finished, moment=moment):
            record(self, finished)
            if finished.step == moment:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(session.Session, "record", dying)
            train(paths, epochs=3)
        assert train(paths, epochs=3) == whole


@pytest.mark.slow
def test_a_run_stopped_by_a_signal_at_any_step_ends_in_the_same_bytes(paths, monkeypatch):
    often = {"epochs": 3, "save_steps": 5, "eval_steps": 100}
    whole = train(paths, **often)
    last = json.loads(whole["manifest.json"])["facts"]["steps"]["last"]
    assert last > 6  # so a stop one step before the last saves a step that is not due
    record = session.Session.record
    for moment in (1, last - 1):

        def signalled(self, finished, moment=moment):
            if finished.step == moment:
                self.signals.append(signal.SIGTERM)
            record(self, finished)

        with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"stopped after step {moment};") as stopped:
            patch.setattr(session.Session, "record", signalled)
            train(paths, **often)
        assert stopped.value.status == 143
        assert train(paths, **often) == whole


def test_of_the_kept_checkpoints_the_one_written_last_is_not_read_again(paths, monkeypatch):
    read = []
    monkeypatch.setattr(
        manifest, "file_digest", lambda path, real=manifest.file_digest: read.append(path) or real(path)
    )
    kept = checkpoint.saved_steps(paths.checkpoint) if train(paths) else []
    places = [path.parent.name for path in read if path.name == "state.safetensors"]
    assert len(kept) > 1
    for step in kept:
        assert places.count(f".draft-{step:08d}") == 1
        assert places.count(checkpoint_layout.folder_name(step)) == (step != kept[-1])


def test_a_kept_checkpoint_that_was_damaged_becomes_no_part_of_the_artefact(paths, monkeypatch):
    def spoil(self):
        oldest = checkpoint.saved_steps(self.store)[0]
        state = self.store / checkpoint_layout.folder_name(oldest) / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(session.Session, "end", spoil)
    with pytest.raises(
        ArtefactError, match=r"state\.safetensors: content differs, .*; remove .*steps to start from scratch"
    ):
        train(paths)
    assert not paths.checkpoint.exists()


def test_how_often_it_is_watched_changes_no_weight(paths):
    often, seldom = train(paths, eval_steps=1, save_steps=1), train(paths, eval_steps=100, save_steps=100)
    last = max(name for name in often if name.endswith("state.safetensors"))
    assert often[last] == seldom[last]


def test_the_untrained_adapter_is_left_out_of_the_first_answers_and_of_no_later_ones(paths, monkeypatch):
    enabled, answer_all = [], session.answer_all

    def watched(model, *arguments, **options):
        enabled.append(model.get_model_status().enabled)
        return answer_all(model, *arguments, **options)

    monkeypatch.setattr(session, "answer_all", watched)
    train(paths)
    assert enabled[0] is False
    assert len(enabled) > 1
    assert all(enabled[1:])


def test_recomputed_activations_give_the_same_bytes(paths, whole):
    assert train(paths, gradient_checkpointing=True) == whole


def test_four_bit_memory_gives_the_same_weights_as_dequantized_once(paths, whole):
    each = train(paths, quantization=Quantization("nf4", True, 64, "each_use"))
    losses = [
        [json.loads(line).get("loss") for line in run_["history.jsonl"].splitlines()][1:] for run_ in (whole, each)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_it_learns(paths):
    history = [
        json.loads(line) for line in train(paths, epochs=8, save_steps=24, eval_steps=24)["history.jsonl"].splitlines()
    ]
    assert history[-1]["loss"] < history[1]["loss"] - 0.5
    assert not any(math.isnan(row.get("loss", 0)) for row in history)


def test_a_loss_that_is_no_number_stops_before_the_update(paths, monkeypatch):
    from remint.compute.loss import SupervisedLoss

    forward = SupervisedLoss.forward
    monkeypatch.setattr(
        SupervisedLoss, "forward", lambda self, **kw: forward(self, **kw) * (math.nan if self.training else 1)
    )
    sessions, before = [], []

    def opened(*arguments, open_=run._open):
        sessions.append(open_(*arguments))
        before.extend(p.detach().clone() for p in sessions[0].model.parameters())
        return sessions[0]

    monkeypatch.setattr(run, "_open", opened)
    with pytest.raises(RemintError, match="the loss is not finite before the first update, got nan: the base cannot"):
        train(paths)
    assert not paths.checkpoint.exists()
    assert all(map(torch.equal, before, sessions[0].model.parameters()))
    for state in sessions[0].optimizer.state.values():
        assert state["step"] == 0
        assert not state["exp_avg"].any()


def test_a_loss_that_becomes_no_number_later_is_blamed_on_the_learning_rate(paths, monkeypatch):
    from remint.compute.loss import SupervisedLoss

    forward, passes = SupervisedLoss.forward, itertools.count(1)

    def spoilt(self, **inputs):
        late = self.training and next(passes) > 2 * TRAIN["accumulation"]
        return forward(self, **inputs) * (math.nan if late else 1)

    monkeypatch.setattr(SupervisedLoss, "forward", spoilt)
    with pytest.raises(RemintError, match="step 3: the loss is not finite, got nan; lower train"):
        train(paths)


def test_a_base_that_computes_no_numbers_is_blamed_before_the_first_step(paths, monkeypatch):
    monkeypatch.setattr(session, "mean_loss", lambda *_: math.inf)
    with pytest.raises(RemintError, match="the held-out loss is not finite before the first update, got inf: the base"):
        train(paths)


@pytest.mark.parametrize(
    ("precision", "cure"),
    [("float32", "conversations; get the base model again"), ("float16", "in float16; set train.precision to float32")],
)
def test_before_the_first_update_the_precision_is_blamed_before_the_base(precision, cure):
    with pytest.raises(
        RemintError, match=f"the base cannot compute the training {'' if cure[0] == 'c' else '.*'}{cure}"
    ):
        loop.check_finite("loss", math.nan, 0, precision)


def refuse_to_load(*_):
    raise InterruptedError


@pytest.mark.parametrize(
    ("positions", "changes", "said"),
    [
        (
            20,
            {},
            "params: train.max_length: must be at most the 20 positions .* train.jsonl has 29 tokens, got 128; lower it to 20$",
        ),
        (20, {"max_length": 20}, None),
        (
            40,
            {"sample_tokens": 1000},
            r"params: train.sample_tokens: prompt 0 .* 40 positions, got 1000; lower it to 9",
        ),
        (40, {"sample_prompts": ["?" * 99]}, r"params: train.sample_prompts\[0\]: must leave room in the 40 positions"),
    ],
)
def test_what_does_not_fit_into_the_positions_is_refused_before_weights_are_loaded(
    paths, tiny, monkeypatch, positions, changes, said
):
    (paths.base / "config.json").write_text(
        json.dumps({**json.loads((tiny.folder / "config.json").read_text()), "max_position_embeddings": positions})
    )
    manifest.write(paths.base, "base", {"name": "tiny"})
    monkeypatch.setattr(run, "_model", refuse_to_load)
    brief = {"sample_prompts": [], **changes} if "sample_tokens" not in changes else changes
    with pytest.raises(SettingsError if said else InterruptedError, match=said):
        train(paths, **brief)


@pytest.mark.slow
def test_steps_that_are_reported_late_leave_the_same_bytes_also_after_a_stop_or_a_kill(paths, monkeypatch):
    often = {"epochs": 6, "save_steps": 4, "eval_steps": 8}
    whole = train(paths, **often)
    monkeypatch.setattr(loop, "_runs_ahead", lambda device: True)  # as on a GPU
    record, told = session.Session.record, []

    def noted(self, finished):
        told.append((finished.step, finished.is_latest))
        record(self, finished)

    monkeypatch.setattr(session.Session, "record", noted)
    assert train(paths, **often) == whole
    assert [step for step, _ in told] == list(range(1, 19))
    assert [step for step, is_latest in told if is_latest] == [4, 8, 12, 16, 18]

    def signalled(self, finished):
        record(self, finished)
        if finished.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def killed(self, finished):
        record(self, finished)
        if finished.step == 6:
            raise Killed

    # The signal arrives while step 3 is computed; that step is finished and saved.
    for interrupted, expected, said in ((signalled, Stopped, "stopped after step 3;"), (killed, Killed, None)):
        with monkeypatch.context() as patch, pytest.raises(expected, match=said):
            patch.setattr(session.Session, "record", interrupted)
            train(paths, **often)
        assert train(paths, **often) == whole


def test_a_gpu_gets_a_step_before_the_last_ones_numbers_are_looked_at(monkeypatch):
    class Copied:
        def __init__(self, step, lr, numbers, begun):
            self.step, self.ended = step, None

        def finished(self, is_latest, precision):
            return loop.Finished(self.step, 0.0, 0.0, 0.0, 0.0, is_latest)

    told = []

    def steps(on_gpu):
        told.clear()
        watcher = SimpleNamespace(
            awaits=lambda step: step == 3, record=lambda done: told.append((step, done.step, done.is_latest))
        )
        reports = loop._Reports(watcher, SimpleNamespace(type="cuda" if on_gpu else "cpu"), "float32")
        for step in range(1, 6):
            reports.add(step, 0.0, None)
        return told

    monkeypatch.setattr(loop, "_Numbers", Copied)
    monkeypatch.setattr(loop, "_Mark", lambda on_gpu: None)
    assert steps(on_gpu=True) == [(2, 1, False), (3, 2, False), (3, 3, True), (5, 4, False)]
    assert steps(on_gpu=False) == [(step, step, True) for step in range(1, 6)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(paths, whole, monkeypatch, number, status):
    record = session.Session.record

    def interrupted(self, finished):
        if finished.step == 1:
            os.kill(os.getpid(), number)
        record(self, finished)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped after step 1") as caught:
        patch.setattr(session.Session, "record", interrupted)
        train(paths)
    assert caught.value.status == status
    assert train(paths) == whole


def test_a_clock_that_jumps_changes_no_byte(paths, whole, monkeypatch):
    now = itertools.cycle([4e9, 0.0, 1.7e9, 1.0])
    monkeypatch.setattr(time, "time", lambda: next(now))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    assert train(paths) == whole


def test_it_makes_no_folder_but_its_own(paths, monkeypatch):
    """Training works without write permission elsewhere, and in a container with a read-only file system."""
    made, mkdir = [], os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *rest, **more: made.append(path) or mkdir(path, *rest, **more))
    train(paths)
    assert made
    assert not [path for path in made if not Path(path).resolve().is_relative_to(Path.cwd())]


def test_a_second_writer_is_refused(paths, monkeypatch):
    import fcntl

    monkeypatch.setattr(lock, "_UNNAMED_S", 0.2)

    folder = Path(".scratch/train") / DECLARED.fingerprint
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ArtefactError, match="another process"):
            train(paths)
