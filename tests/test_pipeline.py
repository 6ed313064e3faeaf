"""Names and dependencies agree in every file that lists them, and no room imports one above it."""

import ast
import contextlib
import functools
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from remint.commands import verify
from remint.core.draft import artefact
from remint.core.errors import ArtefactError, RemintError
from remint.core.log import silent
from remint.core.paths import ARTEFACTS, MADE_BY, Paths
from remint.runner import config, pipeline, preflight
from remint.stages.merge import provenance
from tests.conftest import DECLARED
from tests.workplace import composed, sections

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
STAGES = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"))["stages"]
# What each room may import besides itself. A stage that imports a room has the entire room as a dependency in dvc.yaml.
ROOMS = {
    "core": set(),
    "identity": {"core"},
    "model": {"core"},
    "weights": {"core", "model"},
    "compute": {"core", "model"},
    "stages": {"core", "identity", "model", "weights", "compute"},
    # No stage may import these: they may change without anything being rebuilt.
    "serving": {"core", "model", "weights", "compute"},
    "runner": {"core", "identity", "model", "weights", "stages"},
    "commands": {"core", "model", "compute", "stages", "serving", "runner"},
    "__main__": {"core", "commands"},
}


def room(file: Path) -> str:
    """The room of a file of the package: its first folder, or its own name."""
    return file.relative_to(SRC / "remint").parts[0].removesuffix(".py")


@functools.cache
def imported_names(file: Path) -> set[str]:
    """Dotted names of everything that a file imports from the package, at any place in the file.

    In `from remint.x import y`, y may be a module or something in x: both are named, and so is each package above them.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import, which this test does not follow"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names if name.split(".")[0] == "remint"]
    return {".".join(some[:length]) for some in parts for length in range(2, len(some) + 1)}


@functools.cache
def has_code(file: Path) -> bool:
    """Whether a file contains more than a docstring."""
    return len(ast.parse(file.read_text(encoding="utf-8")).body) > 1


@functools.cache
def imported(file: Path) -> set[Path]:
    """Files with code that `file` imports from the package, directly or not, and itself.

    The package's own `__init__` is left out: it holds the version, which no result depends on.
    """
    seen: set[Path] = set()
    todo = [file]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in imported_names(current):
            base = SRC / name.replace(".", "/")
            todo += [
                path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists() and has_code(path)
            ]
    return seen


@pytest.mark.parametrize(
    "line",
    [
        "from remint.compute import kernels",
        "import remint.compute.kernels",
        "from remint.compute.kernels import head",
        "    import remint.compute.kernels as k",
    ],
)
def test_an_import_is_followed_into_a_package_however_it_is_written(line, tmp_path):
    file = tmp_path / "stage.py"
    file.write_text(f"if True:\n    {line.strip()}\n" if line.startswith(" ") else line)
    found = imported(file)
    assert {SRC / f"remint/compute/kernels/{name}.py" for name in ("__init__", "adapted", "head")} <= found
    assert SRC / "remint/model/libraries.py" in found


def test_dvc_writes_where_the_stages_do(in_root):
    assert list(MADE_BY) == list(STAGES)
    for stage, kind in MADE_BY.items():
        place = getattr(Paths(), kind)
        assert {out if out == place else out.parent for out in pipeline.outs(stage)} == {place}
        assert f"data/{kind}" == place.as_posix()


def test_every_stage_has_a_folder_of_its_own_name():
    assert {path.parent.name for path in (SRC / "remint/stages").glob("*/run.py")} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_knows_every_file_that_a_stage_imports(stage, in_root):
    declared = pipeline.dependencies(stage)
    files = [path.relative_to(ROOT) for path in imported(SRC / f"remint/stages/{stage}/run.py")]
    missing = [str(f) for f in files if not any(f == d or d in f.parents for d in declared)]
    assert not missing, f"add to dvc.yaml, stages.{stage}.deps: {sorted(missing)}"


def test_a_place_given_on_the_command_line_is_the_one_that_counts(in_root):
    places = [path.as_posix() for path in pipeline.dependencies("merge", Paths(adapter=Path("data/imported")))]
    assert "data/imported" in places
    assert "data/adapter" not in places
    assert "data/base" in places


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_declares_no_room_that_a_stage_does_not_import(stage, in_root):
    code = [d for d in pipeline.dependencies(stage) if d.is_relative_to("src")]
    files = {path.relative_to(ROOT) for path in imported(SRC / f"remint/stages/{stage}/run.py")}
    assert not [str(d) for d in code if not any(f == d or d in f.parents for f in files)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage(stage):
    for file in imported(SRC / f"remint/stages/{stage}/run.py"):
        assert "stages" not in file.parts or stage in file.parts, file


@pytest.mark.parametrize("file", sorted((SRC / "remint").rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_a_room_imports_only_rooms_below_it(file):
    own = room(file)
    if own == "__init__":
        assert not imported_names(file)
        return
    used = {name.split(".")[1] for name in imported_names(file)} - {own}
    # A file that reads the version imports the package itself.
    assert used <= ROOMS[own] | {"__version__"}, f"{own} may not import {sorted(used - ROOMS[own])}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gets_exactly_the_settings_that_dvc_tracks_for_it(stage, in_root):
    wanted = set(sections(stage)) - {"paths"}
    declared = {entry for entry in STAGES[stage]["params"] if isinstance(entry, str)}
    files = {key for entry in STAGES[stage]["params"] if isinstance(entry, dict) for key in entry}
    assert declared == wanted
    assert files == {f"conf/{name}/${{{name}}}.yaml" for name in wanted if (ROOT / "conf" / name).is_dir()}


READS = [(stage, dep[5:]) for stage in STAGES for dep in STAGES[stage]["deps"] if dep.startswith("data/")]


@functools.cache
def made_with(stage):
    """The settings of a stage, as its artefact records them."""
    with contextlib.chdir(ROOT):
        return pipeline.plain(config.compose_raw(preflight.declared_settings(stage)))


@pytest.fixture
def artefacts(tmp_path):
    """One artefact of each kind with a single file, and the facts that a stage reads before all are verified."""
    for kind in ARTEFACTS:
        with artefact(tmp_path / f"data/{kind}", kind) as (draft, facts):
            (draft / "file").write_text("whole")
            facts |= {"name": "A", "identity": {"name": "A", "maker": "B", "name_zh": None, "maker_zh": None}}
            facts["made_by"] = {
                stage: {"settings": made_with(stage)} for stage, made in MADE_BY.items() if made == kind
            }
            if kind == "model":
                source = {"kind": "local_folder", "location": "folder", "revision": None}
                provenance.write(
                    draft, {"source": source, "source_files": {}}, {"identity": facts["identity"], "sources": {}}, {}
                )
    return tmp_path


@pytest.mark.parametrize(("stage", "kind"), [(stage, kind) for stage, kind in READS if kind != "source"])
def test_a_stage_refuses_a_damaged_artefact_before_it_does_anything(stage, kind, artefacts, in_root, monkeypatch):
    run = import_module(f"remint.stages.{stage}.run").run
    arguments = composed(stage) | {"declared": DECLARED, "log": silent}
    monkeypatch.chdir(artefacts)
    (artefacts / f"data/{kind}/file").write_text("wh0le")
    with pytest.raises(ArtefactError, match=f"data/{kind}/file: content differs, 5 bytes with sha256 "):
        run(**arguments)
    assert {path.name for path in (artefacts / "data").iterdir()} == set(ARTEFACTS)


@pytest.fixture
def verified(artefacts, monkeypatch):
    """The artefacts, with the settings that made them, as the working directory."""
    for name in ("conf", "dvc.yaml"):
        (artefacts / name).symlink_to(ROOT / name)
    (artefacts / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(artefacts)
    return artefacts


def write_lock(folder, **changes):
    """Write a dvc.lock with the settings of params.yaml, as DVC does, and `changes` to those of train."""
    params = config.load_yaml(folder / "params.yaml")
    params["train"] |= changes
    model = config.load_yaml(folder / f"conf/model/{params['model']}.yaml")
    locked = {
        "train": {"params.yaml": {name: params[name] for name in ("seed", "runtime", "train")}},
        "stage_base": {"params.yaml": {"model": params["model"]}, f"conf/model/{params['model']}.yaml": model},
    }
    content = {"stages": {stage: {"cmd": "x", "params": found} for stage, found in locked.items()}}
    (folder / "dvc.lock").write_text(yaml.safe_dump(content))


def test_verify_compares_each_artefact_with_the_settings_that_are_recorded(verified, capsys):
    write_lock(verified)
    verify.main()
    assert capsys.readouterr().out.count("as recorded") == len(ARTEFACTS)
    write_lock(verified, lr=0.5)
    with pytest.raises(RemintError) as told:
        verify.main()
    assert told.value.faults == (
        "data/checkpoint: was made with train.lr 0.003, dvc.lock has 0.5; make it again with "
        "`dvc repro --force --single-item train`",
    )
    write_lock(verified)
    text = (verified / "params.yaml").read_text()
    (verified / "params.yaml").write_text(text.replace("seed: 42", "seed: 43").replace("dtype: base", "dtype: float32"))
    with pytest.raises(RemintError) as told:
        verify.main()
    assert [fault.partition(";")[0] for fault in told.value.faults] == [
        "data/dataset: was made with seed 42, params.yaml has 43",
        "data/checkpoint: was made with seed 42, params.yaml has 43",
        "data/model: was made with merge.dtype 'base', params.yaml has 'float32'",
    ]


def test_verify_names_every_file_at_fault_of_every_artefact(verified, capsys):
    artefacts = verified
    verify.main()
    assert capsys.readouterr().out.count("as recorded") == len(ARTEFACTS)
    for kind in ARTEFACTS:
        (artefacts / f"data/{kind}/file").write_text("longer")
        (artefacts / f"data/{kind}/more").touch()
    with pytest.raises(RemintError) as told:
        verify.main()
    for kind in ARTEFACTS:
        assert f"data/{kind}/file: content differs, 6 bytes with sha256 73834addcec7" in str(told.value)
        assert f"data/{kind}/more: is not part of the artefact, 0 bytes with sha256 e3b0c44298fc" in str(told.value)


def test_plots_point_at_the_report(in_root):
    report = Paths().report
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
