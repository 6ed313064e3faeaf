"""What MLflow gets: one run for each stage that logs live, and one for each state of the pipeline.

Only the recorder's process calls this (`runner/recorder.py`): MLflow may wait, print or fail.
"""

import contextlib
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from remint.core.files import read_object, read_rows
from remint.core.manifest import NAME, digest, file_digest, flat
from remint.core.paths import PARAMS, Paths
from remint.runner import store
from remint.runner.config import load_yaml
from remint.runner.store import EXPERIMENT
from remint.runner.store_faults import set_aside

# MLflow accepts at most this many metrics in one request.
_BATCH = 1000


def stage_run(task: Mapping[str, Any], computing: bool, progress: Callable[[], None]) -> "StageRun | None":
    """The run of a stage, which continues an unfinished one of the same fingerprint. None if there is nothing to log.

    `task` has the stage, its fingerprint and settings, and the folder of its dataset or None. Without `computing`, all
    that is to be logged was computed before: a run that has ended well has it already.
    """
    client, experiment = _connect(progress)
    same = f"tags.`remint.fingerprint` = '{task['fingerprint']}'"
    unfinished = client.search_runs([experiment], f"{same} and attributes.status != 'FINISHED'", max_results=1)
    if not unfinished and not computing and client.search_runs([experiment], same, max_results=1):
        return None
    return StageRun(client, experiment, task, unfinished[0] if unfinished else None)


class StageRun:
    """One run of a stage. It repeats no step of the unfinished run that it continues."""

    def __init__(self, client: Any, experiment: str, task: Mapping[str, Any], unfinished: Any):
        self._client = client
        self._logged: dict[str, set[int]] = defaultdict(set)
        if unfinished:
            run = unfinished
            self._run_id = run.info.run_id
            self._client.update_run(self._run_id, "RUNNING")
            for key in run.data.metrics:
                if not key.startswith("system/"):
                    self._logged[key] = {m.step for m in self._client.get_metric_history(self._run_id, key)}
        else:
            name = f"{task['stage']}-{task['fingerprint'][:7]}"
            tags = {"remint.kind": "stage", "remint.stage": task["stage"], "remint.fingerprint": task["fingerprint"]}
            run = self._client.create_run(experiment, run_name=name, tags=tags | _circumstances())
            self._run_id = run.info.run_id
        # The first attempt may have ended between these requests.
        if not run.data.params:
            _log_params(self._client, self._run_id, task["settings"])
        if task["dataset"] and not run.inputs.dataset_inputs:
            _log_datasets(self._client, self._run_id, Path(task["dataset"]))
        self._monitor = _monitor(self._run_id, bool(unfinished))

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the metrics that the run does not have yet. A row has `metrics` by name, `step` and `time` in ms."""
        from mlflow.entities import Metric

        fresh = [
            Metric(key, value, row["time"], row["step"])
            for row in rows
            for key, value in row["metrics"].items()
            if row["step"] not in self._logged[key]
        ]
        for start in range(0, len(fresh), _BATCH):
            batch = fresh[start : start + _BATCH]
            self._client.log_batch(self._run_id, metrics=batch)
            for metric in batch:
                self._logged[metric.key].add(metric.step)

    def end(self, status: str) -> None:
        """End the run with one of MLflow's statuses, such as FINISHED."""
        self._monitor.finish()
        self._client.set_terminated(self._run_id, status)

    def leave(self) -> None:
        """Stop measuring the machine, after a failure."""
        self._monitor.finish()


def _monitor(run_id: str, continued: bool) -> Any:
    """Logs CPU, memory, disk and GPU use every ten seconds, in addition to the stage's own metrics."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=continued, tracking_uri=store.uri())
    monitor.start()
    return monitor


def log_state(progress: Callable[[], None]) -> str:
    """Log the pipeline's present state as one run, unless the store already has it. Returns what was done."""
    client, experiment = _connect(progress)
    folder = store.artifact_folder(client.get_experiment(experiment).artifact_location)
    if store.is_own() and folder and store.ROOT not in folder.parents and not folder.is_dir():
        raise store.StoreError(
            f"its artifacts belong in {folder}, which does not exist: the database was made for another folder",
            set_aside(store.ROOT / "mlflow.db"),
        )
    paths = vars(Paths())
    key = digest({name: file_digest(path / NAME) for name, path in sorted(paths.items()) if (path / NAME).is_file()})
    for run in client.search_runs([experiment], f"tags.`remint.state` = '{key}'"):
        if run.info.status == "FINISHED":
            return f"MLflow: pipeline run {run.info.run_name} already has this state"
        client.delete_run(run.info.run_id)  # left by a `remint sync` that was interrupted
    name = f"pipeline-{key[:7]}"
    tags = {"remint.kind": "pipeline", "remint.state": key, **_circumstances()}
    run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    _fill(client, experiment, run_id, paths)
    client.set_terminated(run_id, "FINISHED")
    return f"MLflow: pipeline run {name} logged; `make ui` shows it"


def _fill(client: Any, experiment: str, run_id: str, paths: Mapping[str, Path]) -> None:
    """Log settings, metrics, datasets and files of the pipeline's state to its run."""
    for file in (paths["report"] / "report.html", paths["report"] / "transcript.jsonl", PARAMS, Path("dvc.lock")):
        if file.is_file():
            client.log_artifact(run_id, str(file))
    _log_params(client, run_id, load_yaml(PARAMS))
    _log_metrics(client, run_id, paths)
    _log_datasets(client, run_id, paths["dataset"])
    _adopt_stage_runs(client, experiment, run_id, paths)
    _register(client, run_id, paths["model"])


class _Reporting:
    """A client of MLflow that calls `progress` after each answer of the store."""

    def __init__(self, client: Any, progress: Callable[[], None]):
        self._client, self._progress = client, progress

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            answer = getattr(self._client, name)(*arguments, **options)
            self._progress()
            return answer

        return call


def _connect(progress: Callable[[], None]) -> tuple[Any, str]:
    """A client of the store, and the id of the experiment, which is created if it does not exist.

    Raises StoreError if the experiment was deleted.
    """
    import mlflow

    address = store.uri()
    mlflow.set_tracking_uri(address)
    client = _Reporting(mlflow.MlflowClient(), progress)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if not experiment:
        return client, client.create_experiment(
            EXPERIMENT, (store.ROOT / "mlruns").as_uri() if store.is_own() else None
        )
    if experiment.lifecycle_stage == "deleted":
        name = store.public(address)
        raise store.StoreError(
            f"the experiment {EXPERIMENT} was deleted",
            f"`MLFLOW_TRACKING_URI={name} .venv/bin/mlflow experiments restore -x {experiment.experiment_id}`",
        )
    return client, experiment.experiment_id


def _log_params(client: Any, run_id: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, str(value)[:6000]) for key, value in flat(settings)])


def _log_metrics(client: Any, run_id: str, paths: Mapping[str, Path]) -> None:
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    now, entries = get_current_time_millis(), []
    metrics = paths["report"] / "metrics.json"
    if metrics.is_file():
        entries += [Metric(key, float(value), now, 0) for key, value in flat(read_object(metrics))]
    history = paths["checkpoint"] / "history.jsonl"
    if history.is_file():
        entries += [
            Metric(f"train.{key}", float(row[key]), now, int(row["step"]))
            for row in read_rows(history)
            for key in row.keys() - {"step"}
        ]
    for start in range(0, len(entries), _BATCH):
        client.log_batch(run_id, metrics=entries[start : start + _BATCH])


def _log_datasets(client: Any, run_id: str, folder: Path) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    files = read_object(folder / NAME)["files"]
    inputs = [
        DatasetInput(
            Dataset(name, facts["sha256"][:36], "local", json.dumps({"uri": (folder / name).as_posix()})),
            [InputTag("mlflow.data.context", "training" if name == "train.jsonl" else "evaluation")],
        )
        for name, facts in sorted(files.items())
    ]
    client.log_inputs(run_id, inputs)


def _adopt_stage_runs(client: Any, experiment: str, run_id: str, paths: Mapping[str, Path]) -> None:
    """Make the stage runs of this state children of the pipeline's run. The artefacts record their fingerprints."""
    made_by = {
        "train": _facts(paths["checkpoint"]).get("origin", {}).get("fingerprint"),
        "eval_chat": _facts(paths["report"]).get("fingerprint"),
    }
    for stage, fingerprint in made_by.items():
        if not fingerprint:
            continue
        client.set_tag(run_id, f"remint.{stage}.fingerprint", fingerprint)
        for run in client.search_runs([experiment], f"tags.`remint.fingerprint` = '{fingerprint}'", max_results=1):
            client.set_tag(run_id, f"remint.{stage}.run_id", run.info.run_id)
            if "mlflow.parentRunId" not in run.data.tags:
                client.set_tag(run.info.run_id, "mlflow.parentRunId", run_id)


def _facts(folder: Path) -> dict[str, Any]:
    """The facts in an artefact's manifest; empty if there is no manifest."""
    file = folder / NAME
    return read_object(file)["facts"] if file.is_file() else {}


def _register(client: Any, run_id: str, model: Path) -> None:
    """Register the merged model by reference, with the alias `champion`. Its gigabytes stay in DVC's cache."""
    if not (model / NAME).is_file():
        return
    import mlflow
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):
        client.create_registered_model(
            EXPERIMENT, description="Merged models, by reference to the artefact that DVC tracks"
        )
    tags = {"manifest.sha256": file_digest(model / NAME), "path": model.as_posix()}
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).parents[1] / "serving/mlflow_model.py"),
            model_config={"path": model.as_posix(), "manifest_sha256": tags["manifest.sha256"]},
            pip_requirements=["remint"],
            registered_model_name=None,
        )
    version = client.create_model_version(
        EXPERIMENT, logged.model_uri, run_id, tags=tags, model_id=logged.model_id
    )  # model_id: a tracking server requires the logged model that the source belongs to
    client.set_registered_model_alias(EXPERIMENT, "champion", version.version)


def _circumstances() -> dict[str, str]:
    """Tags: commit, uncommitted changes, DVC experiment, image. $GIT_COMMIT is the host's commit in a container."""
    environment = os.environ
    known = {
        "git.commit": environment.get("GIT_COMMIT") or _git("rev-parse", "HEAD"),
        "git.dirty": str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower(),
        "dvc.experiment": environment.get("DVC_EXP_NAME", ""),
        "dvc.baseline": environment.get("DVC_EXP_BASELINE_REV", ""),
        "docker.image": environment.get("IMAGE_ID", ""),
    }
    return {key: value for key, value in known.items() if value}


def _git(*arguments: str) -> str:
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""  # without a commit, rev-parse prints its argument
    return ""
