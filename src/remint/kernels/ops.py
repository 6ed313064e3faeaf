"""What lies between the matrix products of a decoder layer, each in one pass over memory: Triton kernels for a GPU.

Rows are tokens. A `wide` tensor holds the K columns of a product's input followed by those of LoRA's low-rank part, so some
operations read or write the first K columns of longer rows. Sums are in fp32 and in a fixed order, without atomics. A
dropout mask is a function of seed, row and column: it is drawn again in the backward pass and never kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Columns are handled as eight parts: one draw of four 32-bit words decides, by 16 bits each, for one column of each part.
PARTS = 8
# Philox keeps passing the usual batteries with seven rounds (Salmon et al. 2011).
_ROUNDS = tl.constexpr(7)


@triton.jit
def _kept(seed, row, part, column, SIZE: tl.constexpr, THRESHOLD: tl.constexpr):
    """Which elements of a row live: (8, block) of bool."""
    a, b, c, d = tl.randint4x(seed, (row * SIZE + column).to(tl.int32), n_rounds=_ROUNDS)
    word = part // 2
    bits = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    return ((bits >> (16 * (part % 2))) & 0xFFFF) >= THRESHOLD


@triton.jit
def _normed(
    x, delta, weight, total, wide, dropped, rstds, wide_stride, seed, eps, gain,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, 8)[:, None], tl.arange(0, BLOCK)[None, :]
    at, inside = part * SIZE + column, (part >= 0) & (column < SIZE)
    value = tl.load(x + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(tl.sum(value * value, 1), 0) / WIDTH + eps)
    tl.store(rstds + row, rstd)
    scaled = value * rstd * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = scaled.to(wide.dtype.element_ty)
    tl.store(wide + row * wide_stride + at, normed, mask=inside)
    if THRESHOLD > 0:
        kept = _kept(seed, row, part, column, SIZE, THRESHOLD)
        result = tl.where(kept, normed.to(tl.float32) * gain, 0.0)
        tl.store(dropped + row * WIDTH + at, result.to(dropped.dtype.element_ty), mask=inside)


@triton.jit
def _normed_back(
    dwide, ddropped, total, rstds, weight, dtotal, dx, dropped, wide_stride, seed, gain,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, 8)[:, None], tl.arange(0, BLOCK)[None, :]
    at, inside = part * SIZE + column, (part >= 0) & (column < SIZE)
    rstd = tl.load(rstds + row)
    unit = tl.load(total + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32) * rstd
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dwide + row * wide_stride + at, mask=inside, other=0.0).to(tl.float32)
    through = tl.load(ddropped + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    normed = (unit * scale).to(dx.dtype.element_ty).to(tl.float32)
    if THRESHOLD > 0:
        kept = _kept(seed, row, part, column, SIZE, THRESHOLD)
        through = tl.where(kept, through * gain, 0.0)
        normed = tl.where(kept, normed * gain, 0.0)
    tl.store(dropped + row * WIDTH + at, normed.to(dropped.dtype.element_ty), mask=inside)
    gradient = (gradient + through) * scale
    mean = tl.sum(tl.sum(gradient * unit, 1), 0) / WIDTH
    result = rstd * (gradient - unit * mean)
    if HAS_TOTAL:
        result += tl.load(dtotal + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * WIDTH + at, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _copied(
    x, wide, dropped, wide_stride, seed, gain,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, 8)[:, None], tl.arange(0, BLOCK)[None, :]
    at, inside = part * SIZE + column, (part >= 0) & (column < SIZE)
    value = tl.load(x + row * WIDTH + at, mask=inside, other=0.0)
    tl.store(wide + row * wide_stride + at, value, mask=inside)
    if THRESHOLD > 0:
        kept = _kept(seed, row, part, column, SIZE, THRESHOLD)
        result = tl.where(kept, value.to(tl.float32) * gain, 0.0)
        tl.store(dropped + row * WIDTH + at, result.to(dropped.dtype.element_ty), mask=inside)


@triton.jit
def _copied_back(
    dwide, ddropped, x, dx, dropped, wide_stride, seed, gain,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, 8)[:, None], tl.arange(0, BLOCK)[None, :]
    at, inside = part * SIZE + column, (part >= 0) & (column < SIZE)
    gradient = tl.load(dwide + row * wide_stride + at, mask=inside, other=0.0).to(tl.float32)
    through = tl.load(ddropped + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        kept = _kept(seed, row, part, column, SIZE, THRESHOLD)
        through = tl.where(kept, through * gain, 0.0)
        value = tl.load(x + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        result = tl.where(kept, value * gain, 0.0)
        tl.store(dropped + row * WIDTH + at, result.to(dropped.dtype.element_ty), mask=inside)
    tl.store(dx + row * WIDTH + at, (gradient + through).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _gated(
    both, wide, dropped, wide_stride, seed, gain,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, 8)[:, None], tl.arange(0, BLOCK)[None, :]
    at, inside = part * SIZE + column, (part >= 0) & (column < SIZE)
    gate = tl.load(both + row * 2 * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * WIDTH + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    value = (gate * tl.sigmoid(gate) * up).to(wide.dtype.element_ty)
    tl.store(wide + row * wide_stride + at, value, mask=inside)
    if THRESHOLD > 0:
        kept = _kept(seed, row, part, column, SIZE, THRESHOLD)
        result = tl.where(kept, value.to(tl.float32) * gain, 0.0)
        tl.store(dropped + row * WIDTH + at, result.to(dropped.dtype.element_ty), mask=inside)


@triton.jit
def _gated_back(
    dwide, ddropped, both, dboth, dropped, wide_stride, seed, gain,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, 8)[:, None], tl.arange(0, BLOCK)[None, :]
    at, inside = part * SIZE + column, (part >= 0) & (column < SIZE)
    gate = tl.load(both + row * 2 * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * WIDTH + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dwide + row * wide_stride + at, mask=inside, other=0.0).to(tl.float32)
    through = tl.load(ddropped + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    value = (silu * up).to(dropped.dtype.element_ty).to(tl.float32)
    if THRESHOLD > 0:
        kept = _kept(seed, row, part, column, SIZE, THRESHOLD)
        through = tl.where(kept, through * gain, 0.0)
        value = tl.where(kept, value * gain, 0.0)
    tl.store(dropped + row * WIDTH + at, value.to(dropped.dtype.element_ty), mask=inside)
    gradient += through
    dgate = gradient * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(dboth + row * 2 * WIDTH + at, dgate.to(dboth.dtype.element_ty), mask=inside)
    tl.store(dboth + row * 2 * WIDTH + WIDTH + at, (gradient * silu).to(dboth.dtype.element_ty), mask=inside)


@triton.jit
def _rotated(
    source, target, cosines, sines, source_stride, target_stride, sign,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (column < HALF)
    at = head * 2 * HALF + column
    cosine = tl.load(cosines + row * 2 * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    sine = tl.load(sines + row * 2 * HALF + column, mask=column < HALF, other=0.0).to(tl.float32) * sign
    first = tl.load(source + row * source_stride + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + row * source_stride + at + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + row * target_stride + at, (first * cosine - second * sine).to(kind), mask=inside)
    tl.store(target + row * target_stride + at + HALF, (second * cosine + first * sine).to(kind), mask=inside)


@triton.jit
def _entropy(logits, targets, losses, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * VOCABULARY
    column = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, VOCABULARY, BLOCK):
        at = first + column
        value = tl.load(start + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, value)
        # A lane that has seen nothing yet has -inf in both places, whose difference is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.exp(value - base)
        highest = higher
    top = tl.max(highest, 0)
    norm = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    target = tl.load(targets + row)
    tl.store(losses + row, norm - tl.load(start + target).to(tl.float32))
    for first in range(0, VOCABULARY, BLOCK):
        at = first + column
        value = tl.load(start + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(value - norm) - tl.where(at == target, 1.0, 0.0)
        tl.store(start + at, gradient.to(logits.dtype.element_ty), mask=at < VOCABULARY)


@triton.jit
def _unpacked(
    packed, absmax, code, absmax_code, absmax_scale, offset, out, pairs, stride,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, ABSMAX_SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    both = tl.load(packed + pair, mask=inside, other=0)
    block = pair * 2 // SIZE
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        step = tl.load(absmax_scale + block // ABSMAX_SIZE, mask=inside, other=0.0)
        scale = tl.load(absmax_code + scale.to(tl.int32)) * step + tl.load(offset)
    first = tl.load(code + (both >> 4).to(tl.int32)) * scale
    second = tl.load(code + (both & 15).to(tl.int32)) * scale
    at = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    values = tl.interleave(first, second).to(out.dtype.element_ty)
    tl.store(out + at // WIDTH * stride + at % WIDTH, values, mask=at < 2 * pairs)


def _launch(kernel: Any, x: torch.Tensor, width: int, *arguments: Any, p: float, **options: Any) -> None:
    """Start a kernel with one program for each row of `width` columns."""
    size = width // PARTS
    block = triton.next_power_of_2(size)
    warps = min(16, max(4, block * PARTS // 512))
    kernel[(x.shape[0],)](
        *arguments, WIDTH=width, SIZE=size, BLOCK=block, THRESHOLD=round(p * 65536), num_warps=warps, **options
    )


def normed(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, wide: torch.Tensor, low: torch.Tensor,
    p: float, seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Fill `wide` with the RMS norm of x + delta (T, K) and, after dropout, its product with `low` (rank, K) transposed.

    Returns the sum (x itself without delta) and 1 / rms (T,), fp32.
    """
    width = x.shape[1]
    total = x if delta is None else torch.empty_like(x)
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dropped = torch.empty_like(x) if p else wide[:, :width]
    _launch(
        _normed, x, width, x, x if delta is None else delta, weight, total, wide, dropped, rstd,
        wide.stride(0), seed, eps, 1 / (1 - p), p=p, HAS_DELTA=delta is not None,
    )  # fmt: skip
    torch.mm(dropped, low.T, out=wide[:, width:])
    return total, rstd


def normed_back(
    dwide: torch.Tensor, low: torch.Tensor, total: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor,
    dtotal: torch.Tensor | None, p: float, seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradient of `normed`'s sum (T, K), `dtotal` included, and the normed values after dropout once more."""
    dx, dropped = torch.empty_like(total), torch.empty_like(total)
    width = total.shape[1]
    _launch(
        _normed_back, total, width, dwide, dwide[:, width:] @ low, total, rstd, weight,
        total if dtotal is None else dtotal, dx, dropped, dwide.stride(0), seed, 1 / (1 - p),
        p=p, HAS_TOTAL=dtotal is not None,
    )  # fmt: skip
    return dx, dropped


def copied(x: torch.Tensor, wide: torch.Tensor, low: torch.Tensor, p: float, seed: int) -> None:
    """Fill `wide` with x (T, K) and, after dropout, its product with `low` (rank, K) transposed."""
    dropped = torch.empty_like(x) if p else x
    _launch(_copied, x, x.shape[1], x, wide, dropped, wide.stride(0), seed, 1 / (1 - p), p=p)
    torch.mm(dropped, low.T, out=wide[:, x.shape[1] :])


def copied_back(
    dwide: torch.Tensor, low: torch.Tensor, x: torch.Tensor, p: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of `copied`'s x (T, K), and x after dropout once more."""
    dx, width = torch.empty_like(x), x.shape[1]
    dropped = torch.empty_like(x) if p else x
    ddropped = dwide[:, width:] @ low
    _launch(_copied_back, x, width, dwide, ddropped, x, dx, dropped, dwide.stride(0), seed, 1 / (1 - p), p=p)
    return dx, dropped


def gated(both: torch.Tensor, wide: torch.Tensor, low: torch.Tensor, p: float, seed: int) -> None:
    """Fill `wide` with silu(gate) × up of `both` = [gate | up] (T, 2K) and, after dropout, its product with `low` (rank, K)
    transposed."""
    width = low.shape[1]
    dropped = both.new_empty(len(both), width) if p else wide[:, :width]
    _launch(_gated, both, width, both, wide, dropped, wide.stride(0), seed, 1 / (1 - p), p=p)
    torch.mm(dropped, low.T, out=wide[:, width:])


def gated_back(
    dwide: torch.Tensor, low: torch.Tensor, both: torch.Tensor, p: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of `gated`'s [gate | up] (T, 2K), and its result after dropout once more."""
    width = low.shape[1]
    dboth, ddropped = torch.empty_like(both), dwide[:, width:] @ low
    # Each program reads its row of `ddropped` before it writes the dropped values there.
    _launch(_gated_back, both, width, dwide, ddropped, both, dboth, ddropped, dwide.stride(0), seed, 1 / (1 - p), p=p)
    return dboth, ddropped


def unpacked(weight: Any, out: torch.Tensor) -> None:
    """The values of a 4-bit weight of bitsandbytes (N, K) into `out`, whose rows may be longer than K; the same bits as
    its own `dequantize_4bit` gives, in one pass."""
    state = weight.quant_state
    nested = state.nested
    pairs = weight.numel()
    _unpacked[(triton.cdiv(pairs, 1024),)](
        weight, state.absmax, state.code, state.state2.code if nested else state.code,
        state.state2.absmax if nested else state.absmax, state.offset if nested else state.absmax, out, pairs, out.stride(0),
        WIDTH=out.shape[1], SIZE=state.blocksize, ABSMAX_SIZE=state.state2.blocksize if nested else 1, NESTED=nested,
        BLOCK=1024,
        enable_fp_fusion=False,  # a product and a sum that become one operation are rounded once less
    )  # fmt: skip


def rotated(
    source: torch.Tensor, target: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, heads: int, backward: bool
) -> None:
    """Rotary embedding of the first `heads` heads of each row of `source` into those of `target`, which may be the same;
    `cosines` and `sines` are (T, head size), with equal halves. `backward` turns the other way."""
    half = cosines.shape[1] // 2
    _rotated[(len(source),)](
        source, target, cosines, sines, source.stride(0), target.stride(0), -1.0 if backward else 1.0,
        HEADS=heads, HEADS_BLOCK=triton.next_power_of_2(heads), HALF=half, HALF_BLOCK=triton.next_power_of_2(half),
    )  # fmt: skip


def entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row (N,), fp32; `logits` (N, vocabulary) become its gradient."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _entropy[(len(logits),)](logits, targets, losses, VOCABULARY=logits.shape[1], BLOCK=8192, num_warps=16)
    return losses
