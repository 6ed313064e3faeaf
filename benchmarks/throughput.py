"""Measures how fast everything except training is, and whether the time is linear in the input: a table, and a plot.

    python benchmarks/throughput.py --plot docs/throughput.svg

Each part runs on growing inputs in a temporary folder, with the environment variables of a stage. The exponent e of
seconds = c · sizeᵉ is fitted to the logarithms. 1 is linear; below 1 there is also a fixed cost.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from throughput_parts import PARTS, Point

from remint.core import launch

# Sorting and CPU caches raise a linear exponent to 1.1 or 1.2. A pass over all items for each item gives 2.
_LINEAR = 1.2


def main() -> None:
    """Measure the chosen parts, print the table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (svg or png)")
    parser.add_argument(
        "--folder", type=Path, help="working folder, on the disk to measure; default: the system's temporary folder"
    )
    options = parser.parse_args()
    block = launch.environment(2, network=False)
    if launch.missing(block):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **block})
    print(f"{time.strftime('%Y-%m-%d')}, {_machine()}")
    curves: dict[str, list[Point]] = {}
    for part in options.parts:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for point in PARTS[part](Path(folder)):
                curves.setdefault(point.part, []).append(point)
                print(f"  {point.part}: {point.amount:,.0f} {point.unit} in {point.seconds:.3g} s", flush=True)
    print(table(curves))
    if options.plot:
        draw(curves, options.plot)


def exponent(points: list[Point]) -> float:
    """The slope of log seconds over log size, by least squares."""
    return float(np.polyfit(np.log([p.amount for p in points]), np.log([p.seconds for p in points]), 1)[0])


def table(curves: dict[str, list[Point]]) -> str:
    """A Markdown table with a row per size. The last row of a part has its exponent and verdict."""
    lines = ["| part | size | s | a second | exponent | |", "|---|---|---|---|---|---|"]
    for part, points in curves.items():
        slope = exponent(points)
        verdict = f"{slope:.2f}, {'linear' if slope <= _LINEAR else 'NOT LINEAR'}"
        for point in points:
            notes = "; ".join(f"{name}: {value}" for name, value in point.notes.items())
            rate = f"{point.amount / point.seconds:,.0f} {point.unit}"
            last = verdict if point is points[-1] else ""
            lines.append(
                f"| {part} | {point.amount:,.0f} {point.unit} | {point.seconds:.3g} | {rate} | {last} | {notes} |"
            )
    return "\n".join(lines)


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Plot seconds over size, one subplot per part, with logarithmic axes and a reference line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "throughput", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, fields = pyplot.subplots(2, -(-len(curves) // 2), figsize=(14, 6), squeeze=False)
    for field, (part, points) in zip(fields.flat, curves.items(), strict=False):
        sizes, seconds = [p.amount for p in points], [p.seconds for p in points]
        field.loglog(sizes, seconds, "o-")
        field.loglog(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], ":", color="grey")
        field.set_title(f"{part}: exponent {exponent(points):.2f}", fontsize=10)
        field.set_xlabel(points[0].unit)
        field.set_ylabel("s")
    for field in fields.flat[len(curves) :]:
        field.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "datasets", "gguf", "dvc"))
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    main()
