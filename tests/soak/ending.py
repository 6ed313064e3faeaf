"""What must be true after the last command: whole artefacts, equal results, nothing left behind."""

import collections
import re
import signal

import psutil

from remint.core import manifest
from remint.core.paths import ARTEFACTS

_LEFT = ("data/.*.draft", "data/.*.lock", "data/.*.old", ".scratch/train/*", ".dvc/tmp/exps/standalone/*")
_UNCHANGED = "Data and pipelines are up to date."


def check_pipeline(pipeline):
    """Verify a pipeline's artefacts, its state by DVC, and its row in MLflow; nothing unfinished may be left."""
    record, root = pipeline.record, pipeline.root
    for command, expected in (
        (("docker/run", "python", "-m", "remint", "verify"), "as recorded"),
        (("dvc", "status"), _UNCHANGED),
        (("docker/run", "python", "-m", "remint", "sync"), "MLflow: pipeline run"),
    ):
        said = _output(pipeline, *command)
        if said.count(expected) != (len(ARTEFACTS) if expected == "as recorded" else 1):
            record.fault(pipeline.name, f"`{' '.join(command)}` says\n{said[-2000:]}")
    left = [str(path.relative_to(root)) for pattern in _LEFT for path in root.glob(pattern)]
    if left:
        record.fault(pipeline.name, f"left behind: {', '.join(left)}")
    record.count("artefacts verified", len(ARTEFACTS))


def _output(pipeline, *command):
    process = pipeline.place.start(*command, stdout=-1, stderr=-2)
    said = process.communicate(timeout=1800)[0]
    with pipeline.log.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n{said}")
    return said


def check_equal(pipelines, record):
    """Pipelines with equal settings have equal bytes and an equal dvc.lock; others differ."""
    groups = collections.defaultdict(list)
    for pipeline in pipelines:
        groups[tuple(pipeline.settings.items())].append(pipeline)
    models = set()
    for same in groups.values():
        first = same[0]
        whole, lock = first.place.bytes(*ARTEFACTS), (first.root / "dvc.lock").read_bytes()
        models.add(whole.get("data/model/model.safetensors"))
        for other in same[1:]:
            found = other.place.bytes(*ARTEFACTS)
            differing = sorted(name for name in {*whole, *found} if whole.get(name) != found.get(name))
            if differing:
                record.fault(other.name, f"differs from {first.name} in {', '.join(differing[:8])}")
            if (other.root / "dvc.lock").read_bytes() != lock:
                record.fault(other.name, f"has another dvc.lock than {first.name}")
            record.count("pipelines equal to another")
    if len(models) != len(groups):
        record.fault("models", f"{len(groups)} different settings made {len(models)} different models")
    record.count("different settings", len(groups))


def state_of(pipeline):
    """The key under which `remint sync` logs the pipeline's present state."""
    folders = {name: pipeline.root / "data" / name for name in sorted([*ARTEFACTS, "source"])}
    files = {name: path / manifest.NAME for name, path in folders.items()}
    return manifest.digest({name: manifest.file_digest(file) for name, file in files.items() if file.is_file()})


def check_store(store, pipelines, record):
    """Every state has one finished row, and no row says that a process still runs. The server must have ended."""
    runs = store.runs()
    rows = collections.Counter(run["tags"].get("remint.state") for run in runs if run["status"] == "FINISHED")
    for pipeline in pipelines:
        if not rows[state_of(pipeline)]:
            record.fault("MLflow", f"no finished row for the state of {pipeline.name}")
    for run in runs:
        record.count(f"MLflow rows {run['status']}")
        if run["status"] == "RUNNING":
            same = run["tags"].get("remint.fingerprint")
            twins = [r["status"] for r in runs if r is not run and r["tags"].get("remint.fingerprint") == same]
            record.fault("MLflow", f"the row {run['name']} is RUNNING for a process that is gone (its twins: {twins})")


def check_processes(root, record):
    """No process works in the folder any more; what is left is ended."""
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if re.match(rf"{re.escape(str(root))}(/|$)", process.info["cwd"] or "") and process.pid != psutil.Process().pid:
            record.fault("processes", f"left: {' '.join(process.info['cmdline'] or [])[:300]}")
            process.send_signal(signal.SIGKILL)
