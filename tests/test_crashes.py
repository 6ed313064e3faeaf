"""Kills and power cuts at every file-system operation: the result is the old or the new state, never half of it."""

import itertools
import os

import pytest
import torch

from remint.core import manifest
from remint.core.draft import artefact
from remint.stages.train import checkpoint
from remint.stages.train.checkpoint import Draft
from tests.crash import crashing

CONDITIONS = {"fingerprint": "f"}


def make(target, text):
    with artefact(target, "thing") as (draft, facts):
        (draft / "a.txt").write_text(text)
        (draft / "sub").mkdir()
        (draft / "sub/b.txt").write_text(text * 2)
        facts["text"] = text


def save(root, step):
    Draft(root, step, {"adapter.x": torch.full((64,), float(step))}).finish({"history": [step]}, CONDITIONS)


def crash_everywhere(tmp_path, monkeypatch, prepare, act):
    """Crash `act` at each of its operations, each time in a newly prepared folder; yields the folders."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the real one is slow, and no power is cut here
    for number in itertools.count(1):
        root = tmp_path / f"{number:03}"
        root.mkdir()
        prepare(root)
        with crashing(root, number, monkeypatch) as disk:
            act(root)
        yield root
        if disk.done < number:
            return


@pytest.mark.parametrize("old", [True, False])
def test_an_artefact_is_old_or_new_or_absent(tmp_path, monkeypatch, old):
    seen = []
    prepare = (lambda root: make(root / "x", "old")) if old else (lambda root: None)
    for root in crash_everywhere(tmp_path, monkeypatch, prepare, lambda root: make(root / "x", "new")):
        found = manifest.verify(root / "x", "thing")["text"] if (root / "x").exists() else "absent"
        seen.append(found)
        make(root / "x", "new")
        assert manifest.verify(root / "x", "thing") == {"text": "new"}
        assert [path.name for path in root.iterdir()] == ["x"]
    assert seen == sorted(seen, key=["old" if old else "absent", "absent", "new"].index)
    assert len(seen) > 15
    assert seen.count("absent") == 1 if old else "old" not in seen


def saved(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_newest_whole_checkpoint_outlives_a_crash_in_a_save(tmp_path, monkeypatch, capsys):
    def prepare(root):
        save(root, 2)
        save(root, 4)

    def act(root):
        save(root, 6)
        checkpoint.prune(root, {4, 6})

    seen, ends = [], []
    for root in crash_everywhere(tmp_path, monkeypatch, prepare, act):
        found = checkpoint.load_newest(root, CONDITIONS)
        assert found.tensors["adapter.x"].tolist() == [found.step] * 64
        assert found.state == {"history": [found.step]}
        checkpoint.check_saved(root, {})
        seen.append(found.step)
        if found.step == 4:
            save(root, 6)
        checkpoint.prune(root, {4, 6})
        ends.append(saved(root))
    assert seen == sorted(seen)
    assert set(seen) == {4, 6}
    assert "damaged" not in capsys.readouterr().out
    assert all(end == ends[0] for end in ends)
    assert {name.partition("/")[0] for name in ends[0]} == {"step-00000004", "step-00000006"}


def test_the_first_checkpoint_is_there_or_not(tmp_path, monkeypatch):
    seen = []
    for root in crash_everywhere(tmp_path, monkeypatch, lambda root: None, lambda root: save(root / "steps", 2)):
        found = checkpoint.load_newest(root / "steps", CONDITIONS)
        seen.append(found is not None)
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


def test_a_store_that_is_thrown_away_is_there_or_not(tmp_path, monkeypatch, capsys):
    seen = []

    def prepare(root):
        save(root / "steps", 2)
        save(root / "steps", 4)

    for root in crash_everywhere(tmp_path, monkeypatch, prepare, lambda root: checkpoint.discard(root / "steps")):
        found = checkpoint.load_newest(root / "steps", CONDITIONS)
        seen.append(found.step if found else 0)
        checkpoint.discard(root / "steps")
        assert not list(root.iterdir())
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {4, 0}
    assert "damaged" not in capsys.readouterr().out


def test_a_start_that_crashes_while_it_sets_damage_aside_can_be_repeated(tmp_path, monkeypatch):
    def prepare(root):
        for step in (2, 4):
            save(root, step)
        (root / "step-00000004/state.json").write_text("{}")
        (root / ".draft-00000006").mkdir()
        (root / ".draft-00000006/state.json").write_text("{")

    for root in crash_everywhere(tmp_path, monkeypatch, prepare, lambda root: checkpoint.load_newest(root, CONDITIONS)):
        assert checkpoint.load_newest(root, CONDITIONS).step == 2
        assert sorted(path.name for path in root.iterdir()) == ["damaged-00000004", "step-00000002"]
