"""The operations of `kernels.ops` and `kernels.attention` in plain torch, on any device: the reference for the kernels.

Their dropout masks differ from those of the kernels, but are a function of seed and shape as well.
"""

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit

from remint.compute import teacher

GROUP = 8


def mask(like, p, seed):
    """Zero or 1 / (1 - p) for each element."""
    draw = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
    return (draw >= p) / (1 - p)


def dropped(x, p, seed):
    return (x * mask(x, p, seed)).to(x.dtype)


def fill_extended(extended, value, lora_a, p, seed):
    extended[:, : value.shape[1]] = value
    low_rank = dropped(value, p, seed) @ lora_a.T
    extended[:, value.shape[1] :] = low_rank
    return low_rank


def fill_extended_backward(dextended, lora_a, p, seed):
    """Gradient of the `value` of `fill_extended`, fp32."""
    direct, ddropped = dextended[:, : lora_a.shape[1]].float(), dextended[:, lora_a.shape[1] :].float() @ lora_a.float()
    return direct + ddropped * mask(ddropped, p, seed)


def add_rms_norm(x, delta, weight, eps, extended, lora_a, p, seed):
    total = x if delta is None else x + delta
    rstd = torch.rsqrt(total.float().square().mean(1) + eps)
    return (
        total,
        rstd,
        fill_extended(extended, (total.float() * rstd[:, None] * weight.float()).to(x.dtype), lora_a, p, seed),
    )


def add_rms_norm_backward(dextended, lora_a, total, rstd, weight, dtotal, p, seed):
    unit = total.float() * rstd[:, None]
    gradient = fill_extended_backward(dextended, lora_a, p, seed) * weight.float()
    dx = rstd[:, None] * (gradient - unit * (gradient * unit).mean(1, keepdim=True))
    dx = dx if dtotal is None else dx + dtotal.float()
    value = dropped((unit * weight.float()).to(total.dtype), p, seed)
    return dx.to(total.dtype), matmul_fp32(dextended[:, lora_a.shape[1] :].T, value)


def copy_with_lora(x, extended, lora_a, p, seed):
    return fill_extended(extended, x, lora_a, p, seed)


def copy_with_lora_backward(dextended, lora_a, x, p, seed):
    return fill_extended_backward(dextended, lora_a, p, seed).to(x.dtype), matmul_fp32(
        dextended[:, lora_a.shape[1] :].T, dropped(x, p, seed)
    )


def silu_mul(gate_up, extended, lora_a, p, seed):
    gate, mlp_up = gate_up.float().chunk(2, 1)
    return fill_extended(extended, (F.silu(gate) * mlp_up).to(gate_up.dtype), lora_a, p, seed)


def silu_mul_backward(dextended, lora_a, gate_up, p, seed, into=None):
    gate, mlp_up = gate_up.float().chunk(2, 1)
    gradient = fill_extended_backward(dextended, lora_a, p, seed)
    sigmoid, silu = torch.sigmoid(gate), F.silu(gate)
    dgate = gradient * mlp_up * (sigmoid + silu * (1 - sigmoid))
    value = dropped((silu * mlp_up).to(gate_up.dtype), p, seed)
    dgate_up = torch.cat([dgate, gradient * silu], 1).to(gate_up.dtype)
    dgate_up = dgate_up if into is None else into.copy_(dgate_up)
    return dgate_up, matmul_fp32(dextended[:, lora_a.shape[1] :].T, value)


def matmul_fp32(a, b):
    return a @ b


def dequantize_into(weights, lora_bs, out):
    rank = lora_bs[0].shape[1]
    width = out.shape[1] - len(lora_bs) * rank
    for index, (rows, weight, lora_b) in enumerate(
        zip(out.split([len(u) for u in lora_bs]), weights, lora_bs, strict=True)
    ):
        rows[:, :width] = dequantize_4bit(weight, weight.quant_state)
        rows[:, width + index * rank : width + (index + 1) * rank] = lora_b.detach()


def apply_rope(source, target, cosines, sines, heads, backward):
    size = cosines.shape[1]
    x = source.reshape(len(source), -1)[:, : heads * size].reshape(len(source), heads, size).float()
    first, second = x.chunk(2, 2)
    turned = torch.cat([-second, first], 2) * (-1 if backward else 1)
    result = x * cosines[:, None].float() + turned * sines[:, None].float()
    if target.dim() == 3:
        target[:, :heads] = result.to(target.dtype)
    else:
        target[:, : heads * size] = result.flatten(1).to(target.dtype)


def make_tiles(starts, tokens):
    return starts


def forward(qkv, starts, heads, kv_heads, scale):
    rows = qkv.view(len(qkv), heads + 2 * kv_heads, -1).transpose(0, 1)[None]
    q, k, v = rows.split((heads, kv_heads, kv_heads), 1)
    documents = zip(*(part.split(starts.diff().tolist(), 2) for part in (q, k, v)), strict=True)
    answers = [F.scaled_dot_product_attention(*d, is_causal=True, scale=scale, enable_gqa=True) for d in documents]
    return torch.cat(answers, 2)[0].transpose(0, 1).flatten(1), qkv.new_empty(0)


def backward(dout, qkv, out, lse, starts, heads, kv_heads, scale):
    with torch.enable_grad():
        given = qkv.detach().requires_grad_()
        return torch.autograd.grad(forward(given, starts, heads, kv_heads, scale)[0], given, dout)[0]


def divergence_and_grad(logits, ids, log_probs):
    given = logits.float().clone().requires_grad_()
    losses = teacher.divergence(given, ids, log_probs)
    losses.sum().backward()
    logits.copy_(given.grad)
    return losses.detach()


def cross_entropy_and_grad(logits, targets):
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    gradient = logits.float().softmax(1) - F.one_hot(targets, logits.shape[1])
    logits.copy_(gradient)
    return losses
