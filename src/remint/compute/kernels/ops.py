"""The operations between the matrix products of a decoder layer, each in one pass over memory, for a GPU.

Rows are tokens. An `extended` tensor is the extended input of a product (see `fused_linear`): its K input columns, then
the low-rank activations of LoRA. So some operations read or write only the first K columns of longer rows. A dropout
mask is a function of seed, row and column: the backward pass draws it again, and it is never stored.

Where an operation takes `lora_a` (rank, K), it is LoRA's A times the LoRA scale. With several adapted layers on one
input, their A are stacked and `rank` is the sum of their ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton

from remint.compute.kernels import triton_kernels
from remint.compute.teacher import LEAST

# One Philox draw of four 32-bit words decides this number of neighbouring columns, by 16 bits each.
GROUP = 8
# The gradient of `lora_a` is summed in at most this many parts.
SHARES = 16


def _launch(kernel: Any, x: torch.Tensor, width: int, *arguments: Any, p: float, **options: Any) -> None:
    """Launch a kernel with one program per row of `width` columns."""
    block = triton.next_power_of_2(width)
    warps = min(16, max(4, block // 512))
    kernel[(x.shape[0],)](*arguments, WIDTH=width, BLOCK=block, THRESHOLD=_threshold(p), num_warps=warps, **options)


def _threshold(p: float) -> int:
    return round(p * 65536)


def _constants(lora_a: torch.Tensor, p: float, is_gated: bool) -> dict[str, Any]:
    """Compile-time constants of the `fill_extended` kernels."""
    rank, width = lora_a.shape
    return {
        "WIDTH": width,
        "RANK": rank,
        "RANK_BLOCK": max(16, triton.next_power_of_2(rank)),
        "THRESHOLD": _threshold(p),
        "IS_GATED": is_gated,
        "num_warps": 4,
    }


def _stages(lora_a: torch.Tensor, most: int) -> int:
    """Pipeline stages of a kernel's loop: `most`, or 1 if more would not fit into a small GPU's shared memory."""
    return most if lora_a.shape[0] * lora_a.element_size() <= 256 else 1


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float,
    extended: torch.Tensor, lora_a: torch.Tensor, p: float, seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Residual add and RMSNorm: fills `extended` with n = RMSNorm(x + delta) (T, K) and dropout(n) lora_aᵀ (T, rank).

    Returns the sum x + delta (x itself without delta), 1 / rms (T,) in fp32, and a contiguous copy of the low-rank
    activations (T, rank).
    """
    width = x.shape[1]
    total = x if delta is None else torch.empty_like(x)
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dropped = torch.empty_like(x) if p else extended[:, :width]
    _launch(
        triton_kernels.add_rms_norm, x, width, x, x if delta is None else delta, weight, total, extended, dropped, rstd,
        extended.stride(0), seed, eps, 1 / (1 - p), p=p, HAS_DELTA=delta is not None,
    )  # fmt: skip
    low_rank = dropped @ lora_a.T
    extended[:, width:] = low_rank
    return total, rstd, low_rank


def add_rms_norm_backward(
    dextended: torch.Tensor, lora_a: torch.Tensor, total: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor,
    dtotal: torch.Tensor | None, p: float, seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of the sum x + delta (T, K), and of `lora_a` in fp32.

    `dtotal` is the gradient that reaches the sum through the residual stream; it is added to the first result.
    """
    dx, dropped = torch.empty_like(total), torch.empty_like(total)
    width = total.shape[1]
    _launch(
        triton_kernels.add_rms_norm_backward, total, width, dextended, dextended[:, width:] @ lora_a, total, rstd,
        weight, total if dtotal is None else dtotal, dx, dropped, dextended.stride(0), seed, 1 / (1 - p),
        p=p, HAS_TOTAL=dtotal is not None,
    )  # fmt: skip
    return dx, matmul_fp32(dextended[:, width:].T, dropped)


def copy_with_lora(x: torch.Tensor, extended: torch.Tensor, lora_a: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Fill `extended` with x (T, K) and dropout(x) lora_aᵀ (T, rank). Returns a contiguous copy of the latter."""
    return _fill_extended(x, extended, lora_a, p, seed, False)


def copy_with_lora_backward(
    dextended: torch.Tensor, lora_a: torch.Tensor, x: torch.Tensor, p: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (T, K), and of `lora_a` in fp32."""
    return _fill_extended_backward(dextended, lora_a, x, p, seed, False)


def silu_mul(gate_up: torch.Tensor, extended: torch.Tensor, lora_a: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """SwiGLU: fills `extended` with v = silu(gate) × mlp_up (T, K) and dropout(v) lora_aᵀ (T, rank).

    `gate_up` is [gate | mlp_up] (T, 2K). Returns a contiguous copy of the low-rank activations (T, rank).
    """
    return _fill_extended(gate_up, extended, lora_a, p, seed, True)


def silu_mul_backward(
    dextended: torch.Tensor,
    lora_a: torch.Tensor,
    gate_up: torch.Tensor,
    p: float,
    seed: int,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `gate_up` (T, 2K), and of `lora_a` in fp32.

    The first is written into `into` if that is given. `into` may be `gate_up` itself: each element is read before it is
    written.
    """
    return _fill_extended_backward(dextended, lora_a, gate_up, p, seed, True, into)


def _fill_extended(
    source: torch.Tensor, extended: torch.Tensor, lora_a: torch.Tensor, p: float, seed: int, is_gated: bool
) -> torch.Tensor:
    low_rank, rows = source.new_empty(len(source), len(lora_a)), 32
    triton_kernels.fill_extended[(triton.cdiv(len(source), rows),)](
        source, lora_a, extended, low_rank, extended.stride(0), len(source), seed, 1 / (1 - p),
        **_constants(lora_a, p, is_gated), ROWS=rows, COLUMNS=256 // lora_a.element_size(),
        num_stages=_stages(lora_a, 2),
    )  # fmt: skip
    return low_rank


def _fill_extended_backward(
    dextended: torch.Tensor,
    lora_a: torch.Tensor,
    source: torch.Tensor,
    p: float,
    seed: int,
    is_gated: bool,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns, (rank, width) = 128 // lora_a.element_size(), 32, lora_a.shape
    # The rows are split into shares so that a matrix with few columns keeps a GPU busy too. Their number does not
    # depend on the device, so the order of summation does not either.
    share = triton.cdiv(triton.cdiv(len(source), SHARES), rows) * rows
    dsource = torch.empty_like(source) if into is None else into
    dlora_a_parts = torch.empty(triton.cdiv(len(source), share), rank, width, dtype=torch.float32, device=lora_a.device)
    triton_kernels.fill_extended_backward[(triton.cdiv(width, columns), len(dlora_a_parts))](
        dextended, source, lora_a, dsource, dlora_a_parts, dextended.stride(0), len(source), share, seed, 1 / (1 - p),
        **_constants(lora_a, p, is_gated), ROWS=rows, COLUMNS=columns, STAGES=_stages(lora_a, 3),
    )  # fmt: skip
    return dsource, dlora_a_parts.sum(0)


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product a b in fp32, also if a and b are in half precision."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize == 2 else torch.mm(a, b)


def dequantize_into(weights: Sequence[Any], lora_bs: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Dequantize up to three 4-bit weights of bitsandbytes (Nᵢ, K) into `out`, and copy their LoRA B there.

    `out` is (ΣNᵢ, K + m·rank). The m weights are stacked as rows in the first K columns. Each one's B, from `lora_bs`
    (Nᵢ, rank), goes into its own rank columns after those. The rest of `out` is not written. The values have the same
    bits as those of bitsandbytes' `dequantize_4bit`.
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
    triton_kernels.dequantize_into[(len(out), triton.cdiv(width // 2, block))](
        *sources[0], *sources[1], *sources[2], states[0].code, states[0].state2.code if nested else states[0].code,
        out, out.stride(0), ends[0], ends[1],
        WIDTH=width, RANK=rank, RANK_BLOCK=triton.next_power_of_2(rank), SIZE=states[0].blocksize,
        ABSMAX_SIZE=states[0].state2.blocksize if nested else 1, NESTED=nested, BLOCK=block,
        enable_fp_fusion=False,  # a fused multiply-add rounds once instead of twice
    )  # fmt: skip


def apply_rope(
    source: torch.Tensor, target: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, heads: int, backward: bool
) -> None:
    """Apply the rotary embedding to the first `heads` heads of each row of `source`, and write them to `target`.

    `target` may be `source`. `cosines` and `sines` are (T, head size), with equal halves. `backward` rotates the other
    way.
    """
    half = cosines.shape[1] // 2
    triton_kernels.apply_rope[(len(source),)](
        source, target, cosines, sines, source.stride(0), target.stride(0), -1.0 if backward else 1.0,
        HEADS=heads, HEADS_BLOCK=triton.next_power_of_2(heads), HALF=half, HALF_BLOCK=triton.next_power_of_2(half),
    )  # fmt: skip


def cross_entropy_and_grad(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row (N,), fp32. Overwrites `logits` (N, vocabulary) with its gradient."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    triton_kernels.cross_entropy_and_grad[(len(logits),)](
        logits, targets, losses, VOCABULARY=logits.shape[1], BLOCK=8192, num_warps=16
    )
    return losses


def divergence_and_grad(logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """`teacher.divergence` of each row (N,), fp32. Overwrites `logits` (N, vocabulary) with its gradient.

    `ids` and `log_probs` (N, a power of two) are the base's most likely tokens.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    triton_kernels.divergence_and_grad[(len(logits),)](
        logits, ids, log_probs, losses, VOCABULARY=logits.shape[1], TOP=ids.shape[1], LEAST=LEAST, BLOCK=8192,
        num_warps=16,
    )  # fmt: skip
    return losses
