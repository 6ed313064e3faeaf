"""What lies between the matrix products of a decoder layer, each in one pass over memory, for a GPU.

Rows are tokens. A `wide` tensor holds the K columns of a product's input followed by those of LoRA's low-rank part, so some
operations read or write the first K columns of longer rows. A dropout mask is a function of seed, row and column: it is
drawn again in the backward pass and never kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton

from remint.compute.kernels import triton_kernels

# One draw of four 32-bit words decides, by 16 bits each, for so many neighbouring columns.
GROUP = 8
# Into how many sums, at most, the gradient of a low-rank matrix is split.
SHARES = 16


def _launch(kernel: Any, x: torch.Tensor, width: int, *arguments: Any, p: float, **options: Any) -> None:
    """Start a kernel with one program for each row of `width` columns."""
    block = triton.next_power_of_2(width)
    warps = min(16, max(4, block // 512))
    kernel[(x.shape[0],)](*arguments, WIDTH=width, BLOCK=block, THRESHOLD=_threshold(p), num_warps=warps, **options)


def _threshold(p: float) -> int:
    return round(p * 65536)


def _tile(low: torch.Tensor, p: float, is_gated: bool) -> dict[str, Any]:
    """Constants of the kernels that fill a product's input."""
    rank, width = low.shape
    return {
        "WIDTH": width,
        "RANK": rank,
        "RANK_BLOCK": max(16, triton.next_power_of_2(rank)),
        "THRESHOLD": _threshold(p),
        "IS_GATED": is_gated,
        "num_warps": 4,
    }


def _stages(low: torch.Tensor, most: int) -> int:
    """How many rounds of a program are under way at once: one where more would not fit a small GPU's shared memory."""
    return most if low.shape[0] * low.element_size() <= 256 else 1


def normed(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, wide: torch.Tensor, low: torch.Tensor,
    p: float, seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Fill `wide` with the RMS norm of x + delta (T, K) and, after dropout, its product with `low` (rank, K) transposed.

    Returns the sum (x itself without delta), 1 / rms (T,) in fp32, and that product once more (T, rank).
    """
    width = x.shape[1]
    total = x if delta is None else torch.empty_like(x)
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dropped = torch.empty_like(x) if p else wide[:, :width]
    _launch(
        triton_kernels.normed, x, width, x, x if delta is None else delta, weight, total, wide, dropped, rstd,
        wide.stride(0), seed, eps, 1 / (1 - p), p=p, HAS_DELTA=delta is not None,
    )  # fmt: skip
    lows = dropped @ low.T
    wide[:, width:] = lows
    return total, rstd, lows


def normed_back(
    dwide: torch.Tensor, low: torch.Tensor, total: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor,
    dtotal: torch.Tensor | None, p: float, seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `normed`'s sum (T, K), `dtotal` included, and of `low`, fp32."""
    dx, dropped = torch.empty_like(total), torch.empty_like(total)
    width = total.shape[1]
    _launch(
        triton_kernels.normed_back, total, width, dwide, dwide[:, width:] @ low, total, rstd, weight,
        total if dtotal is None else dtotal, dx, dropped, dwide.stride(0), seed, 1 / (1 - p),
        p=p, HAS_TOTAL=dtotal is not None,
    )  # fmt: skip
    return dx, product(dwide[:, width:].T, dropped)


def copied(x: torch.Tensor, wide: torch.Tensor, low: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Fill `wide` with x (T, K) and, after dropout, its product with `low` (rank, K) transposed, which is returned as well."""
    return _fill(x, wide, low, p, seed, False)


def copied_back(
    dwide: torch.Tensor, low: torch.Tensor, x: torch.Tensor, p: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `copied`'s x (T, K) and of `low`, fp32."""
    return _fill_back(dwide, low, x, p, seed, False)


def gated(both: torch.Tensor, wide: torch.Tensor, low: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Fill `wide` with silu(gate) × mlp_up of `both` = [gate | mlp_up] (T, 2K) and, after dropout, its product with `low` (rank, K)
    transposed, which is returned as well."""
    return _fill(both, wide, low, p, seed, True)


def gated_back(
    dwide: torch.Tensor, low: torch.Tensor, both: torch.Tensor, p: float, seed: int, into: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `gated`'s [gate | mlp_up] (T, 2K) and of `low`, fp32. The first comes `into` a tensor if given, which may be
    `both` itself: each element is read before it is written."""
    return _fill_back(dwide, low, both, p, seed, True, into)


def _fill(
    source: torch.Tensor, wide: torch.Tensor, low: torch.Tensor, p: float, seed: int, is_gated: bool
) -> torch.Tensor:
    lows, rows = source.new_empty(len(source), len(low)), 32
    triton_kernels.filled[(triton.cdiv(len(source), rows),)](
        source, low, wide, lows, wide.stride(0), len(source), seed, 1 / (1 - p), **_tile(low, p, is_gated),
        ROWS=rows, COLUMNS=256 // low.element_size(), num_stages=_stages(low, 2),
    )  # fmt: skip
    return lows


def _fill_back(
    dwide: torch.Tensor,
    low: torch.Tensor,
    source: torch.Tensor,
    p: float,
    seed: int,
    is_gated: bool,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns, (rank, width) = 128 // low.element_size(), 32, low.shape
    # Shares of the rows, so that a GPU is busy also where there are few columns; a number that no device decides.
    share = triton.cdiv(triton.cdiv(len(source), SHARES), rows) * rows
    dsource = torch.empty_like(source) if into is None else into
    ddowns = torch.empty(triton.cdiv(len(source), share), rank, width, dtype=torch.float32, device=low.device)
    triton_kernels.filled_back[(triton.cdiv(width, columns), len(ddowns))](
        dwide, source, low, dsource, ddowns, dwide.stride(0), len(source), share, seed, 1 / (1 - p),
        **_tile(low, p, is_gated), ROWS=rows, COLUMNS=columns, STAGES=_stages(low, 3),
    )  # fmt: skip
    return dsource, ddowns.sum(0)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32, also of factors in half of that."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize == 2 else torch.mm(a, b)


def unpacked(weights: Sequence[Any], lora_bs: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """The values of up to three 4-bit weights of bitsandbytes (Nᵢ, K) below one another into the first K columns of `out`, and
    of each one's `lora_bs` (Nᵢ, rank) into rank columns of its own after those; the rest of `out` stays.

    The values have the same bits as those of bitsandbytes' own `dequantize_4bit`.
    """
    states = [weight.quant_state for weight in weights]
    nested, rank = states[0].nested, lora_bs[0].shape[1]
    width = out.shape[1] - len(lora_bs) * rank
    sources = [
        (weight, state.absmax, state.state2.absmax, state.offset, lora_b)
        if nested
        else (weight, state.absmax, state.absmax, state.absmax, lora_b)
        for weight, state, lora_b in zip(weights, states, lora_bs, strict=True)
    ]
    ends = [sum(len(lora_b) for lora_b in lora_bs[: count + 1]) for count in range(len(lora_bs))]
    sources, ends = sources + sources[:1] * (3 - len(lora_bs)), ends + ends[-1:] * (3 - len(lora_bs))
    block = min(1024, triton.next_power_of_2(width // 2))
    triton_kernels.unpacked[(len(out), triton.cdiv(width // 2, block))](
        *sources[0], *sources[1], *sources[2], states[0].code, states[0].state2.code if nested else states[0].code,
        out, out.stride(0), ends[0], ends[1],
        WIDTH=width, RANK=rank, RANK_BLOCK=triton.next_power_of_2(rank), SIZE=states[0].blocksize,
        ABSMAX_SIZE=states[0].state2.blocksize if nested else 1, NESTED=nested, BLOCK=block,
        enable_fp_fusion=False,  # a product and a sum that become one operation are rounded once less
    )  # fmt: skip


def rotated(
    source: torch.Tensor, target: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, heads: int, backward: bool
) -> None:
    """Rotary embedding of the first `heads` heads of each row of `source` into those of `target`, which may be the same;
    `cosines` and `sines` are (T, head size), with equal halves. `backward` turns the other way."""
    half = cosines.shape[1] // 2
    triton_kernels.rotated[(len(source),)](
        source, target, cosines, sines, source.stride(0), target.stride(0), -1.0 if backward else 1.0,
        HEADS=heads, HEADS_BLOCK=triton.next_power_of_2(heads), HALF=half, HALF_BLOCK=triton.next_power_of_2(half),
    )  # fmt: skip


def entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row (N,), fp32; `logits` (N, vocabulary) become its gradient."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    triton_kernels.entropy[(len(logits),)](
        logits, targets, losses, VOCABULARY=logits.shape[1], BLOCK=8192, num_warps=16
    )
    return losses
