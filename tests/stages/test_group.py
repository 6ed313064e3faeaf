"""N processes share a training: the same bytes as one process with N times the accumulation, after any interruption."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from remint.core.errors import RemintError, SettingsError, Stopped
from remint.core.log import silent
from remint.core.settings import Runtime
from remint.model.qlora import Lora, Quantization
from remint.stages.train import process_group, run, session
from remint.stages.train.settings import Distillation
from tests.conftest import DECLARED
from tests.stages.test_train import PATHS, settings, write_inputs
from tests.workplace import imported

CPU = torch.device("cpu")
PRELOADED = ["tests.stages.test_group", "transformers.models.llama.modeling_llama"]


def member(root, rank, size, port, changes, harm):
    """One process of a training. `harm` is (rank, step, signal): that process gets the signal after that step."""
    os.chdir(root)
    with Path(f"said-{rank}").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    record = session.Session.record

    def harmed(self, finished):
        if (rank, finished.step) == harm[:2]:
            os.kill(os.getpid(), harm[2])
        record(self, finished)

    session.Session.record = harmed
    run.SCRATCH = Path(".scratch")
    try:
        run.run(7, Runtime(1, True), settings(**changes), PATHS, DECLARED, silent)
    except RemintError as error:
        print(error)
        sys.exit(error.status if isinstance(error, Stopped) else 1)


@pytest.fixture(scope="module")
def server():
    with imported(*PRELOADED, threads=1) as context:
        yield context


@pytest.fixture
def train(server, tmp_path, tiny):
    """Train with `size` processes; returns their exit statuses and the artefact's files, if there are any."""
    write_inputs(tmp_path, tiny)

    def trained(size, harm=(0, 0, 0), **changes):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        given = ({"processes": size} | changes, harm)
        members = [
            server.Process(target=member, args=(tmp_path, rank, size, store.port, *given)) for rank in range(size)
        ]
        for process in members:
            process.start()
        for process in members:
            process.join(120)
        target = tmp_path / "checkpoint"
        files = {str(p.relative_to(target)): p.read_bytes() for p in sorted(target.rglob("*")) if p.is_file()}
        shutil.rmtree(target, ignore_errors=True)
        return [process.exitcode for process in members], files

    trained.said = lambda rank: (tmp_path / f"said-{rank}").read_text()
    return trained


def comparable(files):
    """What must be equal: everything except the settings that differ and the digests that cover them."""
    facts = json.loads(files["manifest.json"])["facts"]
    return facts, {name: data for name, data in files.items() if not name.endswith("manifest.json")}


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "accumulation", "changes"),
    [
        (2, 1, {}),
        (2, 2, {"lora": Lora(4, 8, 0.1, ALL)}),
        (3, 2, {"gradient_checkpointing": True}),
        (2, 2, {"quantization": Quantization("nf4", True, 64, "each_use"), "micro_batch": 2}),
        (2, 3, {"kernels": "plain", "lora": Lora(4, 8, 0.0, ALL)}),
        (3, 6, {"packing": False}),  # in the last step, one process is a micro-batch short
        (2, 2, {"distillation": Distillation(2.0, 8)}),
    ],
)
def test_processes_give_the_bytes_of_one_with_as_many_times_the_accumulation(
    train, tiny, tmp_path, size, accumulation, changes
):
    if "distillation" in changes:
        shutil.rmtree(tmp_path / "dataset")
        write_inputs(tmp_path, tiny, held=12)
    changes = {"epochs": 5, "max_length": 64} | changes
    statuses, together = train(size, accumulation=accumulation, **changes)
    assert statuses == [0] * size, train.said(0) + train.said(1)
    _, alone = train(1, accumulation=accumulation * size, **changes)
    assert comparable(together) == comparable(alone)
    history = [json.loads(line) for line in together["history.jsonl"].splitlines()]
    assert len(history) >= 5
    if (
        "distillation" not in changes
    ):  # else the losses of two steps differ by how many of their tokens are held to the base
        assert history[-1]["loss"] < history[1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("number", "statuses"), [(signal.SIGTERM, (143, 143)), (signal.SIGINT, (130, 130)), (signal.SIGKILL, (-9, 75))]
)
def test_what_befalls_one_process_ends_all_and_the_run_goes_on_to_the_same_bytes(train, rank, number, statuses):
    _, whole = train(2, accumulation=1)
    ended, files = train(2, harm=(rank, 4, number), accumulation=1)
    assert not files
    assert [ended[rank], ended[1 - rank]] == list(statuses)
    again, files = train(2, accumulation=1)
    assert again == [0, 0]
    assert "continuing after step 4" in train.said(0) or number == signal.SIGKILL
    assert "continuing after step" in train.said(0)
    assert files == whole


@pytest.mark.slow
def test_masks_that_no_other_process_could_draw_are_refused(train):
    statuses, _ = train(2, kernels="plain")
    assert statuses == [1, 1]
    assert "train.processes: must be 1 with torch's own dropout" in train.said(0)


def test_micro_batches_are_added_in_the_order_of_the_plan_and_spare_ones_not_at_all(monkeypatch):
    # 1e8 + 1 is 1e8: only one order gives these sums.
    rounds = [[[1e8, 1.0, 4.0], [1.0, 1e8, 5.0]], [[-1e8, -1e8, 6.0], [7.0, 7.0, 7.0]]]
    parameter = torch.nn.Parameter(torch.zeros(2))
    total = process_group.StepSum(process_group.ProcessGroup(0, 2), [parameter])
    for (mine, other), present in zip(rounds, (2, 1), strict=True):
        exchanged = torch.tensor([mine[:2], other[:2]])
        monkeypatch.setattr(
            process_group.dist, "all_to_all_single", lambda out, _, rows=exchanged: out.copy_(rows.flatten())
        )
        parameter.grad = torch.tensor(mine[:2])
        total.add(torch.tensor(mine[2]), present)
        assert parameter.grad is None
    monkeypatch.setattr(
        process_group.dist,
        "all_gather_single",
        lambda out, part: out.copy_(torch.cat([part, torch.tensor([15.0, 0.0])])),
    )
    assert total.finish() == 15
    assert parameter.grad.tolist() == [0, 0]


def test_a_number_of_processes_that_were_not_started_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with (
        pytest.raises(SettingsError, match=r"train\.processes: must be 4, the number of processes"),
        process_group.joined(2, CPU),
    ):
        pass
