"""The Triton kernels compute what plain torch does: on a GPU, or interpreted with TRITON_INTERPRET=1."""

import os

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from remint.compute import teacher
from tests.compute import plain_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton with TRITON_INTERPRET=1", allow_module_level=True)
from remint.compute.kernels import attention, ops, triton_kernels  # noqa: E402
from remint.compute.kernels.layers import MOST_RANK  # noqa: E402

RANK = 8
# The interpreter multiplies the bits of bfloat16 as if they were integers.
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def same_masks(monkeypatch):
    """Let the plain operations draw the masks that the kernels draw."""

    def mask(like, p, seed):
        ones = torch.ones_like(like, dtype=torch.float32)
        if p == 0:
            return ones
        extended, out, row = ones.new_empty(len(ones), ones.shape[1]), torch.empty_like(ones), ones[0]
        ops._launch(
            triton_kernels.add_rms_norm, ones, ones.shape[1], ones, ones, row, ones, extended, out, ones[:, 0].clone(),
            extended.stride(0), seed, 0.0, 1.0, p=p, HAS_DELTA=False,
        )  # fmt: skip
        return (out != 0) / (1 - p)

    monkeypatch.setattr(plain_ops, "mask", mask)
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, device=DEVICE)


def both(name, *arguments, filled=None):
    """Results of a kernel and of its plain twin, with what each filled if `filled` says which argument that is."""
    results = []
    for module in (ops, plain_ops):
        given = [a.clone() if index == filled else a for index, a in enumerate(arguments)]
        made = getattr(module, name)(*given)
        made = () if made is None else made if isinstance(made, tuple) else (made,)
        results.append([*made, *([given[filled]] if filled is not None else [])])
    return zip(*results, strict=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "width"), [(5, 48), (3, 320), (140, 72)])
def test_each_operation_and_its_gradient(rows, width, p):
    x, delta, weight, lora_a = randn(rows, width), randn(rows, width), randn(width), randn(RANK, width)
    extended, pair = randn(rows, width + RANK), randn(rows, 2 * width)
    total, rstd = x + delta, torch.rsqrt((x + delta).square().mean(1) + 1e-5)
    checks = [
        both("add_rms_norm", x, delta, weight, 1e-5, extended, lora_a, p, 7, filled=4),
        both("add_rms_norm", x, None, weight, 1e-5, extended, lora_a, p, 7, filled=4),
        both("add_rms_norm_backward", extended, lora_a, total, rstd, weight, None, p, 7),
        both("add_rms_norm_backward", extended, lora_a, total, rstd, weight, x, p, 7),
        both("copy_with_lora", x, extended, lora_a, p, 7, filled=1),
        both("copy_with_lora_backward", extended, lora_a, x, p, 7),
        both("silu_mul", pair, extended, lora_a, p, 7, filled=1),
        both("silu_mul_backward", extended, lora_a, pair, p, 7),
    ]
    for found in checks:
        for ours, theirs in found:
            assert torch.allclose(ours, theirs, atol=1e-3, rtol=1e-5)
    expected, given = ops.silu_mul_backward(extended, lora_a, pair, p, 7), pair.clone()
    assert all(map(torch.equal, ops.silu_mul_backward(extended, lora_a, given, p, 7, given), expected))
    assert torch.equal(given, expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [64, MOST_RANK])
def test_low_rank_matrices_of_any_size_that_is_taken(rank, dtype):
    """What a program needs of them must fit a GPU's shared memory, and half precision must round no more than once."""
    rows, width = 140, 160
    pair, extended, lora_a = (
        t.to(dtype) for t in (randn(rows, 2 * width), randn(rows, width + rank), randn(rank, width))
    )
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for found in (
        both("copy_with_lora", pair[:, :width].contiguous(), extended, lora_a, 0.3, 7, filled=1),
        both("copy_with_lora_backward", extended, lora_a, pair[:, :width].contiguous(), 0.3, 7),
        both("silu_mul", pair, extended, lora_a, 0.3, 7, filled=1),
        both("silu_mul_backward", extended, lora_a, pair, 0.3, 7),
    ):
        for ours, theirs in found:
            assert (ours.float() - theirs.float()).norm() < bound * theirs.float().norm()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_weights_come_out_with_the_bits_of_bitsandbytes(kind, double, count):
    weights = []
    for rows in (64, 32, 96)[:count]:
        packed, state = quantize_4bit(randn(rows, 192), blocksize=64, compress_statistics=double, quant_type=kind)
        packed.quant_state = state
        weights.append(packed)
    lora_bs = [randn(len(weight) * 2 // 192, RANK) for weight in weights]
    out = randn(sum(map(len, lora_bs)), 192 + count * RANK)
    ours, theirs = out.clone(), out.clone()
    ops.dequantize_into(weights, lora_bs, ours)
    plain_ops.dequantize_into(weights, lora_bs, theirs)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backward", [False, True])
def test_rotation(backward):
    cosines, sines = randn(5, 8).repeat(1, 2), randn(5, 8).repeat(1, 2)
    rows = randn(5, 6 * 16)
    ours, theirs = rows.clone(), rows.clone()
    ops.apply_rope(ours, ours, cosines, sines, 4, backward)
    plain_ops.apply_rope(theirs, theirs, cosines, sines, 4, backward)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(ours[:, 64:], rows[:, 64:])


def test_the_head_loss_and_its_gradient():
    logits, targets = 3 * randn(7, 1003), torch.randint(1003, (7,), device=DEVICE)
    for ours, theirs in both("cross_entropy_and_grad", logits, targets, filled=0):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_divergence_from_the_base_and_its_gradient():
    logits, (ids, log_probs) = 3 * randn(7, 1003), teacher.most_likely(3 * randn(7, 1003))
    for ours, theirs in both("divergence_and_grad", logits, ids, log_probs, filled=0):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 3, 24)])
def test_attention_and_its_gradient(heads, kv_heads, size):
    lengths = [5, 70, 130, 1, 64]
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    qkv = randn(sum(lengths), (heads + 2 * kv_heads) * size)
    tiles = attention.make_tiles(starts, len(qkv))
    out, lse = attention.forward(qkv, tiles, heads, kv_heads, 0.2)
    expected, nothing = plain_ops.forward(qkv, starts, heads, kv_heads, 0.2)
    assert torch.allclose(out, expected, atol=1e-5)
    dout = torch.randn_like(out)
    ours = attention.backward(dout, qkv, out, lse, tiles, heads, kv_heads, 0.2)
    theirs = plain_ops.backward(dout, qkv, out, nothing, starts, heads, kv_heads, 0.2)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_dropout_keeps_its_share_without_a_pattern():
    mask = plain_ops.mask(torch.ones(400, 800, device=DEVICE), 0.1, 5)
    dropped = (mask == 0).float()
    assert dropped.mean().item() == pytest.approx(0.1, abs=0.003)
    assert mask.mean().item() == pytest.approx(1, abs=0.003)
    for axis, count in ((0, 400), (1, 800)):
        assert dropped.mean(axis).std().item() == pytest.approx((0.09 / count) ** 0.5, rel=0.15)
    assert not torch.equal(mask, plain_ops.mask(torch.ones(400, 800, device=DEVICE), 0.1, 6))
