"""Names and dependencies agree wherever they are written, and the layers hold."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from remint import fingerprint
from remint.core import config

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
STAGES = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"))["stages"]
# Seen by no stage: they may change without anything being rebuilt.
ABOVE = {
    "tracking.py",
    "terminal.py",
    "recipes.py",
    "served.py",
    "export.py",
    "import_adapter.py",
    "signature.py",
    "summary.py",
    "reproduce.py",
    "rebuild.py",
    "fingerprint.py",
    "process.py",
    "__main__.py",
}


def imported(file: Path) -> set[Path]:
    """Files of the package that `file` imports, directly or not."""
    seen: set[Path] = set()
    todo = [file]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for node in ast.walk(ast.parse(current.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "remint":
                base = SRC / (node.module or "").replace(".", "/")
                names = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
                todo += [path for path in names if path.exists()]
    return seen


def test_every_stage_has_a_folder_of_its_own_name():
    assert {path.parent.name for path in (SRC / "remint/stages").glob("*/run.py")} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_knows_every_file_that_a_stage_imports(stage, in_root):
    declared = fingerprint.declared(stage)
    files = [path.relative_to(ROOT) for path in imported(SRC / f"remint/stages/{stage}/run.py")]
    missing = [str(f) for f in files if not any(f == d or d in f.parents for d in declared)]
    assert not missing, f"add to dvc.yaml, stages.{stage}.deps: {sorted(missing)}"


def test_a_place_given_on_the_command_line_is_the_one_that_counts(in_root):
    places = [path.as_posix() for path in fingerprint.declared("merge", {"adapter": "data/imported"})]
    assert "data/imported" in places
    assert "data/adapter" not in places
    assert "data/base" in places


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_declares_no_file_that_a_stage_does_not_import(stage, in_root):
    code = [d for d in fingerprint.declared(stage) if d.suffix == ".py"]
    files = {path.relative_to(ROOT) for path in imported(SRC / f"remint/stages/{stage}/run.py")}
    assert not set(code) - files


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage_and_nothing_from_above(stage):
    for file in imported(SRC / f"remint/stages/{stage}/run.py"):
        assert "stages" not in file.parts or stage in file.parts, file
        assert file.name not in ABOVE, file


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_told_exactly_the_settings_that_dvc_tracks_for_it(stage, in_root):
    wanted = set(config.sections(import_module(f"remint.stages.{stage}.run").run)) - {"paths"}
    sections = {entry for entry in STAGES[stage]["params"] if isinstance(entry, str)}
    files = {key for entry in STAGES[stage]["params"] if isinstance(entry, dict) for key in entry}
    assert sections == wanted
    assert files == {f"conf/{name}/${{{name}}}.yaml" for name in wanted if (ROOT / "conf" / name).is_dir()}


def test_plots_point_at_the_report(in_root):
    report = config.load_yaml(Path("params.yaml"))["paths"]["report"]
    plots = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"))["plots"]
    assert {path for plot in plots for spec in plot.values() for path in spec["y"]} == {f"{report}/curves.csv"}


@pytest.mark.parametrize("path", sorted((SRC / "remint/core").glob("*.py")), ids=lambda p: p.name)
def test_the_core_needs_no_torch(path):
    text = path.read_text(encoding="utf-8")
    assert not any(f"import {name}" in text for name in ("torch", "transformers", "peft", "mlflow"))


def test_the_readme_names_every_stage_and_target():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [stage for stage in STAGES if f"`{stage}`" not in readme]
    for command in ("make repro", "make test", "make chat", "make ui", "make recipes"):
        assert command in readme
