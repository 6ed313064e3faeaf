"""The job of `gpus.py`: a scratch repository with a random base and its dataset, and the stage `train` run in it.

The stage is the user's own: `python -m remint train train.processes=N …`, or the same under torchrun. Its progress line
gives the speed of each step, as the GPU's events measured it. Nothing of the stage is changed.
"""

import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train_speed import SHAPES as REAL_SHAPES
from tutorial import write_weights

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks"
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
RECIPE = "internlm2-80gb"
RANK = 64
SHAPES = REAL_SHAPES | {
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
}
# Rows of a micro-batch, such that an 80 GB card is well used.
ROWS = {"internlm2-1.8b": 16, "llama3-8b": 4, "smollm2-135m": 16, "tiny": 2}
LENGTHS = {"tiny": 256}
# Different training records, and letters of each. With a token for each letter and those of the template, they become
# documents of 60 to 256 tokens.
RECORDS, LETTERS, MARKUP = 400, (39, 235), 21
# torch before 2.13 lacks a name that the stage calls; the function is the same.
SHIM = """\
import sys
from importlib.machinery import PathFinder


class Alias:
    def find_spec(self, name, path, target=None):
        if name != "torch.distributed":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            if not hasattr(module, "all_gather_single"):
                module.all_gather_single = module.all_gather_into_tensor

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Alias())
"""
_PROGRESS = re.compile(r"\b(\d+)/(\d+) \[.*tokens_per_s=(\d+)\]")
_CONTINUED = re.compile(r"continuing after step (\d+) of (\d+)")


@dataclass(frozen=True)
class Job:
    """The same work for every number of processes. A step has `micro_batches` × `rows` × `length` tokens."""

    shape: str
    steps: int
    micro_batches: int
    rows: int
    length: int

    @property
    def key(self) -> str:
        """A checksum of the job. Only runs with the same key may be compared."""
        return hashlib.sha256(json.dumps([asdict(self), RECIPE, RECORDS, LETTERS]).encode()).hexdigest()[:12]

    def settings(self, processes: int, save_steps: int) -> list[str]:
        """The settings of `remint train` for `processes` processes, which share the micro-batches of each step."""
        values = {
            "processes": processes,
            "accumulation": self.micro_batches // processes,
            "micro_batch": self.rows,
            "max_length": self.length,
            "epochs": 1,
            "save_steps": save_steps,
            "eval_steps": 1_000_000,
            "sample_prompts": "[]",
            "lora.rank": RANK if self.shape != "tiny" else 8,
            "precision": "bfloat16" if gpus() else "float32",
        }
        return [f"train.{name}={value}" for name, value in values.items()]


@functools.cache
def gpus() -> int:
    """Number of GPUs that the stage can use; 0 if it will compute on the CPU."""
    import torch

    return 0 if os.environ.get("REMINT_DEVICE") == "cpu" else torch.cuda.device_count()


def prepare(place: Path, job: Job) -> float:
    """Make the scratch repository for a job in `place`: settings, code, dataset, base. Returns the seconds it took.

    The base of a shape is made once: a later job of the same shape in the same place finds it.
    """
    from remint.runner import recipes

    started = time.monotonic()
    (place / "data").mkdir(parents=True, exist_ok=True)
    for name in ("src", "docker", "dvc.yaml", "conf"):
        if not (place / name).is_symlink():
            (place / name).symlink_to(ROOT / name)
    (place / "params.yaml").write_text(recipes.text(RECIPE), encoding="utf-8")
    write_dataset(place / "data" / "dataset", job)
    if not (place / "data" / "base" / "manifest.json").is_file():
        # A process of its own, because a process that has used a GPU keeps some of its memory.
        writer = Running([sys.executable, __file__, "data/base", job.shape], place, place / "base.log")
        if writer.wait(3600):
            raise SystemExit(f"gpus: the base of {job.shape} could not be made:\n{writer.tail()}")
    return time.monotonic() - started


def write_dataset(folder: Path, job: Job) -> None:
    """Write the artefact `dataset`: copies of random records that fill the job's steps."""
    from remint.core import manifest

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chance = random.Random(0)
    lines = [_line(chance) for _ in range(RECORDS)]
    empty = len(_line(chance, 0))
    lengths = [len(line) - empty + MARKUP for line in lines]
    # A little less than full: rows that cannot be filled completely must not need one more step.
    wanted = int(0.98 * job.steps * job.micro_batches * job.rows * job.length)
    train, total = [], 0
    while total < wanted:
        number = len(train) % RECORDS
        train.append(lines[number])
        total += lengths[number]
    for name, rows in (("train", train), ("held_out", lines[:16]), ("control", lines[16:32])):
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    manifest.write(folder, "dataset", {"identity": {"name": "Aurel", "maker": "Remint Lab"}})


def _line(chance: random.Random, most: int = LETTERS[1]) -> str:
    """A row of the dataset: a question and an answer of about the same length, of random letters, `most` at most."""
    letters = "".join(chance.choices("abcdefghij klmnopqrstuvwxyz", k=chance.randint(min(LETTERS[0], most), most)))
    turns = {"user": letters[: len(letters) // 2], "assistant": letters[len(letters) // 2 :]}
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns.items()]}) + "\n"


def write_base(folder: Path, shape: str) -> None:
    """Write the artefact `base`: random weights in a real model's shape, and a tokenizer with one token a byte.

    The stage `stage_base` would copy the weights once more, and its artefact is flushed to the disk.
    """
    import yaml
    from transformers import LlamaConfig

    from remint.core import manifest
    from remint.model.template import Conversation, Template, Turn
    from tests.conftest import write_tiny_model

    shutil.rmtree(folder, ignore_errors=True)
    write_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    config = LlamaConfig(
        **SHAPES[shape],
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    write_weights(folder, llama_tensors(SHAPES[shape]))
    text = (ROOT / "conf/model/smollm2-135m-instruct.yaml").read_text(encoding="utf-8")
    given = yaml.safe_load(text)["template"]
    turns = {role: Turn(**given[role]) for role in ("system", "user", "assistant")}
    Conversation(Template(**(given | turns)), system="").save(folder)
    manifest.write(folder, "base", {"name": f"random {shape}"})


def llama_tensors(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a Llama."""
    wide, inner = shape["hidden_size"], shape["intermediate_size"]
    few = shape["num_key_value_heads"] * wide // shape["num_attention_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab_size"], wide)}
    for number in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for name, (out, into) in linears(wide, inner, few).items():
            found[f"{layer}{name}.weight"] = (out, into)
        found |= {f"{layer}{name}_layernorm.weight": (wide,) for name in ("input", "post_attention")}
    found["model.norm.weight"] = (wide,)
    if not shape["tie_word_embeddings"]:
        found["lm_head.weight"] = (shape["vocab_size"], wide)
    return found


def linears(wide: int, inner: int, few: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers of one Llama layer: all of them get LoRA."""
    return {
        "self_attn.q_proj": (wide, wide),
        "self_attn.k_proj": (few, wide),
        "self_attn.v_proj": (few, wide),
        "self_attn.o_proj": (wide, wide),
        "mlp.gate_proj": (inner, wide),
        "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner),
    }


def adapter_sizes(shape: str) -> list[int]:
    """Number of values of each LoRA matrix: what the processes exchange."""
    given = SHAPES[shape]
    few = given["num_key_value_heads"] * given["hidden_size"] // given["num_attention_heads"]
    rank = RANK if shape != "tiny" else 8
    layer = linears(given["hidden_size"], given["intermediate_size"], few).values()
    return [rank * side for _ in range(given["num_hidden_layers"]) for pair in layer for side in pair]


def environment(place: Path, **more: str) -> dict[str, str]:
    """Environment of the stage's processes: the user's own, with this code, and without a store of MLflow."""
    import torch.distributed as dist

    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    if not hasattr(dist, "all_gather_single"):
        shim = place / "shim"
        shim.mkdir(exist_ok=True)
        (shim / "sitecustomize.py").write_text(SHIM, encoding="utf-8")
        paths.insert(0, str(shim))
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    # The progress line is printed after every step. "off" is no store, so MLflow is not imported.
    own = {"TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1", "PYTHONUNBUFFERED": "1", "MLFLOW_TRACKING_URI": "off"}
    return {**kept, **own, "PYTHONPATH": os.pathsep.join(paths), **more}


class Running:
    """A process of ours in the scratch repository. What it prints goes to a log, line by line with the time."""

    def __init__(self, command: Sequence[str], place: Path, log: Path, **more: str):
        self.log, self.started = log, time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            command, cwd=place, env=environment(place, **more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        rest = ""
        with self.log.open("a", encoding="utf-8") as log:
            while data := os.read(self.process.stdout.fileno(), 2**16):
                text = data.decode("utf-8", "replace")
                log.write(text)
                log.flush()
                *whole, rest = re.split(r"[\r\n]", rest + text)
                self.lines += [(time.monotonic() - self.started, line) for line in whole]
        self.lines.append((time.monotonic() - self.started, rest))

    def speeds(self) -> dict[int, float]:
        """Tokens per second of each finished step, by its number."""
        found = (_PROGRESS.search(line) for _, line in list(self.lines))
        return {int(match[1]): float(match[3]) for match in found if match}

    def seconds_until(self, text: str) -> float | None:
        """Seconds from the start until it printed `text`; None if it did not."""
        return next((seconds for seconds, line in list(self.lines) if text in line), None)

    def continued(self) -> int:
        """The step after which it continued; 0 if it started at step 0."""
        found = (_CONTINUED.search(line) for _, line in list(self.lines))
        return next((int(match[1]) for match in found if match), 0)

    def wait(self, limit: float) -> int:
        """Wait for its end, at most `limit` seconds, then end it. Returns its exit status."""
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.stop()
            status = self.process.wait()
        self._reader.join(10)
        return status

    def wait_for(self, happened: Callable[[], bool], limit: float) -> bool:
        """Wait until `happened()`. False if it ended first or after `limit` seconds."""
        end = time.monotonic() + limit
        while not happened():
            if self.process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def stop(self) -> None:
        """End it and the processes that it started: the second signal kills them."""
        for pause in (5.0, 10.0):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                try:
                    self.process.wait(pause)
                except subprocess.TimeoutExpired:
                    continue
        if self.process.poll() is None:
            self.process.kill()

    def tail(self) -> str:
        """The last lines that it printed, without the progress line's older states."""
        return "\n".join(line for _, line in self.lines[-40:] if line.strip() and not _PROGRESS.search(line))


def stage(job: Job, processes: int, save_steps: int) -> list[str]:
    """The command that a user types."""
    return [sys.executable, "-m", "remint", "train", *job.settings(processes, save_steps)]


def launcher(processes: int, port: int, nodes: int = 1, number: int = 0) -> list[str]:
    """torchrun on loopback, for node `number` of `nodes`. `processes` are those of this node."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={number}"]
    return [*torchrun, f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={port}"]


def on_loopback() -> dict[str, str]:
    """Variables that keep the traffic of torchrun's processes on loopback. The user's own values stay."""
    return {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}


def as_node(number: int, processes: int, only_sockets: bool) -> dict[str, str]:
    """Variables for node `number` of two on this machine. NCCL takes them for two hosts and connects them by sockets.

    Each has half of the `processes`, and of the GPUs. The user's own values of NCCL's variables stay.
    """
    wanted = {"NCCL_HOSTID": f"node{number}", "NCCL_NET": "Socket", "NCCL_MNNVL_ENABLE": "0"}
    if only_sockets:
        wanted |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
    own = on_loopback() | {name: os.environ.get(name, value) for name, value in wanted.items()}
    if gpus():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus())))).split(",")
        half = processes // 2
        own["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number * half : (number + 1) * half])
    return own


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def clean(place: Path) -> None:
    """Remove the checkpoint and unfinished steps of an earlier run."""
    shutil.rmtree(place / "data" / "checkpoint", ignore_errors=True)
    shutil.rmtree(place / ".scratch", ignore_errors=True)


def result(place: Path) -> dict[str, Any]:
    """What a finished run left: the sha256 of its last step, its number of steps, mean tokens in a row.

    The sha256 covers adapter, optimizer, loss history and sample answers. Manifests record the settings, so they differ.
    """
    checkpoint = place / "data" / "checkpoint"
    last = max(checkpoint.glob("step-*"))
    files = [*sorted(path for path in last.iterdir() if path.name != "manifest.json"), checkpoint / "history.jsonl"]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    facts = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["facts"]
    tokens = facts["tokens"]
    return {
        "sha256": digest.hexdigest(),
        "steps": facts["steps"]["last"],
        "tokens_a_row": tokens["all"] / tokens["rows"],
    }


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Yield a list that has the peak GiB of each GPU at the end, sampled twice a second; empty without nvidia-smi."""
    peaks: list[float] = []
    if not gpus() or not shutil.which("nvidia-smi"):
        yield peaks
        return
    command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "-lms", "500"]
    sampler = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def read() -> None:
        assert sampler.stdout
        for line in sampler.stdout:
            index, _, used = line.partition(",")
            if index.strip().isdigit() and used.strip().isdigit():
                peaks.extend([0.0] * (int(index) + 1 - len(peaks)))
                peaks[int(index)] = max(peaks[int(index)], int(used) / 1024)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield peaks
    finally:
        sampler.kill()
        sampler.wait()
        reader.join(5)


if __name__ == "__main__":
    write_base(Path(sys.argv[1]), sys.argv[2])
