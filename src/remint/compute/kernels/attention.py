"""Causal attention inside each document of a packed batch, in Triton for a GPU (flash attention, Dao 2023).

Tiles of 64 tokens suit the short documents of instruction data. A key-value head that serves several query heads
(grouped-query attention) is never repeated in memory, and its gradients are summed in registers. There are no atomics,
so the result has the same bytes every time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE = 64
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tiles:
    """The documents of a batch, split into tiles of at most TILE tokens.

    Each tensor is int32 of shape (tiles,): for each tile, the start and end of its document and the start of the tile,
    all as positions in the flattened batch. Surplus tiles are empty (start 0, end 0).
    """

    document_start: torch.Tensor
    document_end: torch.Tensor
    tile_start: torch.Tensor


def make_tiles(starts: torch.Tensor, tokens: int) -> Tiles:
    """Split documents into tiles; `starts` (documents + 1,) are their starts and the end of the batch.

    The number of tiles is an upper bound that the host computes from shapes alone, so there is no host-device sync.
    """
    counts = (starts.diff() + TILE - 1) // TILE
    upto = counts.cumsum(0)
    number = torch.arange(tokens // TILE + len(counts), device=starts.device)
    document = torch.searchsorted(upto, number, right=True)
    known = document < len(counts)
    document = document.clamp_(max=len(counts) - 1)
    document_start, document_end = starts[document], starts[document + 1]
    tile_start = document_start + (number - upto[document] + counts[document]) * TILE
    return Tiles(document_start, torch.where(known, document_end, 0).int(), torch.where(known, tile_start, 0).int())


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    qkv, out, lse, document_starts, document_ends, tile_starts, stride, tokens, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    document_start, document_end, tile_start = (
        tl.load(document_starts + tl.program_id(0)),
        tl.load(document_ends + tl.program_id(0)),
        tl.load(tile_starts + tl.program_id(0)),
    )
    if tile_start >= document_end:
        return
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    row, column = tile_start + tl.arange(0, TILE), tl.arange(0, BLOCK)
    inside = (row[:, None] < document_end) & (column[None, :] < SIZE)
    at = row[:, None].to(tl.int64) * stride + column[None, :]
    q = tl.load(qkv + at + head * SIZE, mask=inside, other=0.0)
    acc = tl.zeros((TILE, BLOCK), tl.float32)
    row_max = tl.full((TILE,), float("-inf"), tl.float32)
    row_sum = tl.zeros((TILE,), tl.float32)
    for other in range(document_start, tile_start + TILE, TILE):
        key = other + tl.arange(0, TILE)
        other_inside = (key[:, None] < document_end) & (column[None, :] < SIZE)
        to = key[:, None].to(tl.int64) * stride + column[None, :]
        k = tl.load(qkv + to + (HEADS + kv_head) * SIZE, mask=other_inside, other=0.0)
        v = tl.load(qkv + to + (HEADS + KV_HEADS + kv_head) * SIZE, mask=other_inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        score = tl.where((key[None, :] <= row[:, None]) & (key[None, :] < document_end), score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        weight = tl.exp2(score - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weight, 1)
        acc = acc * rescale[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        row_max = new_max
    acc = acc / row_sum[:, None]
    to_out = (row[:, None].to(tl.int64) * HEADS + head) * SIZE + column[None, :]
    tl.store(out + to_out, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head * tokens + row, row_max + tl.log2(row_sum), mask=row < document_end)


@triton.jit(do_not_specialize=["tokens"])
def _backward_dq_kernel(
    qkv, out, dout, lse, deltas, dqkv, document_starts, document_ends, tile_starts, stride, tokens, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    document_start, document_end, tile_start = (
        tl.load(document_starts + tl.program_id(0)),
        tl.load(document_ends + tl.program_id(0)),
        tl.load(tile_starts + tl.program_id(0)),
    )
    if tile_start >= document_end:
        return
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    row, column = tile_start + tl.arange(0, TILE), tl.arange(0, BLOCK)
    inside = (row[:, None] < document_end) & (column[None, :] < SIZE)
    at = row[:, None].to(tl.int64) * stride + head * SIZE + column[None, :]
    at_out = (row[:, None].to(tl.int64) * HEADS + head) * SIZE + column[None, :]
    q = tl.load(qkv + at, mask=inside, other=0.0)
    do = tl.load(dout + at_out, mask=inside, other=0.0)
    o = tl.load(out + at_out, mask=inside, other=0.0)
    lse_row = tl.load(lse + head * tokens + row, mask=row < document_end, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(deltas + head * tokens + row, delta, mask=row < document_end)
    dq = tl.zeros((TILE, BLOCK), tl.float32)
    for other in range(document_start, tile_start + TILE, TILE):
        key = other + tl.arange(0, TILE)
        other_inside = (key[:, None] < document_end) & (column[None, :] < SIZE)
        to = key[:, None].to(tl.int64) * stride + column[None, :]
        k = tl.load(qkv + to + (HEADS + kv_head) * SIZE, mask=other_inside, other=0.0)
        v = tl.load(qkv + to + (HEADS + KV_HEADS + kv_head) * SIZE, mask=other_inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        weight = tl.exp2(score - lse_row[:, None])
        weight = tl.where((key[None, :] <= row[:, None]) & (key[None, :] < document_end), weight, 0.0)
        dscore = weight * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(dscore.to(k.dtype), k, input_precision="ieee")
    tl.store(dqkv + at, (dq * scale).to(dqkv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _backward_dkv_kernel(
    qkv, dout, lse, deltas, dqkv, document_starts, document_ends, tile_starts, stride, tokens, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    document_end, tile_start = tl.load(document_ends + tl.program_id(0)), tl.load(tile_starts + tl.program_id(0))
    if tile_start >= document_end:
        return
    kv_head = tl.program_id(1)
    key, column = tile_start + tl.arange(0, TILE), tl.arange(0, BLOCK)
    inside = (key[:, None] < document_end) & (column[None, :] < SIZE)
    at = key[:, None].to(tl.int64) * stride + column[None, :]
    at_k, at_v = at + (HEADS + kv_head) * SIZE, at + (HEADS + KV_HEADS + kv_head) * SIZE
    k, v = tl.load(qkv + at_k, mask=inside, other=0.0), tl.load(qkv + at_v, mask=inside, other=0.0)
    dk, dv = tl.zeros((TILE, BLOCK), tl.float32), tl.zeros((TILE, BLOCK), tl.float32)
    for member in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + member
        for other in range(tile_start, document_end, TILE):
            row = other + tl.arange(0, TILE)
            other_inside = (row[:, None] < document_end) & (column[None, :] < SIZE)
            q = tl.load(
                qkv + row[:, None].to(tl.int64) * stride + head * SIZE + column[None, :], mask=other_inside, other=0.0
            )
            to = (row[:, None].to(tl.int64) * HEADS + head) * SIZE + column[None, :]
            do = tl.load(dout + to, mask=other_inside, other=0.0)
            lse_row = tl.load(lse + head * tokens + row, mask=row < document_end, other=0.0)
            delta = tl.load(deltas + head * tokens + row, mask=row < document_end, other=0.0)
            # The scores are keys × queries, so the weights and dscore below need no transpose.
            score = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2E)
            weight = tl.exp2(score - lse_row[None, :])
            weight = tl.where((key[:, None] <= row[None, :]) & (row[None, :] < document_end), weight, 0.0)
            dv += tl.dot(weight.to(do.dtype), do, input_precision="ieee")
            dscore = weight * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            dk += tl.dot(dscore.to(q.dtype), q, input_precision="ieee")
    tl.store(dqkv + at_k, (dk * scale).to(dqkv.dtype.element_ty), mask=inside)
    tl.store(dqkv + at_v, dv.to(dqkv.dtype.element_ty), mask=inside)


def forward(
    qkv: torch.Tensor, tiles: Tiles, heads: int, kv_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention. A row of `qkv` (T, (heads + 2 kv_heads) × size) holds one token's queries, keys and values.

    Returns the output (T, heads × size) and the base-2 log-sum-exp of the scores (heads, T), fp32.
    """
    size = qkv.shape[1] // (heads + 2 * kv_heads)
    out = qkv.new_empty(len(qkv), heads * size)
    lse = torch.empty(heads, len(qkv), dtype=torch.float32, device=qkv.device)
    _forward_kernel[(len(tiles.tile_start), heads)](
        qkv,
        out,
        lse,
        tiles.document_start,
        tiles.document_end,
        tiles.tile_start,
        qkv.stride(0),
        len(qkv),
        scale,
        **_shape(heads, kv_heads, size),
    )
    return out, lse


def backward(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, tiles: Tiles,
    heads: int, kv_heads: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Gradient of the `qkv` of `forward`, with the same shape."""
    size = qkv.shape[1] // (heads + 2 * kv_heads)
    dqkv, deltas = torch.empty_like(qkv), torch.empty_like(lse)
    places = tiles.document_start, tiles.document_end, tiles.tile_start, qkv.stride(0), len(qkv), scale
    shape = _shape(heads, kv_heads, size)
    _backward_dq_kernel[(len(tiles.tile_start), heads)](qkv, out, dout, lse, deltas, dqkv, *places, **shape)
    _backward_dkv_kernel[(len(tiles.tile_start), kv_heads)](qkv, dout, lse, deltas, dqkv, *places, **shape)
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
