"""More than a thousand generated faults: each ends in a short message of the form `where: what; cure`, none in a traceback."""

import json
import os

import pytest

from tests.faults import bench, cases
from tests.workplace import imported

LIGHT = [
    "remint.runner.stage",
    "remint.stages.replicate_data.run",
    "datasets",
    "remint.commands.verify",
    "tests.test_generated_faults",
]


def serve(kind, names, template, folder, results):
    """In a process of the bench: run `remint` with each fault of one kind, or with those whose names are given."""
    faults = [fault for fault in cases.every(kind) if names is None or fault.name in names]
    bench.run_all(faults, template, folder, results)


def complaints(run, kind, names, template, folder):
    """Let `run` run faults of one kind in another process; returns the number of faults and the complaints."""
    results = folder / f"{kind}.json"
    run(serve, kind, names, template, folder / kind, results)
    return json.loads(results.read_text(encoding="utf-8"))


def told(count, found):
    """What a failing test prints."""
    return f"{len(found)} of {count} faults are reported badly\n" + "\n".join(
        f"- {name}: {said}" for name, said in found
    )


@pytest.fixture(scope="module")
def light():
    """Returns a function that calls another one in a process of its own, which has imported what needs no torch."""
    with imported(*LIGHT, threads=1) as context:

        def run(function, *arguments):
            process = context.Process(target=function, args=arguments)
            process.start()
            process.join()
            assert process.exitcode == 0

        yield run


# Which part of the faults the slow tests run. `make fuzz` runs them all.
PART = 1 if os.environ.get("FUZZ_EXAMPLES") else 3


def names_of(kind):
    """The names of the faults of a kind that the slow tests run."""
    return [fault.name for fault in cases.every(kind)[::PART]]


def test_there_are_enough():
    kinds = [*cases.LIGHT, *cases.HEAVY, "commands"]
    assert sum(len(cases.every(kind)) for kind in kinds) >= 1000
    assert sum(len(names_of(kind)) for kind in kinds) >= 300


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases.HEAVY)
def test_faults_of_a_built_pipeline_are_reported_in_one_form(heavy, built_template, tmp_path, kind):
    count, found = complaints(heavy, kind, names_of(kind), built_template, tmp_path)
    assert not found, told(count, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*cases.LIGHT, "commands"])
def test_faults_are_reported_in_one_form(light, plain, tmp_path, kind):
    count, found = complaints(light, kind, names_of(kind), plain, tmp_path)
    assert not found, told(count, found)
