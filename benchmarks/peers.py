"""Compares our training speed with other projects, on the same weights and documents: a table, and a plot.

    python benchmarks/peers.py --plot docs/bench.svg

Every contestant is a process with its own packages, which are installed into .scratch/bench. On a CPU all contestants
are started and then take turns, step by step. So other load on the machine affects them equally. On a GPU they cannot
share the memory, so they run one after the other. Afterwards one process loads all adapters and computes their loss on
held-out documents: similar losses show that they did the same work. A contestant that cannot be installed, or fails,
gets a line with the reason.
"""

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers_job import IGNORED, Job, load, steady
from train_speed import SHAPES

from remint.core import launch

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks"
SCRATCH = ROOT / ".scratch" / "bench"
# Seconds without a message after which a contestant counts as failed. Compiling alone takes minutes.
PATIENCE = 600


@dataclass(frozen=True)
class Contestant:
    """A peer with settings. `peer` names the function in `peers_contestants.py` and the pins in `peers_<peer>.txt`.

    `more` holds additional pins that only one device needs.
    """

    peer: str
    settings: dict[str, Any] = field(default_factory=dict)
    more: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether it trains on the base weights quantized to NF4."""
        return bool(self.settings.get("nf4", True))


# Axolotl imports Triton, which only torch's CUDA builds install. Its kernels need a GPU.
_TRITON = ("triton==3.9.0",)
_NO_KERNELS = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
_AXOLOTL_OPEN = {"sample_packing": True, "gradient_checkpointing": False}
_OPEN = {"packing": True, "gradient_checkpointing": False}
# Unsloth does not pack on a CPU. Grouping documents of similar length needs the least padding.
_UNSLOTH_BEST = {"nf4": False, "checkpointing": False, "train_sampling_strategy": "group_by_length"}
_BFLOAT16 = {"dtype": "bfloat16", "bf16": True}
OURS = "remint"
CONTESTANTS: dict[str, dict[str, Contestant]] = {
    "cpu": {
        OURS: Contestant("remint"),
        "TRL, defaults": Contestant("trl"),
        # TRL converts the adapter of a quantized base to bfloat16, for which AVX2 has no instructions.
        "TRL, packed": Contestant("trl", {**_OPEN, "adapter_dtype": "float32"}),
        "TRL, packed, LoRA on float32": Contestant("trl", {**_OPEN, "nf4": False}),
        "Unsloth, defaults": Contestant("unsloth"),
        "Unsloth, LoRA on float32": Contestant("unsloth", _UNSLOTH_BEST),
        "LLaMA-Factory, defaults": Contestant("llamafactory"),
        "Axolotl, defaults": Contestant("axolotl", _NO_KERNELS, _TRITON),
        "Axolotl, packed": Contestant(
            "axolotl",
            {**_AXOLOTL_OPEN, **_NO_KERNELS, "pad_to_sequence_len": False, "attn_implementation": "sdpa"},
            _TRITON,
        ),
    },
    # On a CPU with bfloat16 instructions. Ours does not use them: its bytes must not depend on the CPU.
    "native": {
        OURS: Contestant("remint"),
        "TRL, defaults": Contestant("trl", {"bf16": True}),
        "TRL, packed": Contestant("trl", {**_OPEN, **_BFLOAT16}),
        "TRL, packed, LoRA on float32": Contestant("trl", {**_OPEN, "nf4": False}),
        "TRL, packed, LoRA on bfloat16": Contestant("trl", {**_OPEN, **_BFLOAT16, "nf4": False}),
        "Unsloth, LoRA on bfloat16": Contestant("unsloth", {**_UNSLOTH_BEST, **_BFLOAT16}),
    },
    "cuda": {
        OURS: Contestant("remint"),
        "TRL, packed": Contestant("trl", {**_OPEN, "rows": 1}),
        # Rows are cut from one long text, so attention needs no mask. But documents attend to their neighbours.
        "TRL, cut rows, Liger": Contestant("trl", {**_OPEN, "packing_strategy": "wrapped", "use_liger_kernel": True}),
        "Unsloth, packed": Contestant("unsloth", {"packing": True, "checkpointing": False}),
        # Without `neat_packing`, which would need a mask, documents attend to their neighbours here, too.
        "LLaMA-Factory, packed, Liger": Contestant(
            "llamafactory", {"packing": True, "disable_gradient_checkpointing": True, "enable_liger_kernel": True}
        ),
        "TRL, defaults": Contestant("trl"),
        "Unsloth, defaults": Contestant("unsloth"),
        "LLaMA-Factory, defaults": Contestant("llamafactory"),
        "Axolotl, defaults": Contestant("axolotl"),
        # xformers also keeps packed documents apart; FlashAttention's package is not installed.
        "Axolotl, packed, Liger": Contestant(
            "axolotl",
            {
                **_AXOLOTL_OPEN,
                "attn_implementation": "xformers",
                "plugins": ["axolotl.integrations.liger.LigerPlugin"],
                "liger_rope": True,
                "liger_rms_norm": True,
                "liger_fused_linear_cross_entropy": True,
            },
        ),
    },
}


@dataclass
class Result:
    """The result of a contestant. If it has none, `failed` is the reason."""

    name: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    peak: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)  # set when it has finished
    loss: float | None = None
    failed: str = ""

    def per_second(self, what: str) -> float:
        """Median of the steady steps' rates of `tokens` or `learned`."""
        return statistics.median(step[what] / step["seconds"] for step in steady(self.steps))

    @property
    def fill(self) -> float:
        """Share of the positions in its batches that held document tokens, not padding."""
        return sum(step["tokens"] for step in self.steps) / sum(step["places"] for step in self.steps)


def place(name: str) -> Path:
    """The folder of a contestant's log and adapter."""
    return SCRATCH / "runs" / "".join(letter if letter.isalnum() else "-" for letter in name)


class Running:
    """A contestant's process. Its messages arrive through a queue, so that waiting for one can time out."""

    def __init__(self, name: str, contestant: Contestant, job: Path, block: dict[str, str]):
        folder = place(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.log = folder / "log"
        command = [sys.executable, str(HERE / "peers_contestants.py"), contestant.peer, str(job), str(folder)]
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*command, json.dumps(contestant.settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **block},
                cwd=folder,
                start_new_session=True,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def go(self) -> None:
        """Let it run one step."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `hear` will report
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its next message. Raises ContestantError if it has ended, or sends none for PATIENCE seconds."""
        line, since = "", time.monotonic()
        while not line:
            has_ended = self._process.poll() is not None
            try:
                line = self._lines.get(timeout=0.5)
            except queue.Empty:
                # Check the process, not the pipe: worker processes that it left behind may keep the pipe open.
                if has_ended:
                    log = self.log.read_text(encoding="utf-8", errors="replace")
                    raise ContestantError(reason(log, self._process.returncode)) from None
                if time.monotonic() - since > PATIENCE:
                    raise ContestantError(f"no message for {PATIENCE} s") from None
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Kill it and all processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class ContestantError(Exception):
    """The reason why a contestant has no result."""


def _options(known_names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=f"names: {'; '.join(known_names)}. The device determines which of them can run.",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=8,
        help="number of optimizer steps; packing may need one more; default: %(default)s",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="contestants whose names start with NAME, like `trl` or 'TRL, packed'"
    )
    parser.add_argument("--shape", choices=SHAPES, help="use random weights of this shape instead of the staged base")
    parser.add_argument("--length", type=int, help="tokens per row; default: 256 on a CPU, 2048 on a GPU")
    parser.add_argument("--rows", type=int, help="rows per step; default: 1 on a CPU, 8 on a GPU")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; default: %(default)s")
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        help="seed for document order, initial LoRA weights and dropout; default: %(default)s",
    )
    parser.add_argument(
        "--native", action="store_true", help="let the other projects use more than AVX2, if the CPU has it"
    )
    parser.add_argument(
        "--plot", type=Path, help="draw the results into this file (svg or png); on a GPU, -gpu is appended to the name"
    )
    options = parser.parse_args()
    if unknown := [start for start in options.only or () if not _starting(start, known_names)]:
        parser.error(f"--only: no name starts with {unknown}; choose from {', '.join(map(repr, known_names))}")
    return options


def main() -> None:
    """Prepare the job, run the contestants, print the table, draw the plot."""
    options = _options(sorted({name for known in CONTESTANTS.values() for name in known}))
    job_path = SCRATCH / "job.json"
    SCRATCH.mkdir(parents=True, exist_ok=True)
    ours = launch.environment(options.threads, network=False) | {"PYTHONPATH": _path([ROOT / "src"])}
    _referee("prepare", job_path, vars(options), ours)
    job = load(job_path)
    options.native |= job.device == "cuda"
    here = CONTESTANTS["native" if options.native and job.device == "cpu" else job.device]
    if absent := [start for start in options.only or () if not _starting(start, here)]:
        sys.exit(f"peers.py: error: --only: {absent} are for another device; choose from {', '.join(map(repr, here))}")
    wanted = [name for start in options.only or [""] for name in _starting(start, here)]
    chosen = {name: contestant for name, contestant in here.items() if name in wanted}
    results = {name: Result(name) for name in chosen}
    # On a GPU they run one at a time: they cannot share its memory.
    heats = [list(chosen)] if job.device == "cpu" else [[name] for name in chosen]
    try:
        for heat in heats:
            run([results[name] for name in heat], chosen, job_path, options)
    except KeyboardInterrupt:
        for result in results.values():
            if not result.versions and not result.failed:
                result.failed = "the run was interrupted before it finished"
    folders = {name: [str(place(name)), chosen[name].is_quantized] for name, r in results.items() if not r.failed}
    judged = json.loads(_referee("judge", job_path, folders, ours).splitlines()[-1])
    for name, loss in judged["losses"].items():
        results[name].loss = loss
    for name, why in judged["failed"].items():
        results[name].failed = why
    text = report(list(results.values()), judged, job, options)
    print(text)
    (SCRATCH / "table.md").write_text(text + "\n", encoding="utf-8")
    if options.plot:
        plot = options.plot.with_stem(f"{options.plot.stem}-gpu") if job.device == "cuda" else options.plot
        draw(list(results.values()), judged, plot)


def _starting(start: str, names: Iterable[str]) -> list[str]:
    """The names that start with `start`, ignoring case."""
    return [name for name in names if name.lower().startswith(start.lower())]


def run(results: Sequence[Result], chosen: dict[str, Contestant], job: Path, options: argparse.Namespace) -> None:
    """Start the contestants of `results` and let them take turns until all have ended. Fills in their results."""
    with contextlib.ExitStack() as ending:
        running: dict[str, Running] = {}
        for result in results:
            print(f"  {result.name}: starting", flush=True)
            contestant = chosen[result.name]
            try:
                block = environment(contestant, options)
                running[result.name] = Running(result.name, contestant, job, block)
                ending.callback(running[result.name].close)
                running[result.name].hear()
            except ContestantError as failure:
                result.failed = str(failure)
        turn = 0
        while active := [result for result in results if not result.failed and not result.versions]:
            turn += 1
            if rates := [*filter(None, (take_turn(running[result.name], result) for result in active))]:
                print(f"  step {turn}, tokens/s: {', '.join(rates)}", flush=True)


def take_turn(process: Running, result: Result) -> str:
    """Run one step of one contestant, or receive its end. Returns its name and speed, or an empty text."""
    try:
        process.go()
        message = process.hear()
    except ContestantError as failure:
        result.failed = str(failure)
        return ""
    if message["kind"] == "done":
        result.peak, result.versions = message["peak"], message["versions"]
        return ""
    result.steps.append(message)
    return f"{result.name} {message['tokens'] / message['seconds']:.0f}"


def environment(contestant: Contestant, options: argparse.Namespace) -> dict[str, str]:
    """Install a contestant's packages and return its environment variables. Raises ContestantError if that fails."""
    block = launch.environment(options.threads, network=False)
    if contestant.peer == "remint":
        return block | {"PYTHONPATH": _path([ROOT / "src"])}
    if options.native:
        # The variables that make results exact are only for ours. The others make it fast and are for all.
        block = {name: value for name, value in block.items() if name not in launch.NUMERIC}
    folder = install(contestant)
    # Its packages may be linked with another CUDA runtime than torch's, as xformers is.
    libraries = _path(sorted(folder.glob("nvidia/*/lib")), "LD_LIBRARY_PATH")
    return block | {"PYTHONPATH": _path([folder]), "LD_LIBRARY_PATH": libraries, "DISABLE_VERSION_CHECK": "1"}


def install(contestant: Contestant) -> Path:
    """Install the peer's pinned packages and return their folder. All other packages are ours.

    Raises ContestantError if pip fails.
    """
    pins, folder = HERE / f"peers_{contestant.peer}.txt", SCRATCH / contestant.peer
    done = folder / ".complete"
    wanted = pins.read_text(encoding="utf-8") + "".join(f"{pin}\n" for pin in contestant.more)
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",
        "--no-deps",
    ]
    found = subprocess.run(
        [*pip, "--target", str(folder), "--requirement", str(pins), *contestant.more],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise ContestantError(f"cannot be installed: {reason(found.stderr, found.returncode)}")
    done.write_text(wanted, encoding="utf-8")
    return folder


def reason(log: str, status: int) -> str:
    """The line of a log that shows why its process ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [
        line for line in lines if line.split(":")[0].split(".")[-1].endswith(("Error", "ERROR", "Exit", "Exception"))
    ]
    return ([f"ended with status {status}", *lines[-1:], *errors[-1:]][-1])[:160]


def _path(folders: Iterable[Path], name: str = "PYTHONPATH") -> str:
    """The value of the variable `name` with the folders put before its present value."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(name)])])


def _referee(task: str, job: Path, given: Any, block: dict[str, str]) -> str:
    """Run `peers_referee.py` in a process with our packages and return its output. It reports its own errors."""
    command = [sys.executable, str(HERE / "peers_referee.py"), task, str(job), json.dumps(given, default=str)]
    done = subprocess.run(
        command, env={**os.environ, **block}, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def report(results: Sequence[Result], judged: dict[str, Any], job: Job, options: argparse.Namespace) -> str:
    """The table in Markdown. The machine and the job are above it, the package versions below."""
    trained = sum(len(ids) for ids, _ in job.documents)
    learned = sum(label != IGNORED for _, labels in job.documents for label in labels)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {judged['device']}, {options.threads} threads; {judged['model']}; {len(job.documents)} "
        f"documents with {trained:,} tokens, {learned / trained:.0%} of them supervised; steps of {job.rows} × {job.length} tokens, "
        f"rank {job.rank}, dropout {job.dropout}, {job.precision}; a matrix product reaches {judged['roof'] / 1e12:.3g} TFLOP/s; "
        f"untrained loss {judged['untrained']:.4f}",
        "",
        "| | tokens/s | ours is | supervised/s | TFLOP/s | of the matrix product | GiB at most | filled | steps | loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    speed = {result.name: result.per_second("tokens") for result in results if not result.failed}
    for result in results:
        if result.failed:
            lines.append(f"| {result.name} | no result: {result.failed} |||||||||")
            continue
        tokens, supervised = speed[result.name], result.per_second("learned")
        flops = 4 * (judged["linear"] * tokens + judged["head"] * supervised)
        ratio = f"{speed[OURS] / tokens:.2f} ×" if OURS in speed else ""
        lines.append(
            f"| {result.name} | {tokens:,.0f} | {ratio} | {supervised:,.0f} | {flops / 1e12:.3g} | {flops / judged['roof']:.0%} | "
            f"{result.peak / 2**30:.1f} | {result.fill:.0%} | {len(result.steps)} | {result.loss:.4f} |"
        )
    lines.append("")
    for result in results:
        if result.versions:
            lines.append(f"{result.name}: " + ", ".join(f"{name} {value}" for name, value in result.versions.items()))
    return "\n".join(lines)


def draw(results: Sequence[Result], judged: dict[str, Any], path: Path) -> None:
    """Draw bars for tokens per second, memory and loss. Contestants without a result are left out."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "bench", "svg.fonttype": "none"}
    from matplotlib import pyplot

    shown = [result for result in results if not result.failed][::-1]
    names = [result.name for result in shown]
    colours = ["tab:blue" if name == OURS else "tab:grey" for name in names]
    figure, fields = pyplot.subplots(1, 3, figsize=(14, 0.8 + 0.45 * len(names)), sharey=True)
    parts = [
        ("tokens/s", [result.per_second("tokens") for result in shown], "{:,.0f}"),
        ("GiB at most", [result.peak / 2**30 for result in shown], "{:.1f}"),
        (f"held-out loss afterwards (untrained: {judged['untrained']:.2f})", [r.loss for r in shown], "{:.3f}"),
    ]
    for axes, (title, values, style) in zip(fields, parts, strict=True):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [style.format(value) for value in values], padding=3)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.2)
        axes.locator_params(axis="x", nbins=5)
    figure.suptitle(judged["device"], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
