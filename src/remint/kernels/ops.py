"""What lies between the matrix products of a decoder layer, each in one pass over memory: Triton kernels for a GPU.

Rows are tokens. A `wide` tensor holds the K columns of a product's input followed by those of LoRA's low-rank part, so some
operations read or write the first K columns of longer rows. Sums are in fp32 and in a fixed order, without atomics. A
dropout mask is a function of seed, row and column: it is drawn again in the backward pass and never kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

# One draw of four 32-bit words decides, by 16 bits each, for so many neighbouring columns.
GROUP = 8
# Into how many sums, at most, the gradient of a low-rank matrix is split.
SHARES = 8
# Philox keeps passing the usual batteries with seven rounds (Salmon et al. 2011).
_ROUNDS = tl.constexpr(7)


@triton.jit
def _kept(seed, row, group, GROUPS: tl.constexpr, THRESHOLD: tl.constexpr):
    """Which elements live, (rows, 8 × groups) of bool, for `row` (rows, 1) and `group` (1, groups)."""
    a, b, c, d = tl.randint4x(seed, (row * GROUPS + group).to(tl.int32), n_rounds=_ROUNDS)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.interleave(words & 0xFFFF, (words >> 16) & 0xFFFF) >= THRESHOLD


@triton.jit
def _normed(
    x, delta, weight, total, wide, dropped, rstds, wide_stride, seed, eps, gain,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, group = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK // 8)[None, :]
    inside = at < WIDTH
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
        kept = _kept(seed, row, group, WIDTH // 8, THRESHOLD)
        result = tl.where(kept, normed.to(tl.float32) * gain, 0.0)
        tl.store(dropped + row * WIDTH + at, result.to(dropped.dtype.element_ty), mask=inside)


@triton.jit
def _normed_back(
    dwide, ddropped, total, rstds, weight, dtotal, dx, dropped, wide_stride, seed, gain,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, group = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK // 8)[None, :]
    inside = at < WIDTH
    rstd = tl.load(rstds + row)
    unit = tl.load(total + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32) * rstd
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dwide + row * wide_stride + at, mask=inside, other=0.0).to(tl.float32)
    through = tl.load(ddropped + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    normed = (unit * scale).to(dx.dtype.element_ty).to(tl.float32)
    if THRESHOLD > 0:
        kept = _kept(seed, row, group, WIDTH // 8, THRESHOLD)
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
def _filled(
    source, low, wide, lows, wide_stride, rows, seed, gain,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, IS_GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program has some rows and goes through their columns, so the low-rank product costs no pass of its own.
    row, rank = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, RANK_BLOCK)
    kind = wide.dtype.element_ty
    product = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < WIDTH)
        if IS_GATED:
            gate = tl.load(source + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(source + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            value = (gate * tl.sigmoid(gate) * up).to(kind)
        else:
            value = tl.load(source + row * WIDTH + column, mask=inside, other=0.0)
        tl.store(wide + row * wide_stride + column, value, mask=inside)
        if THRESHOLD > 0:
            kept = _kept(seed, row, first // 8 + tl.arange(0, COLUMNS // 8)[None, :], WIDTH // 8, THRESHOLD)
            value = tl.where(kept, value.to(tl.float32) * gain, 0.0).to(kind)
        known = (rank[:, None] < RANK) & (column < WIDTH)
        weight = tl.load(low + rank[:, None] * WIDTH + column, mask=known, other=0.0)
        product += tl.dot(value, tl.trans(weight), input_precision="ieee")
    known = (row < rows) & (rank[None, :] < RANK)
    tl.store(wide + row * wide_stride + WIDTH + rank[None, :], product.to(kind), mask=known)
    tl.store(lows + row * RANK + rank[None, :], product.to(kind), mask=known)


@triton.jit
def _filled_back(
    dwide, source, low, dsource, ddowns, wide_stride, rows, share, seed, gain,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, IS_GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program has some columns and goes through a share of the rows, so the gradient of `low` is summed on the way.
    column, rank = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :], tl.arange(0, RANK_BLOCK)
    group = tl.program_id(0) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
    kind = dsource.dtype.element_ty
    known = (rank[:, None] < RANK) & (column < WIDTH)
    weight = tl.load(low + rank[:, None] * WIDTH + column, mask=known, other=0.0)
    ddown = tl.zeros((RANK_BLOCK, COLUMNS), tl.float32)
    begin = tl.program_id(1) * share
    for first in range(begin, tl.minimum(begin + share, rows), ROWS):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < rows) & (column < WIDTH)
        at_low = dwide + row * wide_stride + WIDTH + rank[None, :]
        dlow = tl.load(at_low, mask=(row < rows) & (rank[None, :] < RANK), other=0.0)
        gradient = tl.load(dwide + row * wide_stride + column, mask=inside, other=0.0).to(tl.float32)
        through = tl.dot(dlow, weight, input_precision="ieee")
        if IS_GATED:
            gate = tl.load(source + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(source + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            value = (silu * up).to(kind)
        else:
            value = tl.load(source + row * WIDTH + column, mask=inside, other=0.0)
        if THRESHOLD > 0:
            kept = _kept(seed, row, group, WIDTH // 8, THRESHOLD)
            through = tl.where(kept, through * gain, 0.0)
            value = tl.where(kept, value.to(tl.float32) * gain, 0.0).to(kind)
        ddown += tl.dot(tl.trans(dlow), value, input_precision="ieee")
        gradient += through
        if IS_GATED:
            dgate = gradient * up * (sigmoid + silu * (1 - sigmoid))
            tl.store(dsource + row * 2 * WIDTH + column, dgate.to(kind), mask=inside)
            tl.store(dsource + row * 2 * WIDTH + WIDTH + column, (gradient * silu).to(kind), mask=inside)
        else:
            tl.store(dsource + row * WIDTH + column, gradient.to(kind), mask=inside)
    tl.store(ddowns + (tl.program_id(1) * RANK + rank[:, None]).to(tl.int64) * WIDTH + column, ddown, mask=known)


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
def _unpacked_row(
    packed, absmax, absmax_scale, offset, up, code, absmax_code, out, row, first_low,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, ABSMAX_SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < WIDTH // 2
    at = row * (WIDTH // 2) + pair
    both = tl.load(packed + at, mask=inside, other=0)
    block = at * 2 // SIZE
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        step = tl.load(absmax_scale + block // ABSMAX_SIZE, mask=inside, other=0.0)
        scale = tl.load(absmax_code + scale.to(tl.int32)) * step + tl.load(offset)
    first = tl.load(code + (both >> 4).to(tl.int32)) * scale
    second = tl.load(code + (both & 15).to(tl.int32)) * scale
    column = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    kind = out.dtype.element_ty
    tl.store(out + column, tl.interleave(first, second).to(kind), mask=column < WIDTH)
    if tl.program_id(1) == 0:
        rank = tl.arange(0, RANK_BLOCK)
        value = tl.load(up + row * RANK + rank, mask=rank < RANK, other=0.0)
        tl.store(out + WIDTH + first_low + rank, value.to(kind), mask=rank < RANK)


@triton.jit
def _unpacked(
    packed0, absmax0, scale0, offset0, up0, packed1, absmax1, scale1, offset1, up1, packed2, absmax2, scale2, offset2, up2,
    code, absmax_code, out, stride, end0, end1,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, ABSMAX_SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    to = out + row * stride
    if row < end0:
        _unpacked_row(
            packed0, absmax0, scale0, offset0, up0, code, absmax_code, to, row, 0,
            WIDTH, RANK, RANK_BLOCK, SIZE, ABSMAX_SIZE, NESTED, BLOCK,
        )  # fmt: skip
    elif row < end1:
        _unpacked_row(
            packed1, absmax1, scale1, offset1, up1, code, absmax_code, to, row - end0, RANK,
            WIDTH, RANK, RANK_BLOCK, SIZE, ABSMAX_SIZE, NESTED, BLOCK,
        )  # fmt: skip
    else:
        _unpacked_row(
            packed2, absmax2, scale2, offset2, up2, code, absmax_code, to, row - end1, 2 * RANK,
            WIDTH, RANK, RANK_BLOCK, SIZE, ABSMAX_SIZE, NESTED, BLOCK,
        )  # fmt: skip


def _launch(kernel: Any, x: torch.Tensor, width: int, *arguments: Any, p: float, **options: Any) -> None:
    """Start a kernel with one program for each row of `width` columns."""
    block = triton.next_power_of_2(width)
    warps = min(16, max(4, block // 512))
    kernel[(x.shape[0],)](*arguments, WIDTH=width, BLOCK=block, THRESHOLD=_threshold(p), num_warps=warps, **options)


def _threshold(p: float) -> int:
    return round(p * 65536)


def _tile(low: torch.Tensor, p: float, is_gated: bool) -> dict[str, Any]:
    """Constants of the kernels that fill a product's input; fewer columns where four bytes make an element."""
    rank, width = low.shape
    return {
        "WIDTH": width,
        "RANK": rank,
        "RANK_BLOCK": max(16, triton.next_power_of_2(rank)),
        "THRESHOLD": _threshold(p),
        "IS_GATED": is_gated,
        "ROWS": 64,
        "COLUMNS": 64 if low.element_size() == 2 else 32,
        "num_warps": 4,
    }


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
        _normed, x, width, x, x if delta is None else delta, weight, total, wide, dropped, rstd,
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
        _normed_back, total, width, dwide, dwide[:, width:] @ low, total, rstd, weight,
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
    """Fill `wide` with silu(gate) × up of `both` = [gate | up] (T, 2K) and, after dropout, its product with `low` (rank, K)
    transposed, which is returned as well."""
    return _fill(both, wide, low, p, seed, True)


def gated_back(
    dwide: torch.Tensor, low: torch.Tensor, both: torch.Tensor, p: float, seed: int, into: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `gated`'s [gate | up] (T, 2K) and of `low`, fp32. The first comes `into` a tensor if given, which may be
    `both` itself: each element is read before it is written."""
    return _fill_back(dwide, low, both, p, seed, True, into)


def _fill(
    source: torch.Tensor, wide: torch.Tensor, low: torch.Tensor, p: float, seed: int, is_gated: bool
) -> torch.Tensor:
    tile, lows = _tile(low, p, is_gated), source.new_empty(len(source), len(low))
    grid = (triton.cdiv(len(source), tile["ROWS"]),)
    _filled[grid](source, low, wide, lows, wide.stride(0), len(source), seed, 1 / (1 - p), num_stages=3, **tile)
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
    tile = _tile(low, p, is_gated)
    rows, (rank, width) = len(source), low.shape
    # Shares of the rows, so that a GPU is busy also where there are few columns; a number that no device decides.
    share = triton.cdiv(triton.cdiv(rows, SHARES), tile["ROWS"]) * tile["ROWS"]
    dsource = torch.empty_like(source) if into is None else into
    ddowns = torch.empty(triton.cdiv(rows, share), rank, width, dtype=torch.float32, device=low.device)
    grid = (triton.cdiv(width, tile["COLUMNS"]), len(ddowns))
    _filled_back[grid](
        dwide, source, low, dsource, ddowns, dwide.stride(0), rows, share, seed, 1 / (1 - p), num_stages=1, **tile
    )
    return dsource, ddowns.sum(0)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32, also of factors in half of that."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize == 2 else torch.mm(a, b)


def unpacked(weights: Sequence[Any], ups: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """The values of up to three 4-bit weights of bitsandbytes (Nᵢ, K) below one another into the first K columns of `out`, and
    of each one's `ups` (Nᵢ, rank) into rank columns of its own after those; the rest of `out` stays.

    The values have the same bits as those of bitsandbytes' own `dequantize_4bit`.
    """
    states = [weight.quant_state for weight in weights]
    nested, rank = states[0].nested, ups[0].shape[1]
    width = out.shape[1] - len(ups) * rank
    sources = [
        (weight, state.absmax, state.state2.absmax, state.offset, up)
        if nested
        else (weight, state.absmax, state.absmax, state.absmax, up)
        for weight, state, up in zip(weights, states, ups, strict=True)
    ]
    ends = [sum(len(up) for up in ups[: count + 1]) for count in range(len(ups))]
    sources, ends = sources + sources[:1] * (3 - len(ups)), ends + ends[-1:] * (3 - len(ups))
    block = min(1024, triton.next_power_of_2(width // 2))
    _unpacked[(len(out), triton.cdiv(width // 2, block))](
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
    _rotated[(len(source),)](
        source, target, cosines, sines, source.stride(0), target.stride(0), -1.0 if backward else 1.0,
        HEADS=heads, HEADS_BLOCK=triton.next_power_of_2(heads), HALF=half, HALF_BLOCK=triton.next_power_of_2(half),
    )  # fmt: skip


def entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row (N,), fp32; `logits` (N, vocabulary) become its gradient."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _entropy[(len(logits),)](logits, targets, losses, VOCABULARY=logits.shape[1], BLOCK=8192, num_warps=16)
    return losses
