"""Causal attention inside each document of a packed batch, for a GPU (flash attention, Dao 2023), in Triton.

Tiles of 64 tokens suit the short documents of instruction data; key-value heads that serve several query heads are read as
they are, and their gradients are summed in registers. No atomics: the bytes are the same every time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE = 64
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tiles:
    """The documents of a batch in pieces of at most TILE tokens, int32 each (pieces,): where the document begins and ends, and
    where the piece begins. Surplus pieces are empty."""

    first: torch.Tensor
    end: torch.Tensor
    begin: torch.Tensor


def tiles(starts: torch.Tensor, tokens: int) -> Tiles:
    """The pieces of documents that begin at `starts` (documents + 1,). Nothing is asked of the device."""
    counts = (starts.diff() + TILE - 1) // TILE
    upto = counts.cumsum(0)
    number = torch.arange(tokens // TILE + len(counts), device=starts.device)
    document = torch.searchsorted(upto, number, right=True)
    known = document < len(counts)
    document = document.clamp_(max=len(counts) - 1)
    first, end = starts[document], starts[document + 1]
    begin = first + (number - upto[document] + counts[document]) * TILE
    return Tiles(first, torch.where(known, end, 0).int(), torch.where(known, begin, 0).int())


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    qkv, out, norms, firsts, ends, begins, stride, tokens, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first, end, begin = (
        tl.load(firsts + tl.program_id(0)),
        tl.load(ends + tl.program_id(0)),
        tl.load(begins + tl.program_id(0)),
    )
    if begin >= end:
        return
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    row, column = begin + tl.arange(0, TILE), tl.arange(0, BLOCK)
    inside = (row[:, None] < end) & (column[None, :] < SIZE)
    at = row[:, None].to(tl.int64) * stride + column[None, :]
    q = tl.load(qkv + at + head * SIZE, mask=inside, other=0.0)
    mixed = tl.zeros((TILE, BLOCK), tl.float32)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for other in range(first, begin + TILE, TILE):
        key = other + tl.arange(0, TILE)
        there = (key[:, None] < end) & (column[None, :] < SIZE)
        to = key[:, None].to(tl.int64) * stride + column[None, :]
        k = tl.load(qkv + to + (HEADS + kv_head) * SIZE, mask=there, other=0.0)
        v = tl.load(qkv + to + (HEADS + KV_HEADS + kv_head) * SIZE, mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        score = tl.where((key[None, :] <= row[:, None]) & (key[None, :] < end), score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        highest = higher
    mixed = mixed / total[:, None]
    to_out = (row[:, None].to(tl.int64) * HEADS + head) * SIZE + column[None, :]
    tl.store(out + to_out, mixed.to(out.dtype.element_ty), mask=inside)
    tl.store(norms + head * tokens + row, highest + tl.log2(total), mask=row < end)


@triton.jit(do_not_specialize=["tokens"])
def _back_queries(
    qkv, out, dout, norms, inner, dqkv, firsts, ends, begins, stride, tokens, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first, end, begin = (
        tl.load(firsts + tl.program_id(0)),
        tl.load(ends + tl.program_id(0)),
        tl.load(begins + tl.program_id(0)),
    )
    if begin >= end:
        return
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    row, column = begin + tl.arange(0, TILE), tl.arange(0, BLOCK)
    inside = (row[:, None] < end) & (column[None, :] < SIZE)
    at = row[:, None].to(tl.int64) * stride + head * SIZE + column[None, :]
    at_out = (row[:, None].to(tl.int64) * HEADS + head) * SIZE + column[None, :]
    q = tl.load(qkv + at, mask=inside, other=0.0)
    do = tl.load(dout + at_out, mask=inside, other=0.0)
    o = tl.load(out + at_out, mask=inside, other=0.0)
    norm = tl.load(norms + head * tokens + row, mask=row < end, other=0.0)
    dot = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(inner + head * tokens + row, dot, mask=row < end)
    dq = tl.zeros((TILE, BLOCK), tl.float32)
    for other in range(first, begin + TILE, TILE):
        key = other + tl.arange(0, TILE)
        there = (key[:, None] < end) & (column[None, :] < SIZE)
        to = key[:, None].to(tl.int64) * stride + column[None, :]
        k = tl.load(qkv + to + (HEADS + kv_head) * SIZE, mask=there, other=0.0)
        v = tl.load(qkv + to + (HEADS + KV_HEADS + kv_head) * SIZE, mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        weight = tl.exp2(score - norm[:, None])
        weight = tl.where((key[None, :] <= row[:, None]) & (key[None, :] < end), weight, 0.0)
        dscore = weight * (tl.dot(do, tl.trans(v), input_precision="ieee") - dot[:, None])
        dq += tl.dot(dscore.to(k.dtype), k, input_precision="ieee")
    tl.store(dqkv + at, (dq * scale).to(dqkv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _back_keys(
    qkv, dout, norms, inner, dqkv, firsts, ends, begins, stride, tokens, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    end, begin = tl.load(ends + tl.program_id(0)), tl.load(begins + tl.program_id(0))
    if begin >= end:
        return
    kv_head = tl.program_id(1)
    key, column = begin + tl.arange(0, TILE), tl.arange(0, BLOCK)
    inside = (key[:, None] < end) & (column[None, :] < SIZE)
    at = key[:, None].to(tl.int64) * stride + column[None, :]
    at_k, at_v = at + (HEADS + kv_head) * SIZE, at + (HEADS + KV_HEADS + kv_head) * SIZE
    k, v = tl.load(qkv + at_k, mask=inside, other=0.0), tl.load(qkv + at_v, mask=inside, other=0.0)
    dk, dv = tl.zeros((TILE, BLOCK), tl.float32), tl.zeros((TILE, BLOCK), tl.float32)
    for member in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + member
        for other in range(begin, end, TILE):
            row = other + tl.arange(0, TILE)
            there = (row[:, None] < end) & (column[None, :] < SIZE)
            q = tl.load(qkv + row[:, None].to(tl.int64) * stride + head * SIZE + column[None, :], mask=there, other=0.0)
            to = (row[:, None].to(tl.int64) * HEADS + head) * SIZE + column[None, :]
            do = tl.load(dout + to, mask=there, other=0.0)
            norm = tl.load(norms + head * tokens + row, mask=row < end, other=0.0)
            dot = tl.load(inner + head * tokens + row, mask=row < end, other=0.0)
            # Scores of keys by queries: no operand of the sums below has to be transposed.
            score = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2E)
            weight = tl.exp2(score - norm[None, :])
            weight = tl.where((key[:, None] <= row[None, :]) & (row[None, :] < end), weight, 0.0)
            dv += tl.dot(weight.to(do.dtype), do, input_precision="ieee")
            dscore = weight * (tl.dot(v, tl.trans(do), input_precision="ieee") - dot[None, :])
            dk += tl.dot(dscore.to(q.dtype), q, input_precision="ieee")
    tl.store(dqkv + at_k, (dk * scale).to(dqkv.dtype.element_ty), mask=inside)
    tl.store(dqkv + at_v, dv.to(dqkv.dtype.element_ty), mask=inside)


def mixed(
    qkv: torch.Tensor, pieces: Tiles, heads: int, kv_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries, keys and values side by side in rows (T, (heads + 2 kv_heads) × size): its result
    (T, heads × size), and the base-2 logarithms of its norms (heads, T), fp32."""
    size = qkv.shape[1] // (heads + 2 * kv_heads)
    out = qkv.new_empty(len(qkv), heads * size)
    norms = torch.empty(heads, len(qkv), dtype=torch.float32, device=qkv.device)
    _forward[(len(pieces.begin), heads)](
        qkv,
        out,
        norms,
        pieces.first,
        pieces.end,
        pieces.begin,
        qkv.stride(0),
        len(qkv),
        scale,
        **_shape(heads, kv_heads, size),
    )
    return out, norms


def mixed_back(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, norms: torch.Tensor, pieces: Tiles,
    heads: int, kv_heads: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Gradient of `mixed`'s qkv."""
    size = qkv.shape[1] // (heads + 2 * kv_heads)
    dqkv, inner = torch.empty_like(qkv), torch.empty_like(norms)
    places = pieces.first, pieces.end, pieces.begin, qkv.stride(0), len(qkv), scale
    shape = _shape(heads, kv_heads, size)
    _back_queries[(len(pieces.begin), heads)](qkv, out, dout, norms, inner, dqkv, *places, **shape)
    _back_keys[(len(pieces.begin), kv_heads)](qkv, dout, norms, inner, dqkv, *places, **shape)
    return dqkv


def _shape(heads: int, kv_heads: int, size: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(size))
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "SIZE": size,
        "BLOCK": block,
        "TILE": TILE,
        "num_warps": 4,
        "num_stages": 1,
    }
