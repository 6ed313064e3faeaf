"""Draws the two pictures of the README from what lies in data/ and in MLflow's store: `make pictures`. Needs Chromium.

docs/report.png is the top of data/report/report.html, docs/mlflow.png MLflow's comparison of the two newest pipeline runs.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from remint.core.errors import RemintError
from remint.runner.tracking import EXPERIMENT, store


@dataclass(frozen=True)
class Shot:
    """Size of the browser's window, and the box of it that is kept (left, top, right, bottom); None keeps all. Pixels."""

    window: tuple[int, int]
    box: tuple[int, int, int, int] | None


ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
REPORT = Shot((1280, 860), None)
# The middle of MLflow 3.17's page: details, parameters and metrics of both runs. The page scrolls, so the window has to be high.
COMPARISON = Shot((1700, 2100), (195, 655, 1260, 2010))
COLOURS = 64  # keeps a picture below 100 KB


def main() -> None:
    """Draw both pictures. Raises RemintError if something that they need is missing."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    report = ROOT / "data/report/report.html"
    if browser is None:
        raise RemintError("pictures: no Chromium found; install chromium")
    if not report.is_file():
        raise RemintError(f"pictures: {report.relative_to(ROOT)}: not found; run `make repro`")
    shoot(browser, report.as_uri(), REPORT, ROOT / "docs/report.png")
    experiment, runs = newest_pipeline_runs()
    with mlflow_server() as address:
        ids = ",".join(f'"{run}"' for run in runs)
        page = f'{address}/#/compare-runs?runs=[{ids}]&experiments=["{experiment}"]'
        shoot(browser, page.replace('"', "%22"), COMPARISON, ROOT / "docs/mlflow.png")


def newest_pipeline_runs() -> tuple[str, list[str]]:
    """The experiment's id and the ids of its two newest pipeline runs."""
    import mlflow

    mlflow.set_tracking_uri(store())
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = (
        client.search_runs([experiment.experiment_id], "tags.`remint.kind` = 'pipeline'", max_results=2)
        if experiment
        else []
    )
    if len(found) < 2:
        raise RemintError(
            "pictures: MLflow must hold two pipeline runs; run `dvc exp run -S merge.into=dequantized`, then `remint sync`"
        )
    return experiment.experiment_id, [run.info.run_id for run in found]


@contextlib.contextmanager
def mlflow_server() -> Iterator[str]:
    """`remint ui` on a free port; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "remint", "ui", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            # MLflow's own lines come first; `remint ui` prints this one once the server answers.
            if not any(line.startswith("the runs: ") for line in server.stdout):
                raise RemintError("pictures: MLflow's server did not start; see its message above")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def shoot(browser: str, page: str, shot: Shot, target: Path) -> None:
    """Write what a browser shows of a page as a PNG with few colours."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "page.png"
        options = [
            f"--window-size={shot.window[0]},{shot.window[1]}",
            "--hide-scrollbars",
            "--virtual-time-budget=20000",
            f"--user-data-dir={folder}",
        ]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        subprocess.run(
            [browser, "--headless=new", *options, f"--screenshot={raw}", page],
            check=True,
            capture_output=True,
            timeout=180,
        )
        Image.open(raw).convert("RGB").crop(shot.box).quantize(COLOURS).save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    try:
        main()
    except RemintError as error:
        sys.exit(f"error: {error}")
