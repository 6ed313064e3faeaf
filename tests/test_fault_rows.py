"""Every row of docs/faults.md is proved through the command that a user types; tests/faults/rows.py says how."""

# ruff: noqa: F811  (the fixtures of another file)
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.conftest import ROOT
from tests.faults import bench, rows
from tests.test_generated_faults import light, told  # noqa: F401

# How a test starts a command: as a process, through a workplace, in a fork of the bench, or by its arguments.
STARTS = re.compile(
    r"subprocess\.(run|Popen)\(|\b(toy|built|place|second)\.(run|start|repro)\(|bench\.(run_all|in_fork)\(|(?<![.\w])main\(\)"
)
COMMANDS = re.compile(r"remint|dvc|make|docker|tests.soak")


def documented():
    """The texts in the column `fault` of docs/faults.md."""
    text = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    return [line.split("|")[2].strip() for line in text.splitlines() if re.match(r"\| *\d", line)]


def faults(table):
    """The faults of a table, each with the name of its row."""
    return [
        replace(fault, name=f"{row} ({number})")
        for row, found in getattr(rows, table).items()
        for number, fault in enumerate(found, start=1)
    ]


def serve(table, template, folder, results):
    """In a process of the bench: run the faults of a table."""
    bench.run_all(faults(table), template, folder, results)


def check(run, table, template, tmp_path):
    """Let `run` run the faults of a table in another process. Fails with all complaints."""
    results = tmp_path / "results.json"
    run(serve, table, template, tmp_path / "places", results)
    count, found = json.loads(results.read_text(encoding="utf-8"))
    assert count == len(faults(table))
    assert not found, told(count, found)


def test_each_row_has_an_entry_and_each_entry_a_row():
    assert len(documented()) == len(set(documented()))
    assert {*rows.PLAIN, *rows.BUILT, *rows.TESTS} == {*documented()}
    assert all(fault.says or fault.statuses == (0,) for table in ("PLAIN", "BUILT") for fault in faults(table))


@pytest.mark.slow
def test_the_faults_of_a_new_clone_say_what_the_rows_say(light, plain, tmp_path):
    check(light, "PLAIN", plain, tmp_path)


@pytest.mark.slow
def test_the_faults_of_a_built_pipeline_say_what_the_rows_say(heavy, built_template, tmp_path):
    check(heavy, "BUILT", built_template, tmp_path)


def reached(tree, name):
    """The source of a test and of everything in its file that it uses, directly or not."""
    defined = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {target.id: node for node in tree.body if isinstance(node, ast.Assign)
                for target in ast.walk(node.targets[0]) if isinstance(target, ast.Name)}  # fmt: skip
    seen, todo = {}, [name]
    while todo:
        node = defined.get(current := todo.pop())
        if node is None or current in seen:
            continue
        seen[current] = ast.unparse(node)
        todo += re.findall(r"\w+", seen[current])
    return "\n".join(seen.values())


@pytest.mark.parametrize("named", sorted(set(rows.TESTS.values())))
def test_a_named_test_starts_a_command(named):
    file, _, name = named.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    used = reached(tree, name)
    assert used, f"{named} does not exist"
    assert STARTS.search(used), f"{named} starts nothing"
    assert COMMANDS.search(used)


@pytest.mark.slow
def test_a_damaged_cache_is_found_by_verify(toy):
    with_copies = ("dvc", "config", "--local", "cache.type", "copy")
    toy.run(*with_copies)
    data = (toy.root / "data/model/file").read_bytes()
    stored = [
        path for path in (toy.root / ".dvc/cache/files").rglob("*") if path.is_file() and path.read_bytes() == data
    ]
    kept = {path: path.stat() for path in stored}
    for path, facts in kept.items():
        path.chmod(0o644)
        path.write_bytes(data[:-1] + b"?")
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    shutil.rmtree(toy.root / "data/model")
    try:
        toy.run("dvc", "checkout")
        assert "up to date" in toy.run("dvc", "status")
        assert "data/model/file: content differs" in toy.run("remint", "verify", status=1)
    finally:
        for path in stored:
            path.write_bytes(data)
        shutil.rmtree(toy.root / "data/model")
        toy.run("dvc", "checkout")


def test_set_up_goes_on_with_a_broken_database(tmp_path):
    """`make setup` in a place where the environment is this one, and installing anything does nothing."""
    (tmp_path / "docker").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "docker/requirements.lock", "docker/torch.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in (
        ("docker/install", "exit 0"),
        (".venv/bin/python", f'case $* in "-m pip"*) ;; *) exec {sys.executable} "$@" ;; esac'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mlflow.db").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DVC", "MAKE"))}
    done = subprocess.run(
        ["make", "setup"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: MLflow at ")
    assert "`mv mlflow.db mlflow.db.broken`" in line
    assert (tmp_path / ".venv/.complete").exists()
