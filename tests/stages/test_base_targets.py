"""Records that hold the model to the base: its own answers, asked once, and the same bytes wherever they come from."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from remint.core import manifest
from remint.core.errors import SettingsError, Stopped
from remint.model import loading
from remint.stages.train import base_targets, run
from remint.stages.train.base_targets import ANSWERS, Answer, Base, content_digest
from remint.stages.train.settings import Distillation
from tests.stages.test_train import PATHS, settings, train, write_inputs

HELD = 12


@pytest.fixture(autouse=True)
def place(tmp_path, tiny, monkeypatch):
    """A working directory with a base and a dataset, in which half of the training rows hold the model to the base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "SCRATCH", Path(".scratch"))
    monkeypatch.setenv("REMINT_DEVICE", "cpu")
    write_inputs(tmp_path, tiny, HELD)


def adapter(files):
    """The bytes of the last checkpoint's tensors."""
    return files[max(name for name in files if name.endswith("state.safetensors"))]


def rewrite(change):
    """Change the rows of train.jsonl and the facts of the dataset."""
    facts = manifest.read(PATHS.dataset, "dataset")
    rows = [json.loads(line) for line in (PATHS.dataset / "train.jsonl").read_text().splitlines()]
    change(rows, facts)
    (PATHS.dataset / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest.write(PATHS.dataset, "dataset", facts)


def test_the_base_is_asked_once_and_its_answers_are_kept(monkeypatch):
    first = train(PATHS)
    answers = [json.loads(line) for line in first[ANSWERS].splitlines()]
    assert [row["history"] for row in answers] == [[{"role": "user", "content": f"Q{n}?"}] for n in range(HELD)]
    assert len({row["answer"] for row in answers}) > 1
    with monkeypatch.context() as patch:
        for name in ("_asked", "_likely"):
            patch.setattr(Base, name, lambda *_: pytest.fail("asked again"))
        assert train(PATHS, lr=1e-3)[ANSWERS] == first[ANSWERS]
    shutil.rmtree(".scratch")
    assert train(PATHS) == first


def test_known_answers_give_the_bytes_of_asked_ones(monkeypatch):
    asked = train(PATHS)
    answers = {
        row["history"][0]["content"]: {"text": row["answer"], "finished": row["finished"]}
        for row in map(json.loads, asked[ANSWERS].splitlines())
    }

    def put_in(rows, facts):
        facts["base_answers"] = {"base": content_digest(PATHS.base)}
        for row in rows[:HELD]:
            row["base_answer"] = answers[row["messages"][0]["content"]]

    rewrite(put_in)
    shutil.rmtree(".scratch")
    monkeypatch.setattr(Base, "_asked", lambda *_: pytest.fail("asked"))
    assert adapter(train(PATHS)) == adapter(asked)


def test_a_cache_that_is_damaged_is_made_again():
    first = train(PATHS)
    for folder in Path(".scratch/base").iterdir():
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes()[:-1])
    assert train(PATHS) == first


def test_answers_of_another_base_are_refused():
    rewrite(lambda rows, facts: facts.update(base_answers={"base": "0" * 64}))
    with pytest.raises(SettingsError, match=r"replicate_data.base_answers: must hold the answers of the base in"):
        train(PATHS)


def test_the_weight_changes_the_result():
    assert adapter(train(PATHS)) != adapter(train(PATHS, distillation=Distillation(5.0, 8)))


def test_a_signal_while_the_base_is_asked_ends_the_run(monkeypatch):
    likely = Base._likely

    def signalled(self, documents):
        os.kill(os.getpid(), signal.SIGTERM)
        return likely(self, documents)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped before the first step"):
        patch.setattr(Base, "_likely", signalled)
        train(PATHS)
    assert not PATHS.checkpoint.exists()
    train(PATHS)


@pytest.mark.parametrize(("finished", "tokens", "closed"), [(True, 100, True), (False, 100, False), (True, 3, False)])
def test_only_what_the_base_said_is_learned(tiny, finished, tokens, closed):
    history = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Say it"))
    row = {"messages": [{"role": role, "content": text} for role, text in (*history, ("assistant", "other"))]}
    train = settings(distillation=Distillation(1.0, tokens))
    answers = {history: Answer("It is so.", finished)}
    (doc,) = base_targets.documents([{**row, "target": "base"}], answers, tiny.tokenizer, tiny.conversation, train)
    learned = [int(target) for target in doc.targets if target != -100]
    prompt = tiny.conversation.prompt(tiny.tokenizer, row["messages"][:-1])
    answer = tiny.tokenizer.encode("It is so.", add_special_tokens=False)
    end = tiny.conversation.end_ids(tiny.tokenizer)
    assert learned == ([*answer, *end] if closed else answer[:tokens])
    assert doc.ids.tolist() == prompt + learned
    assert doc.is_held


def test_what_the_base_says_is_its_own_distribution(tiny, monkeypatch):
    """Compared with the logits of the tiny model without an adapter and without quantization."""
    from remint.model.qlora import Quantization

    kept = {}
    teach = Base.teach
    monkeypatch.setattr(Base, "teach", lambda self, docs: kept.setdefault("docs", teach(self, docs)))
    train(PATHS, quantization=Quantization("none", True, 64, "once"))
    model = loading.load_model(PATHS.base, torch.float32, torch.device("cpu"))
    held = {doc.ids.tobytes(): doc for doc in kept["docs"] if doc.is_held}
    assert len(held) == HELD
    for doc in held.values():
        logits = model(torch.tensor(doc.ids[None].astype("int64"))).logits[0]
        expected = logits[torch.tensor(doc.targets != -100)].log_softmax(-1)
        ids, log_probs = (torch.tensor(part) for part in doc.base)
        assert torch.allclose(expected.gather(1, ids.long()), log_probs, atol=1e-4)
        assert torch.allclose(expected.topk(ids.shape[1]).values, log_probs, atol=1e-4)
