"""Logs to MLflow: `train` and `eval_chat` log live, and every state of the pipeline becomes one complete run.

DVC owns the artefacts, MLflow only observes them. A failure here prints one line and changes no artefact.
"""

import contextlib
import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from remint.core.errors import RemintError, Stopped, one_line, visible
from remint.core.files import read_object, read_rows
from remint.core.log import Log, silent
from remint.core.manifest import NAME, digest, file_digest, flat
from remint.core.paths import MADE_BY, PARAMS, Paths
from remint.runner import recorded
from remint.runner.config import load_yaml

EXPERIMENT = "remint"
_LIVE = ("train", "eval_chat")
_ROOT = Path(os.environ.get("DVC_ROOT") or Path.cwd())


def store() -> str:
    """The URI of the MLflow store: $MLFLOW_TRACKING_URI, or a database file at the root of the repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_ROOT / 'mlflow.db'}"


@contextlib.contextmanager
def stage_run(stage: str, fingerprint: str, config: DictConfig) -> Iterator[Log]:
    """A Log for one run of a stage. It continues an unfinished run of the same fingerprint and repeats no step."""
    sink = _Sink(lambda: _open(stage, fingerprint, config)) if stage in _LIVE else None
    status = "FAILED"
    try:
        yield sink.log if sink else silent
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    finally:
        if sink:
            sink.close(status)


class _Sink:
    """Sends metrics to one MLflow run. After the first failure it sends nothing more, because the stage must go on."""

    def __init__(self, opened: Callable[[], tuple[Any, str, dict[str, int]]]):
        self._client: Any = None
        self._monitor: Any = None
        self._guard(lambda: self._start(*opened()))

    def _start(self, client: Any, run_id: str, logged: dict[str, int]) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._client, self._run_id, self._logged = client, run_id, logged
        # Logs CPU, memory, disk and GPU use every ten seconds, in addition to the stage's own metrics.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        self._monitor = SystemMetricsMonitor(run_id, resume_logging=bool(logged), tracking_uri=store())
        self._monitor.start()

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Send the metrics that were not sent for this step before."""
        fresh = {
            key: float(value) for key, value in metrics.items() if self._client and self._logged.get(key, -1) < step
        }
        if not fresh:
            return
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        entries = [Metric(key, value, now, step) for key, value in fresh.items()]
        self._guard(lambda: self._client.log_batch(self._run_id, metrics=entries))
        self._logged |= dict.fromkeys(fresh, step)

    def close(self, status: str) -> None:
        """End the run with one of MLflow's statuses, such as FINISHED."""
        if self._monitor:
            self._monitor.finish()
        if self._client:
            self._guard(lambda: self._client.set_terminated(self._run_id, status))

    def _guard(self, call: Callable[[], object]) -> None:
        """Run `call`. If it fails, print one warning and stop tracking."""
        try:
            call()
        except Exception as error:  # a tracking server may fail in any way and must not stop the stage
            self._client = None
            print(
                f"warning: MLflow at {_public(store())} cannot be reached, going on without it: {visible(_public(one_line(error)))}",
                flush=True,
            )


def _public(text: str) -> str:
    """The text with user and password removed from every URL in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _open(stage: str, fingerprint: str, config: DictConfig) -> tuple[Any, str, dict[str, int]]:
    """Open or continue a stage's run. Returns the client, the run id and the last logged step of each metric."""
    client, experiment = _connect()
    unfinished = client.search_runs(
        [experiment], f"tags.`remint.fingerprint` = '{fingerprint}' and attributes.status != 'FINISHED'", max_results=1
    )
    if unfinished:
        run_id = unfinished[0].info.run_id
        client.update_run(run_id, "RUNNING")
        logged = {
            key: max(m.step for m in client.get_metric_history(run_id, key)) for key in unfinished[0].data.metrics
        }
        return client, run_id, logged
    tags = {"remint.kind": "stage", "remint.stage": stage, "remint.fingerprint": fingerprint, **_circumstances()}
    run_id = client.create_run(experiment, run_name=f"{stage}-{fingerprint[:7]}", tags=tags).info.run_id
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    settings.pop("paths", None)
    _log_params(client, run_id, {str(key): value for key, value in settings.items()})
    if stage == "train":
        _log_datasets(client, run_id, Path(config.paths.dataset))
    return client, run_id, {}


def sync() -> None:
    """Log the pipeline's present state as one run, unless the store already has it. Prints the run's name.

    Raises RemintError if MLflow cannot be reached or written.
    """
    from mlflow.exceptions import MlflowException

    try:
        _sync()
    except (MlflowException, OSError) as error:
        raise RemintError(
            f"MLflow at {_public(store())}: cannot be reached or written ({_public(one_line(error))}); fix that and run `remint sync`"
        ) from error


def _sync() -> None:
    _check_recorded()
    paths = vars(Paths())
    client, experiment = _connect()
    key = digest({name: file_digest(path / NAME) for name, path in sorted(paths.items()) if (path / NAME).is_file()})
    found = client.search_runs(
        [experiment], f"tags.`remint.state` = '{key}' and attributes.status = 'FINISHED'", max_results=1
    )
    if found:
        print(f"MLflow: pipeline run {found[0].info.run_name} already has this state")
        return
    name = f"pipeline-{key[:7]}"
    tags = {"remint.kind": "pipeline", "remint.state": key, **_circumstances()}
    run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    _log_params(client, run_id, load_yaml(PARAMS))
    _log_metrics(client, run_id, paths)
    _log_datasets(client, run_id, paths["dataset"])
    _adopt_stage_runs(client, experiment, run_id, paths)
    for file in (paths["report"] / "report.html", paths["report"] / "transcript.jsonl", PARAMS, Path("dvc.lock")):
        if file.is_file():
            client.log_artifact(run_id, str(file))
    _register(client, run_id, paths["model"])
    client.set_terminated(run_id, "FINISHED")
    print(f"MLflow: pipeline run {name} logged; `make ui` shows it")


def _check_recorded() -> None:
    """Refuse a state whose artefacts were made with other settings than params.yaml has: the row would mix both."""
    faults: list[str] = []
    for stage in MADE_BY:
        try:
            recorded.check(stage)
        except RemintError as error:
            faults += error.faults
    if faults:
        raise RemintError(*faults)


def _connect() -> tuple[Any, str]:
    """A client of the store, and the id of the experiment, which is created if it does not exist."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # An unreachable server must cost seconds; the default retries take minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    mlflow.set_tracking_uri(store())
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (_ROOT / "mlruns").as_uri()
    return client, experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT, artifacts)


def _log_params(client: Any, run_id: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, str(value)[:6000]) for key, value in flat(settings)])


def _log_metrics(client: Any, run_id: str, paths: Mapping[str, Path]) -> None:
    metrics = paths["report"] / "metrics.json"
    if metrics.is_file():
        for key, value in flat(read_object(metrics)):
            client.log_metric(run_id, key, float(value))
    history = paths["checkpoint"] / "history.jsonl"
    if history.is_file():
        for row in read_rows(history):
            for key in row.keys() - {"step"}:
                client.log_metric(run_id, f"train.{key}", float(row[key]), step=int(row["step"]))


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
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
    return ""
