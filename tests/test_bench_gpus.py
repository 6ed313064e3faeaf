"""The benchmark of several GPUs, here on a CPU: the same bytes for any number of processes, also after a kill."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

JOB = {"shape": "tiny", "steps": 10, "micro_batches": 16, "rows": 4, "length": 2048}
MACHINE = {"device": "a GPU", "torch": "2", "gpus": 8}


@pytest.fixture
def gpus(monkeypatch):
    """The benchmark's module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpus

    return gpus


def row(part, processes, **facts):
    known = {"key": "k", "job": JOB, "machine": MACHINE, "shape": "tiny", "date": "2026-11-27 10:00"}
    return {**known, "part": part, "processes": processes, **facts}


def run(processes, step_s, sha256="a" * 64):
    return row(
        "speed",
        processes,
        tokens_per_s=100_000 / step_s,
        step_s=step_s,
        ready_s=20.0,
        stage_s=60.0,
        peak_gib=[40.0] * processes,
        sha256=sha256,
    )


EXCHANGE = {"bytes": 8e8, "add_s": 0.004, "finish_s": 0.002, "all_to_all_s": 0.002, "all_gather_s": 0.002, "roof": 7e14}


@pytest.mark.slow
def test_every_part_runs_and_all_checkpoints_have_the_same_bytes(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpus.py"), "--shapes", "tiny", "--processes", "2", "1"]
    command += ["--steps", "8", "--micro-batches", "4", "--place", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "REMINT_DEVICE": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = (tmp_path / "out").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["part"], row["processes"]) for row in rows] == [
        ("speed", 2),
        ("speed", 1),
        ("exchange", 2),
        ("kill", 2),
        ("nodes", 2),
    ]
    assert len({row["sha256"] for row in rows if row["part"] != "exchange"}) == 1
    assert "All 4 checkpoints have the same bytes" in done.stdout
    killed = rows[3]
    assert killed["status"] == 1
    assert killed["continued"] >= killed["save_steps"]
    assert 0 <= killed["lost"] <= killed["save_steps"]


def test_the_table_compares_with_one_process_and_computes_two_machines(gpus):
    rows = [run(8, 1.0), row("exchange", 8, **EXCHANGE), run(1, 7.6)]
    text = gpus.table(rows)
    assert "| 1 | 13,158 | 1.00 | 13,158 | 7.600 |  | 40.0 | 20.0 | 60.0 |" in text
    assert "| 8 | 100,000 | 7.60 | 12,500 | 1.000 | 1.0% | 40.0 | 20.0 | 60.0 |" in text
    assert "All 2 checkpoints have the same bytes" in text
    # Two rounds with 8 halves of 800 MB, then 15 of 16 parts: 7.15 GB at 45 and at 11.25 GB/s.
    assert "| 400 Gb/s | 16 | 172,579 | 13.12 | 7,150 | 1.159 |" in text
    assert "| 100 Gb/s | 16 | 122,283 | 9.29 | 7,150 | 1.636 |" in text
    assert "Computed, not measured" in text


def test_other_bytes_are_told_and_other_machines_are_not_compared(gpus):
    other = run(2, 4.0, sha256="b" * 64)
    text = gpus.table([run(1, 7.6), other])
    assert "**The checkpoints differ**: `aaaaaaaaaaaaaaaa` (speed 1); `bbbbbbbbbbbbbbbb` (speed 2)." in text
    assert "differ" not in gpus.table([run(1, 7.6), {**other, "machine": {**MACHINE, "device": "another GPU"}}])


def test_the_first_steps_and_the_last_are_not_counted(gpus):
    job = gpus.Job("tiny", 7, 4, 2, 100)
    made = {"steps": 7, "tokens_a_row": 90.0}
    found = gpus.rates(job, made, {1: 10.0, 2: 10.0, 3: 10.0, 4: 100.0, 5: 300.0, 6: 150.0, 7: 900.0})
    assert found == {"tokens_per_s": 150.0, "slowest": 100.0, "fastest": 300.0, "counted": 3, "step_s": 720 / 150}


def test_an_older_torch_gets_the_name_that_the_stage_calls(gpus, tmp_path):
    # A name that no torch has stands for the one that older ones lack.
    text = gpus.gpus_job.SHIM.replace("all_gather_single", "a_new_name")
    (tmp_path / "sitecustomize.py").write_text(text)
    check = "import torch.distributed as d; assert d.a_new_name is d.all_gather_into_tensor"
    subprocess.run([sys.executable, "-c", check], env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)


def test_the_adapter_that_is_exchanged_has_the_shape_of_the_base(gpus):
    # docs/results.md: rank 64 on InternLM2-1.8B
    assert round(4 * sum(gpus.gpus_job.adapter_sizes("internlm2-1.8b")) / 1e6) == 277
