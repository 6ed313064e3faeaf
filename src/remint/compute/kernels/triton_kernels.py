"""The Triton kernels of `ops`, which documents and launches them.

Sums are in fp32, in a fixed order, without atomics. Arguments that change from step to step are not specialized:
otherwise Triton would compile a second variant for values divisible by 16.
"""

import triton
import triton.language as tl

# Philox passes the usual statistical test suites with seven rounds (Salmon et al. 2011), fewer than its default of ten.
_ROUNDS = tl.constexpr(7)


@triton.jit
def _keep_mask(seed, row, group, GROUPS: tl.constexpr, THRESHOLD: tl.constexpr):
    """Dropout mask, bool (rows, 8 × groups), true for kept elements; `row` is (rows, 1), `group` is (1, groups)."""
    a, b, c, d = tl.randint4x(seed, (row * GROUPS + group).to(tl.int32), n_rounds=_ROUNDS)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.interleave(words & 0xFFFF, (words >> 16) & 0xFFFF) >= THRESHOLD


@triton.jit(do_not_specialize=["seed"])
def add_rms_norm(
    x, delta, weight, total, extended, dropped, rstds, extended_stride, seed, eps, gain,
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
    normed = scaled.to(extended.dtype.element_ty)
    tl.store(extended + row * extended_stride + at, normed, mask=inside)
    if THRESHOLD > 0:
        keep = _keep_mask(seed, row, group, WIDTH // 8, THRESHOLD)
        result = tl.where(keep, normed.to(tl.float32) * gain, 0.0)
        tl.store(dropped + row * WIDTH + at, result.to(dropped.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def add_rms_norm_backward(
    dextended, ddropped, total, rstds, weight, dtotal, dx, dropped, extended_stride, seed, gain,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, group = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK // 8)[None, :]
    inside = at < WIDTH
    rstd = tl.load(rstds + row)
    unit = tl.load(total + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32) * rstd
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dextended + row * extended_stride + at, mask=inside, other=0.0).to(tl.float32)
    through = tl.load(ddropped + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    normed = (unit * scale).to(dx.dtype.element_ty).to(tl.float32)
    if THRESHOLD > 0:
        keep = _keep_mask(seed, row, group, WIDTH // 8, THRESHOLD)
        through = tl.where(keep, through * gain, 0.0)
        normed = tl.where(keep, normed * gain, 0.0)
    tl.store(dropped + row * WIDTH + at, normed.to(dropped.dtype.element_ty), mask=inside)
    gradient = (gradient + through) * scale
    mean = tl.sum(tl.sum(gradient * unit, 1), 0) / WIDTH
    result = rstd * (gradient - unit * mean)
    if HAS_TOTAL:
        result += tl.load(dtotal + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * WIDTH + at, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed"])
def fill_extended(
    source, lora_a, extended, low_rank, extended_stride, rows, seed, gain,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, IS_GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program owns some rows and loops over their columns, so the low-rank product needs no extra pass over memory.
    row, rank = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, RANK_BLOCK)
    kind = extended.dtype.element_ty
    product = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < WIDTH)
        if IS_GATED:
            gate = tl.load(source + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            mlp_up = tl.load(source + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            value = (gate * tl.sigmoid(gate) * mlp_up).to(kind)
        else:
            value = tl.load(source + row * WIDTH + column, mask=inside, other=0.0)
        tl.store(extended + row * extended_stride + column, value, mask=inside)
        if THRESHOLD > 0:
            keep = _keep_mask(seed, row, first // 8 + tl.arange(0, COLUMNS // 8)[None, :], WIDTH // 8, THRESHOLD)
            value = tl.where(keep, value.to(tl.float32) * gain, 0.0).to(kind)
        known = (rank[:, None] < RANK) & (column < WIDTH)
        lora_a_tile = tl.load(lora_a + rank[:, None] * WIDTH + column, mask=known, other=0.0)
        product += tl.dot(value, tl.trans(lora_a_tile), input_precision="ieee")
    known = (row < rows) & (rank[None, :] < RANK)
    tl.store(extended + row * extended_stride + WIDTH + rank[None, :], product.to(kind), mask=known)
    tl.store(low_rank + row * RANK + rank[None, :], product.to(kind), mask=known)


@triton.jit(do_not_specialize=["rows", "share", "seed"])
def fill_extended_backward(
    dextended, source, lora_a, dsource, dlora_a_parts, extended_stride, rows, share, seed, gain,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, IS_GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program owns some columns and loops over a share of the rows, so it can sum the gradient of `lora_a` on the way.
    # All loads come before the first product: a load after it would make the program wait for memory a second time.
    column, rank = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :], tl.arange(0, RANK_BLOCK)
    group = tl.program_id(0) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
    kind = dsource.dtype.element_ty
    known = (rank[:, None] < RANK) & (column < WIDTH)
    lora_a_tile = tl.load(lora_a + rank[:, None] * WIDTH + column, mask=known, other=0.0)
    dlora_a = tl.zeros((RANK_BLOCK, COLUMNS), tl.float32)
    begin = tl.program_id(1) * share
    for first in tl.range(begin, tl.minimum(begin + share, rows), ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < rows) & (column < WIDTH)
        at_low_rank = dextended + row * extended_stride + WIDTH + rank[None, :]
        dlow_rank = tl.load(at_low_rank, mask=(row < rows) & (rank[None, :] < RANK), other=0.0)
        gradient = tl.load(dextended + row * extended_stride + column, mask=inside, other=0.0)
        if IS_GATED:
            gate = tl.load(source + row * 2 * WIDTH + column, mask=inside, other=0.0)
            mlp_up = tl.load(source + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0)
            gate, mlp_up = gate.to(tl.float32), mlp_up.to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            value = (silu * mlp_up).to(kind)
        else:
            value = tl.load(source + row * WIDTH + column, mask=inside, other=0.0)
        through = tl.dot(dlow_rank, lora_a_tile, input_precision="ieee")
        if THRESHOLD > 0:
            keep = _keep_mask(seed, row, group, WIDTH // 8, THRESHOLD)
            through = tl.where(keep, through * gain, 0.0)
            value = tl.where(keep, value.to(tl.float32) * gain, 0.0).to(kind)
        dlora_a += tl.dot(tl.trans(dlow_rank), value, input_precision="ieee")
        gradient = gradient.to(tl.float32) + through
        if IS_GATED:
            dgate = gradient * mlp_up * (sigmoid + silu * (1 - sigmoid))
            tl.store(dsource + row * 2 * WIDTH + column, dgate.to(kind), mask=inside)
            tl.store(dsource + row * 2 * WIDTH + WIDTH + column, (gradient * silu).to(kind), mask=inside)
        else:
            tl.store(dsource + row * WIDTH + column, gradient.to(kind), mask=inside)
    tl.store(
        dlora_a_parts + (tl.program_id(1) * RANK + rank[:, None]).to(tl.int64) * WIDTH + column, dlora_a, mask=known
    )


@triton.jit
def apply_rope(
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
def _log_sum_exp(start, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, VOCABULARY, BLOCK):
        at = first + column
        value = tl.load(start + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, value)
        # A lane without any value so far has -inf in both operands, and their difference would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.exp(value - base)
        highest = higher
    top = tl.max(highest, 0)
    return top + tl.log(tl.sum(total * tl.exp(highest - top), 0))


@triton.jit
def cross_entropy_and_grad(logits, targets, losses, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * VOCABULARY
    column = tl.arange(0, BLOCK)
    norm = _log_sum_exp(start, VOCABULARY, BLOCK)
    target = tl.load(targets + row)
    tl.store(losses + row, norm - tl.load(start + target).to(tl.float32))
    for first in range(0, VOCABULARY, BLOCK):
        at = first + column
        value = tl.load(start + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(value - norm) - tl.where(at == target, 1.0, 0.0)
        tl.store(start + at, gradient.to(logits.dtype.element_ty), mask=at < VOCABULARY)


@triton.jit
def divergence_and_grad(
    logits, ids, log_probs, losses,
    VOCABULARY: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * VOCABULARY
    column = tl.arange(0, BLOCK)
    norm = _log_sum_exp(start, VOCABULARY, BLOCK)
    likely = row * TOP + tl.arange(0, TOP)
    chosen = start + tl.load(ids + likely)
    base = tl.load(log_probs + likely)
    model = tl.load(chosen).to(tl.float32) - norm
    base_rest = tl.maximum(1 - tl.sum(tl.exp(base), 0), LEAST)
    model_rest = tl.maximum(1 - tl.sum(tl.exp(model), 0), LEAST)
    loss = tl.sum(tl.exp(base) * (base - model), 0) + base_rest * (tl.log(base_rest) - tl.log(model_rest))
    tl.store(losses + row, loss)
    for first in range(0, VOCABULARY, BLOCK):
        at = first + column
        value = tl.load(start + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(value - norm) * (1 - base_rest / model_rest)
        tl.store(start + at, gradient.to(logits.dtype.element_ty), mask=at < VOCABULARY)
    tl.debug_barrier()  # other threads of the program wrote to the same addresses
    tl.store(chosen, (tl.exp(model) - tl.exp(base)).to(logits.dtype.element_ty))


@triton.jit
def _dequantize_row(
    packed, absmax, absmax_scale, offset, lora_b, code, absmax_code, out, row, lora_column,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, ABSMAX_SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < WIDTH // 2
    at = row * (WIDTH // 2) + pair
    byte = tl.load(packed + at, mask=inside, other=0)
    block = at * 2 // SIZE
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        step = tl.load(absmax_scale + block // ABSMAX_SIZE, mask=inside, other=0.0)
        scale = tl.load(absmax_code + scale.to(tl.int32)) * step + tl.load(offset)
    first = tl.load(code + (byte >> 4).to(tl.int32)) * scale
    second = tl.load(code + (byte & 15).to(tl.int32)) * scale
    column = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    kind = out.dtype.element_ty
    tl.store(out + column, tl.interleave(first, second).to(kind), mask=column < WIDTH)
    if tl.program_id(1) == 0:
        rank = tl.arange(0, RANK_BLOCK)
        value = tl.load(lora_b + row * RANK + rank, mask=rank < RANK, other=0.0)
        tl.store(out + WIDTH + lora_column + rank, value.to(kind), mask=rank < RANK)


@triton.jit
def dequantize_into(
    packed0, absmax0, scale0, offset0, lora_b0, packed1, absmax1, scale1, offset1, lora_b1,
    packed2, absmax2, scale2, offset2, lora_b2, code, absmax_code, out, stride, end0, end1,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, ABSMAX_SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    to = out + row * stride
    if row < end0:
        _dequantize_row(
            packed0, absmax0, scale0, offset0, lora_b0, code, absmax_code, to, row, 0,
            WIDTH, RANK, RANK_BLOCK, SIZE, ABSMAX_SIZE, NESTED, BLOCK,
        )  # fmt: skip
    elif row < end1:
        _dequantize_row(
            packed1, absmax1, scale1, offset1, lora_b1, code, absmax_code, to, row - end0, RANK,
            WIDTH, RANK, RANK_BLOCK, SIZE, ABSMAX_SIZE, NESTED, BLOCK,
        )  # fmt: skip
    else:
        _dequantize_row(
            packed2, absmax2, scale2, offset2, lora_b2, code, absmax_code, to, row - end1, 2 * RANK,
            WIDTH, RANK, RANK_BLOCK, SIZE, ABSMAX_SIZE, NESTED, BLOCK,
        )  # fmt: skip
