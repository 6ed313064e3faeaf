"""The benchmark against other projects: turns, contestants that fail, the table, and our own contestant."""

import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT, write_tiny_model

CONTESTANT = """
import os
import sys
import time
from peers_job import Channel, Clock

channel = Channel()
print("a library's banner")
behaviour = sys.argv[1]
if behaviour == "broken":
    import no_such_package
clock = Clock(channel)
clock.begin()
for step in range(3):
    if behaviour == "failing" and step == 1:
        if os.fork() == 0:
            time.sleep(60)  # a worker that keeps the pipe open
        raise ValueError("out of something\\nand more")
    clock.end_step([10 * (step + 1), step, 40])
channel.say("done", peak=2**30, versions={"it": "1"})
"""
JUDGED = {"roof": 1e12, "linear": 10**8, "head": 10**7, "device": "a CPU", "model": "a model", "untrained": 3.0}


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """The benchmark, with a small program in place of the contestants."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    (tmp_path / "peers_contestants.py").write_text(CONTESTANT)
    monkeypatch.setattr(peers, "HERE", tmp_path)
    monkeypatch.setattr(peers, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(peers, "environment", lambda peer, options: {"PYTHONPATH": str(ROOT / "benchmarks")})
    return peers


def ran(peers, *behaviours):
    chosen = {name: peers.Contestant(name) for name in behaviours}
    results = {name: peers.Result(name) for name in chosen}
    peers.run(list(results.values()), chosen, ROOT / "job", Namespace())
    return results


def job(**changes):
    return SimpleNamespace(
        **{"documents": [[[5, 6, 7], [-100, 6, 7]]], "rows": 1, "length": 4, "rank": 2, "dropout": 0.1}, **changes
    )


@pytest.mark.slow
def test_contestants_take_turns_and_those_that_fail_say_why(peers, capfd):
    started = time.monotonic()
    results = ran(peers, "remint", "broken", "failing")
    assert time.monotonic() - started < 30
    assert [step["tokens"] for step in results["remint"].steps] == [10, 20, 30]
    assert (results["remint"].peak, results["remint"].versions) == (2**30, {"it": "1"})
    assert results["broken"].failed == "ModuleNotFoundError: No module named 'no_such_package'"
    assert results["failing"].failed == "ValueError: out of something"
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("  step")]
    assert [("remint" in line, "failing" in line) for line in told[:3]] == [(True, True), (True, False), (True, False)]


def test_the_table_has_a_row_for_everyone(peers, tmp_path):
    results = [
        peers.Result("remint", [step(1, 300, 100)] * 3, 2**30, {"torch": "2"}, 2.0),
        peers.Result(
            "other",
            [step(9, 1, 1), step(3, 300, 100), step(2, 300, 100), step(1.5, 300, 100)],
            2**31,
            {"torch": "2"},
            2.25,
        ),
        peers.Result("gone", failed="needs a GPU"),
    ]
    lines = peers.report(results, JUDGED, job(precision="float32"), Namespace(threads=2)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {row.count("|") for row in rows} == {11}
    assert rows[2].startswith("| remint | 300 | 1.00 × | 100 | 0.124 | 12% | 1.0 | 75% | 3 | 2.0000")
    assert rows[3].startswith("| other | 150 | 2.00 × | 50 |")  # the slow first step does not count
    assert rows[4].startswith("| gone | no result: needs a GPU |")
    peers.draw(results, JUDGED, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "other" in drawn and "gone" not in drawn


def step(seconds, tokens, learned):
    return {"seconds": seconds, "tokens": tokens, "learned": learned, "places": tokens * 4 // 3}


@pytest.mark.parametrize("names", [["trll"], ["trl", "nobody"]])
def test_a_name_that_nobody_has_is_refused_before_anything_is_prepared(peers, monkeypatch, capsys, names):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--only", *names])
    with pytest.raises(SystemExit):
        peers.main()
    assert f"no name starts with ['{names[-1]}']; choose from 'Axolotl, defaults'" in capsys.readouterr().err
    assert not peers.SCRATCH.exists()


def test_what_cannot_be_installed_is_reported(peers, tmp_path, monkeypatch):
    (tmp_path / "peers_trl.txt").write_text("no such requirement !\n")
    with pytest.raises(peers.ContestantError, match="cannot be installed: ERROR: Invalid requirement"):
        peers.install(peers.Contestant("trl"))


def test_what_one_device_alone_needs_is_installed_with_the_rest(peers, tmp_path, monkeypatch):
    def run(command, **_):
        asked.append(command)
        (tmp_path / "scratch" / "trl").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0)

    asked = []
    monkeypatch.setattr(peers.subprocess, "run", run)
    (tmp_path / "peers_trl.txt").write_text("trl==1\n")
    for _ in range(2):
        assert peers.install(peers.Contestant("trl", more=("triton==3",))) == tmp_path / "scratch" / "trl"
    assert [command[-1] for command in asked] == ["triton==3"]
    peers.install(peers.Contestant("trl"))
    assert len(asked) == 2


def test_the_libraries_among_the_packages_of_a_peer_are_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    (tmp_path / "nvidia" / "cuda_runtime" / "lib").mkdir(parents=True)
    monkeypatch.setattr(peers, "install", lambda peer: tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    block = peers.environment(peers.Contestant("unsloth"), Namespace(threads=2, native=True))
    assert block["LD_LIBRARY_PATH"].split(":") == [str(tmp_path / "nvidia" / "cuda_runtime" / "lib"), "/before"]
    assert block["PYTHONPATH"].split(":")[0] == str(tmp_path)


@pytest.mark.slow
def test_ours_trains_the_very_documents(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    import peers_contestants
    import peers_referee
    from peers_job import IGNORED, Job

    from remint.compute.packing import document

    assert peers_referee.row(document([5, 6, 7, 8], [False, True, False, True])) == [[5, 6, 7, 8], [-100, 6, -100, 8]]
    base = write_tiny_model(tmp_path / "base")
    texts = [[5 + (i + j) % 200 for j in range(12)] for i in range(8)]
    documents = [[ids, [IGNORED] * 4 + ids[4:]] for ids in texts]
    work = Job(str(base), 0, 32, 1, 4, 4, 0.0, ["q_proj", "up_proj"], 5e-2, "float32", "cpu", 1, documents, documents)
    work.save(tmp_path / "job.json")
    steps = []
    clock = SimpleNamespace(begin=lambda: None, end_step=steps.append)
    assert "torch" in peers_contestants.remint(work, {}, tmp_path / "adapter", clock)
    assert sum(tokens for tokens, _, _ in steps) == 8 * 12
    assert sum(learned for _, learned, _ in steps) == 8 * 8
    monkeypatch.setattr(peers_referee, "roof", lambda *_: 1e12)
    folders = {"ours": (str(tmp_path / "adapter"), True), "lost": (str(tmp_path / "nowhere"), True)}
    judged = peers_referee.judge(tmp_path / "job.json", folders)
    assert judged["losses"]["ours"] < judged["untrained"] - 0.1
    assert "left no adapter" in judged["failed"]["lost"]
