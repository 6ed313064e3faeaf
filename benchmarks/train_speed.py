"""How fast the training step is: one table of settings side by side, on the same weights, data and device.

    python benchmarks/train_speed.py --shape internlm2-1.8b --variants plain fused exact small

Random weights of a real model's shape, random documents packed into full rows. Each variant is a process of its own, so none
profits from another's memory or caches. A step is forward, backward, clipping and AdamW; steady state is the median of
the steps after the first ones. TFLOP/s count 4 N a token for the frozen linear layers (forward and the gradient of the
input, no gradient of the weight) and 4 N for the head on positions that learn.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
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
    # As the recipes internlm2-8gb, -16gb and -24gb have it; internlm2-80gb is `wide`.
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
    variants = "settings with a name, in quotes where it has spaces; '8 GB' to '24 GB' and wide are the recipes internlm2-8gb to -80gb"
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help=variants)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--documents", type=int, nargs=2, default=(60, 256), help="shortest and longest document")
    parser.add_argument("--supervised", type=float, default=0.5, help="share of a document that is learned")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time goes")
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


def measure(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """One variant's figures."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from remint.compute import determinism
    from remint.compute.kernels.layers import LINEARS
    from remint.compute.loss import SupervisedLoss
    from remint.compute.packing import collate, document, moved, pack
    from remint.core.settings import Runtime
    from remint.model import loading, lora, quantization

    kernels, dequantize, checkpointing, deterministic, micro_batch = VARIANTS[variant]
    where = loading.device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    determinism.apply(Runtime(threads=2, deterministic=deterministic))
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=32768, attention_bias=False)
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    quantization.quantize(model, loading.Quantization("nf4", True, 64, dequantize))
    torch.cuda.empty_cache() if where.type == "cuda" else None
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    linear = sum(
        w.in_features * w.out_features for w in quantization.linears(model).values()
    )  # before LoRA has its own
    adapted = lora.add_lora(model, loading.Lora(options.rank, 16, options.dropout, list(LINEARS)))
    loss_of = SupervisedLoss(adapted, fused=kernels == "fused").train()
    trained = [p for p in loss_of.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    random = np.random.default_rng(0)
    documents = []
    for length in random.integers(options.documents[0], options.documents[1] + 1, size=60 * micro_batch):
        learned = np.arange(length) >= (1 - options.supervised) * length
        documents.append(document(random.integers(0, config.vocab_size, length), learned))
    packed = pack([len(d.ids) for d in documents], options.length)[: 3 * micro_batch]
    batches = [
        moved(collate([[documents[i] for i in row] for row in packed[start : start + micro_batch]]), where)
        for start in range(0, len(packed), micro_batch)
    ]
    tokens = [int((batch["starts"][-1]).item()) for batch in batches]
    learned_tokens = [len(batch["learned"]) for batch in batches]
    head = config.vocab_size * config.hidden_size

    def wait() -> float:
        if where.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def one(number: int) -> torch.Tensor:
        index = number % len(batches)
        determinism.seed_step(0, "bench", number)
        with torch.autocast(where.type, dtype=dtype, enabled=where.type == "cuda"):
            loss = loss_of(**batches[index]) / learned_tokens[index]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    reachable = roof(torch, where, dtype)
    started = wait()
    last = one(0)
    first = wait() - started
    times, work = [], []
    for number in range(1, options.steps):
        started = wait()
        last = one(number)
        times.append(wait() - started)
        work.append(number % len(batches))
    if options.profile and where.type == "cuda":
        _profile(torch, one)
    steady = range(len(times) // 3, len(times))
    flops = [4 * (linear * tokens[i] + head * learned_tokens[i]) for i in range(len(batches))]
    return {
        "tokens_per_s": statistics.median(tokens[work[i]] / times[i] for i in steady),
        "learned_per_s": statistics.median(learned_tokens[work[i]] / times[i] for i in steady),
        "tflops": statistics.median(flops[work[i]] / times[i] for i in steady) / 1e12,
        "roof": reachable / 1e12,
        "peak_gib": (torch.cuda.max_memory_allocated() / 2**30) if where.type == "cuda" else float("nan"),
        "first_s": first,
        "loss": last.item(),
        "adapter": hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in trained)).hexdigest()[:10],
    }


def roof(torch: Any, where: Any, dtype: Any) -> float:
    """Operations a second of a large matrix product: what the device can do in practice."""
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
