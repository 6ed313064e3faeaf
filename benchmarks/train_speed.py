"""Measures the speed of the training step: one table that compares settings on the same weights, data and device.

    python benchmarks/train_speed.py --shape internlm2-1.8b --variants plain fused exact small

Weights are random, in the shape of a real model. Documents are random, packed into full rows. Each variant has its own
process, so it cannot use another's memory or caches. A step is forward, backward, clipping and AdamW. The speed is the
median over the last two thirds of the steps after the first one. TFLOP/s count 4 N per token for the N frozen linear
weights (forward and input gradient, no weight gradient), and 4 N for the head at supervised positions.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "internlm2-1.8b": {
        "vocab_size": 92544,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
# name: (kernels, dequantize, gradient checkpointing, deterministic, rows of a micro-batch)
VARIANTS: dict[str, tuple[str, str, bool, bool, int]] = {
    "plain": ("plain", "once", False, False, 4),
    "fused": ("fused", "once", False, False, 8),
    "exact": ("fused", "once", False, True, 8),
    "wide": ("fused", "once", False, False, 16),
    "packed": ("fused", "each_use", False, False, 8),
    "small": ("fused", "each_use", True, False, 4),
    "small, 5 rows": ("fused", "each_use", True, False, 5),
    "small, 6 rows": ("fused", "each_use", True, False, 6),
    # The settings of the recipes internlm2-8gb, -16gb and -24gb; internlm2-80gb has those of `wide`.
    "8 GB": ("fused", "each_use", True, False, 8),
    "16 GB": ("fused", "each_use", False, False, 4),
    "24 GB": ("fused", "once", False, False, 4),
}


def main() -> None:
    """Run the variants one after the other and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="internlm2-1.8b")
    variants = (
        "names of settings, quoted if they contain spaces; '8 GB' to '24 GB' and wide: recipes internlm2-8gb to -80gb"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help=variants)
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--documents", type=int, nargs=2, default=(60, 256), help="shortest and longest document")
    parser.add_argument("--supervised", type=float, default=0.5, help="supervised share of a document")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print which kernels use the GPU's time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(measure(options, options.one)))
        return
    print(
        f"{'variant':<14}{'tokens/s':>10}{'learned/s':>11}{'TFLOP/s':>9}{'of roof':>9}{'GiB':>7}{'first s':>9}{'loss':>10}",
        flush=True,
    )
    for name in options.variants:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", name], text=True, stdout=subprocess.PIPE, check=False
        )
        lines = done.stdout.splitlines()
        found = [line for line in lines if line.startswith("RESULT ")]
        print("".join(f"{line}\n" for line in lines if line not in found), end="")
        if not found:
            print(f"{name:<14}  failed", flush=True)
            continue
        row = json.loads(found[0].removeprefix("RESULT "))
        print(
            f"{name:<14}{row['tokens_per_s']:>10,.0f}{row['learned_per_s']:>11,.0f}{row['tflops']:>9.1f}"
            f"{row['tflops'] / row['roof']:>9.0%}{row['peak_gib']:>7.1f}{row['first_s']:>9.1f}{row['loss']:>10.5f}  {row['adapter']}",
            flush=True,
        )


@dataclass
class Bench:
    """A model ready to train, and its batches on the device."""

    where: Any
    dtype: Any
    loss_of: Any
    trained: list[Any]
    optimizer: Any
    batches: list[Any]
    linear_weights: int
    head_weights: int

    def wait(self) -> float:
        """The clock, after the device has finished."""
        import torch

        if self.where.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def step(self, number: int) -> Any:
        """Optimizer step `number`; returns its loss per supervised token (nats), still on the device."""
        import torch

        from remint.compute.determinism import seed_step

        batch = self.batches[number % len(self.batches)]
        seed_step(0, "bench", number)
        with torch.autocast(self.where.type, dtype=self.dtype, enabled=self.where.type == "cuda"):
            loss = self.loss_of(**batch) / len(batch["learned"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def prepare(options: argparse.Namespace, variant: str) -> Bench:
    """Random weights in the shape of a real model, quantized, with LoRA; random documents packed into full rows."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from remint.compute import determinism
    from remint.compute.kernels.layers import LINEARS
    from remint.compute.loss import SupervisedLoss
    from remint.core.settings import Runtime
    from remint.model import loading, lora, quantization
    from remint.model.qlora import Lora, Quantization

    kernels, dequantize, checkpointing, deterministic, micro_batch = VARIANTS[variant]
    where = loading.device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    determinism.apply(Runtime(threads=2, deterministic=deterministic))
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=32768, attention_bias=False)
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    quantization.quantize(model, Quantization("nf4", True, 64, dequantize))
    torch.cuda.empty_cache() if where.type == "cuda" else None
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Counted before LoRA adds linear layers of its own.
    linear = sum(layer.in_features * layer.out_features for layer in quantization.linears(model).values())
    adapted = lora.add_lora(model, Lora(options.rank, 16, options.dropout, list(LINEARS)))
    loss_of = SupervisedLoss(adapted, fused=kernels == "fused").train()
    trained = [p for p in loss_of.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batches = random_batches(options, micro_batch, config.vocab_size, where)
    return Bench(where, dtype, loss_of, trained, optimizer, batches, linear, config.vocab_size * config.hidden_size)


def random_batches(options: argparse.Namespace, micro_batch: int, vocabulary: int, where: Any) -> list[Any]:
    """Three micro-batches of packed random documents, on the device."""
    import numpy as np

    from remint.compute.packing import collate, document, moved, pack

    random = np.random.default_rng(0)
    documents = []
    for length in random.integers(options.documents[0], options.documents[1] + 1, size=60 * micro_batch):
        learned = np.arange(length) >= (1 - options.supervised) * length
        documents.append(document(random.integers(0, vocabulary, length), learned))
    packed = pack([len(d.ids) for d in documents], options.length)[: 3 * micro_batch]
    return [
        moved(collate([[documents[i] for i in row] for row in packed[start : start + micro_batch]]), where)
        for start in range(0, len(packed), micro_batch)
    ]


def measure(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Measure one variant. Returns the values of its row in the table."""
    bench = prepare(options, variant)
    import torch  # after `prepare` has set cuBLAS's variable

    tokens = [int(batch["starts"][-1].item()) for batch in bench.batches]
    learned = [len(batch["learned"]) for batch in bench.batches]
    flops = [4 * (bench.linear_weights * t + bench.head_weights * n) for t, n in zip(tokens, learned, strict=True)]
    reachable = roof(torch, bench.where, bench.dtype)
    started = bench.wait()
    last = bench.step(0)
    first = bench.wait() - started
    times, work = [], []
    for number in range(1, options.steps):
        started = bench.wait()
        last = bench.step(number)
        times.append(bench.wait() - started)
        work.append(number % len(bench.batches))
    on_gpu = bench.where.type == "cuda"
    if options.profile and on_gpu:
        _profile(torch, bench.step)
    steady = range(len(times) // 3, len(times))

    def per_second(amounts: list[int]) -> float:
        return statistics.median(amounts[work[i]] / times[i] for i in steady)

    return {
        "tokens_per_s": per_second(tokens),
        "learned_per_s": per_second(learned),
        "tflops": per_second(flops) / 1e12,
        "roof": reachable / 1e12,
        "peak_gib": (torch.cuda.max_memory_allocated() / 2**30) if on_gpu else float("nan"),
        "first_s": first,
        "loss": last.item(),
        "adapter": hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in bench.trained)).hexdigest()[:10],
    }


def roof(torch: Any, where: Any, dtype: Any) -> float:
    """Operations per second of a large matrix product: the practical peak of the device."""
    size = (16384, 2048, 8192) if where.type == "cuda" else (512, 576, 1536)
    a = torch.randn(size[0], size[1], device=where, dtype=dtype)
    b = torch.randn(size[1], size[2], device=where, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        if where.type == "cuda":
            torch.cuda.synchronize()
        started = time.monotonic()
        for _ in range(20):
            a @ b
        if where.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.monotonic() - started) / 20)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return 2 * size[0] * size[1] * size[2] / best


def _profile(torch: Any, one: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for number in range(3):
            one(number)
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events)
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:40]:
        share = event.self_device_time_total / total
        print(f"{share:6.1%} {event.self_device_time_total / 3000:9.2f} ms {event.count // 3:6d} x  {event.key[:90]}")


if __name__ == "__main__":
    main()
