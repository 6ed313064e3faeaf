"""The peak GPU memory of a training run, estimated before anything is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from remint.compute.kernels.head import ROWS
from remint.compute.kernels.layers import LINEARS, MOST_RANK
from remint.core.errors import GpuTooSmall
from remint.core.files import read_object
from remint.model.loading import TORCH_DTYPES
from remint.stages.train.settings import Train

# Memory that the allocator loses to fragmentation, estimated from measured peaks (docs/results.md).
_MARGIN = 1.03


def check_gpu_memory(base: Path, train: Train) -> None:
    """Raise GpuTooSmall if the current GPU has less free memory than training this base model needs."""
    need = needed(read_object(base / "config.json", "run `make repro`, which makes it"), train)
    free, _ = torch.cuda.mem_get_info()
    if need is not None and need > free:
        raise GpuTooSmall(need, free)


def needed(config: Mapping[str, Any], train: Train) -> int | None:
    """Peak bytes of a training run with `kernels.blocks`, for a base model with this config.json.

    Returns None for settings that `kernels.blocks` does not support. The sum counts the frozen weights, the adapter
    with its gradients and AdamW's two moments in fp32, the tensors saved for the backward pass, and the largest
    temporary tensors. With gradient checkpointing, the saved tensors are the input of each layer and all saved tensors
    of one layer.
    """
    size, rank = TORCH_DTYPES[train.precision].itemsize, train.lora.rank
    if train.kernels != "fused" or set(train.lora.targets) != set(LINEARS) or rank > MOST_RANK:
        return None
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    queries, values = heads * width, config["num_key_value_heads"] * width
    # For each product: input columns, output columns, number of linear layers in it.
    products = (
        (hidden, queries + 2 * values, 3),
        (queries, hidden, 1),
        (hidden, 2 * inner, 2),
        (inner, hidden, 1),
    )
    linear = sum(into * out for into, out, _ in products)
    adapter = rank * sum(into * count + out for into, out, count in products)
    matrices = size * sum(out * (into + count * rank) for into, out, count in products)
    is_packed = train.quantization.kind != "none" and train.quantization.dequantize == "each_use"
    scale = (1 + 4 / 256 if train.quantization.double else 4) / train.quantization.block_size
    weights, scratch = (linear * (0.5 + scale), matrices) if is_packed else (matrices, 0)
    scaled_a = size * rank * sum(into * count for into, _, count in products)
    layers = config["num_hidden_layers"]
    embeddings = size * config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    fixed = embeddings + scratch + layers * (weights + scaled_a + 16 * adapter)

    tokens = train.micro_batch * train.max_length
    kept = size * (2 * hidden + 2 * queries + 2 * values + 2 * inner + 7 * rank) + 4 * heads + 8
    inputs = size * (inner + rank + 4 * hidden)
    passing = size * 2 * inner  # the gradient of a saved tensor; with checkpointing it reuses that tensor's memory
    head = size * (min(ROWS["cuda"], tokens) * config["vocab_size"] + 3 * tokens * hidden)
    if train.gradient_checkpointing:
        moving = tokens * (layers * size * hidden + kept + inputs)
        return round(_MARGIN * (fixed + max(moving, tokens * layers * size * hidden + head)))
    return round(_MARGIN * (fixed + tokens * layers * kept + max(tokens * (inputs + passing), head)))
