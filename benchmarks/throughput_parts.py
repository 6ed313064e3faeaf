"""The parts that `throughput.py` measures. Each runs on growing inputs, in a folder that is removed afterwards."""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]


@dataclass
class Point:
    """One size of one part: `amount` in `unit`, its time, and notes for the table, such as reference times."""

    part: str
    amount: float
    unit: str
    seconds: float
    notes: dict[str, str] = field(default_factory=dict)


def best(work: Callable[[], object], times: int = 3) -> float:
    """The shortest of `times` runs, in seconds. Other load on the machine can only make a run longer."""
    found = math.inf
    for _ in range(times):
        started = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - started)
    return found


def packing(folder: Path) -> Iterator[Point]:
    """Pack uncut documents into rows of 2048 by best fit, compared with one long text cut every 2048 tokens."""
    from remint.compute.packing import collate, document, pack

    random = np.random.default_rng(0)
    length = 2048
    for count in (3_000, 10_000, 30_000, 100_000, 300_000):
        sizes = np.minimum(length, random.lognormal(4.8, 0.7, count).astype(int) + 8)
        tokens = int(sizes.sum())
        known = {size: document([5] * size, [True] * size) for size in set(sizes.tolist())}
        documents = [known[size] for size in sizes.tolist()]
        rows: list[list[int]] = []

        def ours(documents: list[Any] = documents, rows: list[list[int]] = rows) -> None:
            rows[:] = pack([len(d.ids) for d in documents], length)

        def filled(documents: list[Any] = documents, rows: list[list[int]] = rows) -> None:
            for row in rows:
                collate([[documents[index] for index in row]])

        def theirs(documents: list[Any] = documents, tokens: int = tokens) -> None:
            whole = tokens - tokens % length
            for part in ("ids", "targets"):
                np.concatenate([getattr(d, part) for d in documents])[:whole].reshape(-1, length)

        seconds = best(ours)
        ends = np.cumsum(sizes)
        cut = float(np.mean((ends - 1) // length != (ends - sizes) // length))
        yield Point(
            "packing",
            count,
            "documents",
            seconds,
            {
                "tokens/s": f"{tokens / seconds / 1e6:.0f} M",
                "with rows": f"{tokens / (seconds + best(filled, 1)) / 1e6:.1f} M",
                "fill": f"{tokens / (len(rows) * length):.2%}",
                "concatenate and cut": f"{tokens / best(theirs) / 1e6:.0f} M tokens/s, fill 100 %, cuts {cut:.1%}",
            },
        )


def replicate(folder: Path) -> Iterator[Point]:
    """The complete stage replicate_data, on the project's own records."""
    from remint.core.declared import Declared
    from remint.core.log import silent
    from remint.runner import config, preflight
    from remint.stages.replicate_data.run import run

    declared = Declared("replicate_data", {}, {}, list)
    for copies in (10, 30, 100, 300, 1000):
        with contextlib.chdir(ROOT):
            settings = [f"replicate_data.{kind}_copies={copies}" for kind in ("identity", "control")]
            arguments = config.compose(preflight.declared_settings("replicate_data"), settings)
            arguments["paths"] = _moved(arguments["paths"], dataset=folder / "dataset")

            def once(arguments: dict[str, Any] = arguments) -> None:
                with contextlib.redirect_stdout(io.StringIO()), _no_bars():
                    run(**arguments, declared=declared, log=silent)

            seconds = best(once, 2)
        facts = json.loads((folder / "dataset/manifest.json").read_text(encoding="utf-8"))["facts"]
        size = (folder / "dataset/train.jsonl").stat().st_size
        yield Point("replicate_data", facts["train"]["rows"], "rows", seconds, {"MB/s": f"{size / seconds / 1e6:.0f}"})


def _moved(paths: Any, **changes: Path) -> Any:
    """Paths outside the repository, which the checks of Paths would refuse."""
    moved = object.__new__(type(paths))
    moved.__dict__.update({**vars(paths), **changes})
    return moved


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    import datasets

    datasets.disable_progress_bars()
    yield


def hashing(folder: Path) -> Iterator[Point]:
    """A file's sha256 as in manifests, compared with hashlib on the file with a large buffer, and on memory."""
    from remint.core.manifest import file_digest

    for size in (2**24, 2**26, 2**28, 2**30):
        data = np.random.default_rng(0).bytes(size)
        path = folder / "data"
        path.write_bytes(data)

        def large_buffer(path: Path = path) -> None:
            known, buffer = hashlib.sha256(), memoryview(bytearray(2**22))
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    known.update(buffer[:count])

        seconds = best(lambda path=path: file_digest(path))
        memory = best(lambda data=data: hashlib.sha256(data).digest())
        notes = {
            "large buffer": f"{size / best(large_buffer) / 1e6:.0f} MB/s",
            "memory": f"{size / memory / 1e6:.0f} MB/s",
        }
        yield Point("hashing", size / 1e6, "MB", seconds, notes)


def staging_safetensors(folder: Path) -> Iterator[Point]:
    """A checkpoint in fp32, rewritten in bf16 as a base. MB are those of the source."""
    import torch

    yield from _staging(
        folder, "staging, safetensors", lambda layers: (write_llama(folder / "s", layers, torch.float32), None)
    )


def staging_gguf(folder: Path) -> Iterator[Point]:
    """The same for a GGUF of 4-bit weights (Q4_1), the format of the default base."""
    yield from _staging(folder, "staging, GGUF", lambda layers: write_gguf(folder / "g", layers))


def _staging(folder: Path, part: str, write: Callable[[int], tuple[Path, str | None]]) -> Iterator[Point]:
    import torch

    from remint.stages.stage_base import layout

    for layers in (8, 16, 32, 64):
        source, gguf = write(layers)
        size = sum(path.stat().st_size for path in source.iterdir() if path.suffix in (".gguf", ".safetensors"))
        config = layout.read_config(source, gguf)
        written: list[int] = []

        def once(
            source: Path = source, gguf: str | None = gguf, config: Any = config, written: list[int] = written
        ) -> None:
            draft = fresh(folder / "draft")
            with contextlib.redirect_stderr(io.StringIO()):  # transformers' bar
                writer = layout.write_weights(source, gguf, config, torch.bfloat16, draft, 2000 * 2**20)
            written[:] = [writer.total]

        seconds = best(once, 2)
        yield Point(part, size / 1e6, "MB", seconds, {"writes": f"{written[0] / seconds / 1e6:.0f} MB/s"})
        shutil.rmtree(source)


def merge(folder: Path) -> Iterator[Point]:
    """Merge an adapter of rank 64 into 3, 6, 12 and all 24 layers of InternLM2-1.8B, each size in its own process."""
    from remint.core import launch

    *width, vocabulary = INTERNLM2
    block = {**os.environ, **launch.environment(2, network=False)}
    for layers in (3, 6, 12, 24):
        shape = (*width, vocabulary * layers // 24)
        source = write_llama(folder / "base", layers, None, shape, shard_mb=500)  # as the stage stores it
        done = subprocess.run(
            [sys.executable, __file__, str(source), str(folder / "out")],
            env=block,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        yield Point(
            "merge",
            found["mb"],
            "MB",
            found["merge"],
            {
                "copied in memory": f"{found['copy']:.2f} s",
                "from disk to disk": f"{found['merge_synced']:.2f} s, copied {found['copy_synced']:.2f} s",
                "processor time": f"{found['merge_used']:.2f} s, copied {found['copy_used']:.2f} s",
                "LoRA's products alone": f"{found['products']:.2f} s, processor {found['products_used']:.2f} s",
                "peak": f"{found['peak']:.0f} MB, {found['above']:.0f} MB above the start",
                "largest shard": f"{found['largest']:.0f} MB",
            },
        )
        shutil.rmtree(folder / "out")
    shutil.rmtree(source)


def measure_merge(source: Path, out: Path) -> dict[str, float]:
    """Merge and copy in turns, within the page cache and from disk to disk. Memory is in MB, as Linux counts it."""
    import torch

    from remint.compute import determinism
    from remint.compute.kernels.layers import LINEARS
    from remint.core.settings import Runtime
    from remint.model.qlora import Lora
    from remint.stages.merge.tensors import write_merged
    from remint.weights import adapter, shards

    determinism.apply(Runtime(2, True))
    lora = Lora(64, 16, 0.1, list(LINEARS))
    generator = torch.Generator().manual_seed(1)
    expected = adapter.expected_shapes(shards.shapes(source), lora)
    tensors = {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in expected.items()}
    files = shards.files(source)

    def merged(draft: Path) -> None:
        write_merged(source, tensors, lora, None, None, draft)

    def copied(draft: Path) -> None:
        for file in files:
            shutil.copyfile(file, draft / file.name)

    found: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the peak memory (VmHWM)
    start = memory("VmRSS")
    for _ in range(3):
        for name, work in (("copy", copied), ("merge", merged)):
            for place, is_cold in ((name, False), (f"{name}_synced", True)):
                draft = fresh(out)
                for file in files if is_cold else []:
                    _synced(file, drop=True)
                os.sync()  # do not count writes that earlier runs left pending
                started, used = time.perf_counter(), time.process_time()
                work(draft)
                used = time.process_time() - used
                for file in draft.iterdir() if is_cold else []:
                    _synced(file)
                found[place] = min(time.perf_counter() - started, found.get(place, math.inf))
                found[f"{name}_used"] = min(used, found.get(f"{name}_used", math.inf))
    peak = memory("VmHWM")
    layers = adapter.adapted_layers(shards.shapes(source), lora.targets)
    used = time.process_time()
    found["products"] = best(lambda: [adapter.delta(tensors, layer, lora).numel() for layer in layers], 2)
    found["products_used"] = (time.process_time() - used) / 2
    sizes = [file.stat().st_size / 1e6 for file in files]
    return found | {"mb": sum(sizes), "largest": max(sizes), "peak": peak, "above": peak - start}


def _synced(path: Path, drop: bool = False) -> None:
    """Wait until a file is on the disk. With `drop`, evict it from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if drop:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(name: str) -> float:
    """A value of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def repro(folder: Path) -> Iterator[Point]:
    """`dvc repro` of an unchanged pipeline with growing artefacts. The model is the tests' tiny one."""
    sys.path.insert(0, str(ROOT))
    from tests.workplace import with_tiny_model

    place = with_tiny_model(folder / "place")
    place.record_checksums("tiny")
    place.repro()
    for size in (2**24, 2**26, 2**28, 2**30):
        (place.root / "data/base/filler").write_bytes(np.random.default_rng(0).bytes(size))
        place.run("dvc", "commit", "--force", "--quiet")
        ran: list[str] = []
        seconds = best(lambda ran=ran: ran.extend(place.repro()))
        (place.root / "data/base/filler").touch()
        hashed = best(lambda ran=ran: ran.extend(place.repro()), 1)
        assert not ran, ran
        yield Point("dvc repro, no change", size / 1e6, "MB", seconds, {"after touching the file": f"{hashed:.1f} s"})


# hidden, intermediate, heads, key-value heads, vocabulary
SMOLLM2, INTERNLM2 = (576, 1536, 9, 3, 49152), (2048, 8192, 16, 8, 92544)


def fresh(folder: Path) -> Path:
    """Make `folder` empty, and create it if needed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def shapes(layers: int, shape: tuple[int, int, int, int, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a Llama model."""
    from remint.compute.kernels.layers import LINEARS, MLP

    hidden, inner, heads, few, vocabulary = shape
    narrow = hidden // heads * few
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name, size in zip(LINEARS, (hidden, narrow, narrow, hidden, inner, inner), strict=False):
            yield f"{block}.{'mlp' if name in MLP else 'self_attn'}.{name}.weight", (size, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, inner)
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if hidden == INTERNLM2[0]:
        yield "lm_head.weight", (vocabulary, hidden)


def write_llama(folder: Path, layers: int, dtype: Any, shape: Any = SMOLLM2, shard_mb: int = 2000) -> Path:
    """Write a checkpoint of random weights, in bf16 unless `dtype` is given."""
    import torch
    from transformers import LlamaConfig

    from remint.weights import shards

    writer = shards.Writer(fresh(folder), shard_mb * 2**20)
    generator = torch.Generator().manual_seed(0)
    for name, size in shapes(layers, shape):
        writer.add(name, torch.empty(size, dtype=dtype or torch.bfloat16).uniform_(-0.05, 0.05, generator=generator))
    writer.close()
    LlamaConfig(**fields(layers, shape), dtype="bfloat16").save_pretrained(folder)
    return folder


def fields(layers: int, shape: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """The fields of config.json for a shape."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    tied = {"tie_word_embeddings": shape[0] == SMOLLM2[0]}
    return dict(zip(names, shape, strict=True)) | {"num_hidden_layers": layers} | tied


def write_gguf(folder: Path, layers: int) -> tuple[Path, str]:
    """Write the same model as a GGUF whose matrices are Q4_1."""
    import gguf

    hidden, inner, heads, few, vocabulary = SMOLLM2
    writer = gguf.GGUFWriter(fresh(folder) / "m.gguf", "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(few)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_rope_dimension_count(hidden // heads)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"}
    names |= {f"self_attn.{key}_proj": f"attn_{key}" for key in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{key}_proj": f"ffn_{key}" for key in ("gate", "up", "down")}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    random = np.random.default_rng(0)
    for name, size in shapes(layers, SMOLLM2):
        for old, new in names.items():
            name = name.replace(old, new)
        values = random.random(size, dtype=np.float32) / 10 - 0.05
        kind = gguf.GGMLQuantizationType.Q4_1
        if len(size) == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, "m.gguf"


PARTS = {
    "packing": packing,
    "replicate_data": replicate,
    "hashing": hashing,
    "safetensors": staging_safetensors,
    "gguf": staging_gguf,
    "merge": merge,
    "repro": repro,
}

if __name__ == "__main__":
    print(json.dumps(measure_merge(Path(sys.argv[1]), Path(sys.argv[2]))))
