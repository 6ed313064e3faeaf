"""Trains with 1, 2, 4 and 8 GPUs, by the stage's own command: the same bytes, and how many times the speed.

    python benchmarks/gpus.py --shapes internlm2-1.8b llama3-8b --out results
    python benchmarks/gpus.py --table results

Weights and records are random, in the shapes of real models. A step has the same micro-batches for every number of
processes. The parts:

- `speed`: one run of `train` for each number of processes: speed of the steps, memory, start, sha256 of the checkpoint.
- `exchange`: what the processes exchange in a step, timed alone in as many processes (`gpus_exchange.py`).
- `kill`: one process of the largest run is killed, and the same command continues it.
- `nodes`: the largest run as two nodes of torchrun on loopback, with sockets between the nodes.
- `computed`: the speed of two machines over Ethernet, from the measured step and exchange; see `over_network`.

Each run adds a line of JSON to a file in the folder of `--out`. So parts can run as separate commands, and `--table`
prints all of them.
"""

import argparse
import datetime
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpus_job
from gpus_job import LENGTHS, ROOT, ROWS, Job, Running

Row = dict[str, Any]
PLACE = ROOT / ".scratch" / "bench" / "gpus"
# The first steps compile kernels and fill caches. The last step may have fewer tokens. Neither is counted.
UNCOUNTED = 3
SAVE_STEPS = 3
NEVER = 1_000_000
NETWORKS = (400, 100)  # Gb/s of the one network adapter of a machine
# Share of the nominal rate that a transfer reaches: an assumption.
REACHED = 0.9
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "triton")


@dataclass
class Bench:
    """What the parts need: the job, where it runs, and where its rows go."""

    job: Job
    place: Path
    processes: list[int]
    target: Path
    end: float
    sockets: bool
    failed: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the time limit; 0 after it."""
        return max(0.0, self.end - time.monotonic())

    def log(self, name: str) -> Path:
        """The log of a run."""
        return self.place / f"{name}.log"

    def add(self, part: str, processes: int, **facts: Any) -> None:
        """Save a row and print it."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
        row = {"part": part, "shape": self.job.shape, "processes": processes, "date": now, **facts}
        shown = ", ".join(f"{name} {value:,.4g}" for name, value in facts.items() if isinstance(value, int | float))
        print(f"{part} {self.job.shape} {processes}: {shown}, sha256 {facts.get('sha256', '-')[:16]}", flush=True)
        row |= {"key": self.job.key, "job": asdict(self.job), "machine": machine()}
        with self.target.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def ended(self, name: str, running: Running, status: int) -> bool:
        """Whether the run ended well. If not, print why."""
        if status:
            why = "the time limit" if not self.left else f"exit status {status}"
            self.failed.append(f"{name}: {why}")
            print(f"{name} failed ({why}):\n{running.tail()[-3000:]}", flush=True)
        return not status


@functools.cache
def machine() -> Row:
    """Device and versions."""
    found: Row = {"device": platform.machine(), "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if gpus_job.gpus():
        import torch

        # Not asked of torch: a process that uses a GPU takes some of its memory.
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        name, _, driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition(",")
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"device": name, "driver": driver.split()[0], "cuda": torch.version.cuda, "nccl": nccl}
        found["gpus"] = gpus_job.gpus()
    return found


def speed(bench: Bench) -> None:
    """Run the stage once for each number of processes."""
    for processes in bench.processes:
        name = f"speed-{bench.job.shape}-{processes}"
        if not bench.left:
            bench.failed.append(f"{name}: the time limit")
            return
        gpus_job.clean(bench.place)
        with gpus_job.peak_memory() as peaks:
            running = Running(gpus_job.stage(bench.job, processes, NEVER), bench.place, bench.log(name))
            status = running.wait(bench.left)
        seconds = time.monotonic() - running.started
        if bench.ended(name, running, status):
            made = gpus_job.result(bench.place)
            bench.add(
                "speed",
                processes,
                **rates(bench.job, made, running.speeds()),
                ready_s=running.seconds_until("evaluating the base"),
                stage_s=seconds,
                peak_gib=peaks[:processes],
                **made,
            )


def rates(job: Job, made: Row, speeds: dict[int, float]) -> Row:
    """Tokens per second over the counted steps, and seconds of a step of full size."""
    counted = [speed for step, speed in sorted(speeds.items()) if UNCOUNTED < step < made["steps"]]
    if not counted:
        raise SystemExit(f"gpus: {made['steps']} steps are too few; take at least {UNCOUNTED + 2} with --steps")
    mean = len(counted) / sum(1 / speed for speed in counted)
    return {
        "tokens_per_s": mean,
        "slowest": min(counted),
        "fastest": max(counted),
        "counted": len(counted),
        "step_s": made["tokens_a_row"] * job.rows * job.micro_batches / mean,
    }


def exchange(bench: Bench) -> None:
    """Time the exchange alone, for each number of processes above 1."""
    for processes in (number for number in bench.processes if number > 1):
        name, found = f"exchange-{bench.job.shape}-{processes}", bench.place / "exchange.json"
        found.unlink(missing_ok=True)
        program = [str(gpus_job.HERE / "gpus_exchange.py"), bench.job.shape, found.name]
        command = [*gpus_job.launcher(processes, gpus_job.free_port()), *program]
        running = Running(command, bench.place, bench.log(name), **gpus_job.on_loopback())
        if bench.ended(name, running, running.wait(bench.left)):
            bench.add("exchange", processes, **json.loads(found.read_text(encoding="utf-8")))


def kill(bench: Bench) -> None:
    """Kill one process of the largest run after a checkpoint, then continue the run by the same command."""
    import psutil

    processes = max(bench.processes)
    name, command = f"kill-{bench.job.shape}-{processes}", gpus_job.stage(bench.job, processes, SAVE_STEPS)
    gpus_job.clean(bench.place)
    running = Running(command, bench.place, bench.log(name))
    # Two steps after the first checkpoint, so that steps are lost.
    if not running.wait_for(lambda: max(running.speeds(), default=0) >= SAVE_STEPS + 2, bench.left):
        bench.ended(name, running, running.wait(0) or 1)
        return
    workers = sorted(psutil.Process(running.process.pid).children(), key=lambda worker: worker.create_time())
    (workers[processes - 1] if processes > 1 else running.process).kill()
    killed = time.monotonic()
    status = running.wait(bench.left)
    ending_s, reached = time.monotonic() - killed, max(running.speeds())
    if status == 0:
        bench.failed.append(f"{name}: it ended before its process was killed; take more --steps")
        return
    again = Running(command, bench.place, bench.log(name))
    if bench.ended(name, again, again.wait(bench.left)):
        bench.add(
            "kill",
            processes,
            status=status,
            save_steps=SAVE_STEPS,
            reached=reached,
            continued=again.continued(),
            lost=reached - again.continued(),
            ending_s=ending_s,
            again_s=time.monotonic() - again.started,
            **gpus_job.result(bench.place),
        )


def nodes(bench: Bench) -> None:
    """Run two nodes on this machine, each with half of the processes and of the GPUs."""
    processes = max(bench.processes)
    if processes % 2:
        print("nodes: needs an even number of processes", flush=True)
        return
    name, port = f"nodes-{bench.job.shape}-{processes}", gpus_job.free_port()
    gpus_job.clean(bench.place)
    running = [
        Running(
            [*gpus_job.launcher(processes // 2, port, 2, number), *gpus_job.stage(bench.job, processes, NEVER)[1:]],
            bench.place,
            bench.log(f"{name}-{number}"),
            **gpus_job.as_node(number, processes, bench.sockets),
        )
        for number in range(2)
    ]
    statuses = [node.wait(bench.left if not number else 60) for number, node in enumerate(running)]
    for number, (node, status) in enumerate(zip(running, statuses, strict=True)):
        bench.ended(f"{name}-{number}", node, status)
    if not any(statuses):
        made = gpus_job.result(bench.place)
        found = rates(bench.job, made, running[0].speeds())
        bench.add("nodes", processes, only_sockets=bench.sockets, **found, **made)


PARTS: dict[str, Callable[[Bench], None]] = {"speed": speed, "exchange": exchange, "kill": kill, "nodes": nodes}


def over_network(measured: Row, exchanged: Row, gbits: float) -> Row:
    """The speed of two machines like the measured one, computed, not measured.

    Each machine has one network adapter of `gbits` Gb/s, of which transfers reach the share REACHED. N processes were
    measured on one machine, with R rounds of micro-batches in a step of T seconds, and B bytes of gradients. With 2 N
    processes and twice the micro-batches in a step:

        seconds of a step = T + (R · N · B / 2 + B · (2 N - 1) / (2 N)) / bytes per second of the adapter

    In each round, each of the N processes of a machine sends half of its gradients to the other machine. At the end,
    a ring carries all sums but one part through the adapter. The exchange inside a machine is counted as measured, and
    nothing overlaps.
    """
    size, number = exchanged["bytes"], measured["processes"]
    rounds = measured["job"]["micro_batches"] / number
    sent = rounds * number * size / 2 + size * (2 * number - 1) / (2 * number)
    seconds = measured["step_s"] + sent / (REACHED * gbits * 1e9 / 8)
    tokens = 2 * measured["step_s"] * measured["tokens_per_s"]
    return {"tokens_per_s": tokens / seconds, "step_s": seconds, "sent": sent, "processes": 2 * number}


def share(measured: Row, exchanged: Row | None) -> float | None:
    """The exchange's share of a step: its rounds and its end, over the seconds of the step."""
    if exchanged is None:
        return None
    rounds = measured["job"]["micro_batches"] / measured["processes"]
    return float((rounds * exchanged["add_s"] + exchanged["finish_s"]) / measured["step_s"])


def table(rows: Sequence[Row]) -> str:
    """All results as Markdown."""
    parts = []
    for mine in groups(rows):
        job, device = mine[-1]["job"], mine[-1]["machine"]
        known = ", ".join(f"{name} {value}" for name, value in device.items() if value and name != "gpus")
        parts.append(
            f"**{job['shape']}**: steps of {job['micro_batches']} micro-batches of {job['rows']} × {job['length']} tokens; "
            f"{mine[0]['date']} UTC; {device.get('gpus', 0)} GPUs, {known}\n"
        )
        parts += [*speed_table(mine), *other_lines(mine), *computed_table(mine)]
    return "\n".join(parts)


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that may be compared: of the same job, device and version of torch."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["key"], row["machine"]["device"], row["machine"]["torch"]), []).append(row)
    return list(found.values())


def last(rows: Iterable[Row], part: str) -> dict[int, Row]:
    """The newest row of a part for each number of processes."""
    return {row["processes"]: row for row in rows if row["part"] == part}


def speed_table(rows: Sequence[Row]) -> list[str]:
    """The measured runs of one job."""
    runs, exchanges = last(rows, "speed"), last(rows, "exchange")
    lines = [
        "| processes | tokens/s | × one | tokens/s a process | a step, s | exchange's share | peak GiB a GPU | ready after, s "
        "| whole stage, s | sha256 of the checkpoint |",
        "|" + "---|" * 10,
    ]
    for number, row in sorted(runs.items()):
        part = share(row, exchanges.get(number))
        cells = [
            str(number),
            f"{row['tokens_per_s']:,.0f}",
            times(row, runs),
            f"{row['tokens_per_s'] / number:,.0f}",
            f"{row['step_s']:.3f}",
            "" if part is None else f"{part:.1%}",
            f"{max(row['peak_gib']):.1f}" if row["peak_gib"] else "",
            f"{row['ready_s']:.1f}" if row["ready_s"] is not None else "",
            f"{row['stage_s']:.1f}",
            f"`{row['sha256'][:16]}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""] if runs else []


def times(row: Row, runs: dict[int, Row]) -> str:
    """How many times the speed of one process, if that was measured."""
    return f"{row['tokens_per_s'] / runs[1]['tokens_per_s']:.2f}" if 1 in runs else ""


def other_lines(rows: Sequence[Row]) -> list[str]:
    """The exchange alone, the killed run, the two nodes, and whether all checksums agree."""
    lines = []
    for number, row in sorted(last(rows, "exchange").items()):
        rate = row["bytes"] * (number - 1) / number / row["all_to_all_s"] / 1e9
        lines.append(
            f"- {number} processes exchange {row['bytes'] / 1e6:,.0f} MB: {row['add_s'] * 1e3:.2f} ms a round (all-to-all alone "
            f"{row['all_to_all_s'] * 1e3:.2f} ms, each sends {rate:.1f} GB/s), {row['finish_s'] * 1e3:.2f} ms at the end of "
            f"a step (all-gather alone {row['all_gather_s'] * 1e3:.2f} ms). A matrix product: {row['roof'] / 1e12:,.1f} TFLOP/s."
        )
    for number, row in last(rows, "kill").items():
        lines.append(
            f"- Process {number} of {number} was killed after step {row['reached']} (a checkpoint every "
            f"{row['save_steps']}). The same command continued after step {row['continued']}: {row['lost']} lost. The others "
            f"had ended {row['ending_s']:.1f} s after the kill; the rest took {row['again_s']:.1f} s; `{row['sha256'][:16]}`."
        )
    for number, row in last(rows, "nodes").items():
        lines.append(
            f"- {number} processes as two nodes on loopback, sockets {'everywhere' if row['only_sockets'] else 'between them'}: "
            f"{row['tokens_per_s']:,.0f} tokens/s, `{row['sha256'][:16]}`."
        )
    sums = checksums(rows)
    count = sum(map(len, sums.values()))
    if len(sums) == 1 and count > 1:
        lines.append(f"- All {count} checkpoints have the same bytes (sha256 `{next(iter(sums))}`).")
    elif len(sums) > 1:
        differing = "; ".join(f"`{found[:16]}` ({', '.join(runs)})" for found, runs in sums.items())
        lines.append(f"- **The checkpoints differ**: {differing}.")
    return [*lines, ""] if lines else []


def checksums(rows: Iterable[Row]) -> dict[str, list[str]]:
    """The runs that left a checkpoint, by its sha256."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "sha256" in row:
            found.setdefault(row["sha256"], []).append(f"{row['part']} {row['processes']}")
    return found


def computed_table(rows: Sequence[Row]) -> list[str]:
    """Two machines over a network, from the largest measured run."""
    runs, exchanges = last(rows, "speed"), last(rows, "exchange")
    number = max(runs.keys() & exchanges.keys(), default=0)
    if not number:
        return []
    lines = [
        f"Computed, not measured: two machines of {number} processes, one network adapter each, {REACHED:.0%} of its rate",
        "",
        "| network | processes | tokens/s | × one | sent by a machine in a step, MB | a step, s |",
        "|" + "---|" * 6,
    ]
    for gbits in NETWORKS:
        row = over_network(runs[number], exchanges[number], gbits)
        lines.append(
            f"| {gbits} Gb/s | {row['processes']} | {row['tokens_per_s']:,.0f} | {times(row, runs)} | {row['sent'] / 1e6:,.0f} "
            f"| {row['step_s']:.3f} |"
        )
    return [*lines, ""]


def read(folder: Path) -> list[Row]:
    """All rows in a folder and the folders in it, oldest first."""
    paths = sorted(folder.rglob("*.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row["date"])


def main() -> int:
    """Run the chosen parts, print the table. Returns 1 if a run failed or checkpoints differ."""
    options = arguments()
    if options.table:
        print(table(read(options.table)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds_limit
    target = options.out / f"rows-{time.time_ns() // 10**6}.jsonl"
    failed = []
    for shape in options.shapes:
        job = Job(
            shape,
            options.steps,
            options.micro_batches,
            options.rows or ROWS[shape],
            options.length or LENGTHS.get(shape, 2048),
        )
        bench = Bench(job, options.place / shape, options.processes, target, end, options.only_sockets, failed)
        print(f"{shape}: dataset and base made in {gpus_job.prepare(bench.place, job):.1f} s", flush=True)
        for part in options.parts:
            if part in PARTS:
                PARTS[part](bench)
    rows = read(options.out)
    print(f"\n{table(rows)}")
    differ = any(len(checksums(mine)) > 1 for mine in groups(rows))
    for line in failed:
        print(f"failed: {line}")
    return int(bool(failed or differ))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=ROWS, default=["internlm2-1.8b", "llama3-8b"])
    parser.add_argument("--processes", nargs="+", type=int, help="default: 1, 2, 4 and 8, as far as there are GPUs")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "computed"], default=[*PARTS, "computed"])
    parser.add_argument("--steps", type=int, default=10, help=f"optimizer steps; the first {UNCOUNTED} are not counted")
    parser.add_argument("--micro-batches", type=int, default=16, help="of a step, shared by the processes")
    parser.add_argument("--rows", type=int, help="of a micro-batch; default: 16 and 4, for a card of 80 GB")
    parser.add_argument("--length", type=int, help="tokens of a row; default: 2048")
    parser.add_argument("--only-sockets", action="store_true", help="nodes: NCCL uses sockets inside a node, too")
    parser.add_argument("--seconds-limit", type=float, default=7200.0, help="then the present run is stopped")
    parser.add_argument("--place", type=Path, default=PLACE, help="scratch folder; 16 GB for the base of llama3-8b")
    parser.add_argument("--out", type=Path, default=PLACE / "results", help="folder of the results")
    parser.add_argument("--table", type=Path, metavar="DIR", help="only print the table of the results in this folder")
    options = parser.parse_args()
    if options.table:
        return options
    most = gpus_job.gpus()
    options.processes = options.processes or [number for number in (1, 2, 4, 8) if number <= (most or 2)]
    if most and max(options.processes) > most:
        parser.error(f"--processes: must be at most {most}, the number of GPUs, got {max(options.processes)}")
    if any(number < 1 or options.micro_batches % number for number in options.processes):
        parser.error(f"--micro-batches: must be a multiple of each number of processes, got {options.micro_batches}")
    if options.steps < UNCOUNTED + 2:
        parser.error(f"--steps: must be at least {UNCOUNTED + 2}, got {options.steps}")
    return options


if __name__ == "__main__":
    sys.exit(main())
