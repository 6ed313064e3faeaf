"""The operations of `remint.kernels.ops` in torch's own words: what the Triton kernels must compute, on any device.

Dropout masks are other ones, but as there a function of the seed and the shape.
"""

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit

GROUP = 8


def mask(like, p, seed):
    """Zero or 1 / (1 - p) for each element."""
    draw = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
    return (draw >= p) / (1 - p)


def dropped(x, p, seed):
    return (x * mask(x, p, seed)).to(x.dtype)


def fill(wide, value, low, p, seed):
    wide[:, : value.shape[1]] = value
    lows = dropped(value, p, seed) @ low.T
    wide[:, value.shape[1] :] = lows
    return lows


def unfill(dwide, low, p, seed):
    """Gradient of what `fill` was given, fp32."""
    direct, ddropped = dwide[:, : low.shape[1]].float(), dwide[:, low.shape[1] :].float() @ low.float()
    return direct + ddropped * mask(ddropped, p, seed)


def normed(x, delta, weight, eps, wide, low, p, seed):
    total = x if delta is None else x + delta
    rstd = torch.rsqrt(total.float().square().mean(1) + eps)
    return total, rstd, fill(wide, (total.float() * rstd[:, None] * weight.float()).to(x.dtype), low, p, seed)


def normed_back(dwide, low, total, rstd, weight, dtotal, p, seed):
    unit = total.float() * rstd[:, None]
    gradient = unfill(dwide, low, p, seed) * weight.float()
    dx = rstd[:, None] * (gradient - unit * (gradient * unit).mean(1, keepdim=True))
    dx = dx if dtotal is None else dx + dtotal.float()
    value = dropped((unit * weight.float()).to(total.dtype), p, seed)
    return dx.to(total.dtype), product(dwide[:, low.shape[1] :].T, value)


def copied(x, wide, low, p, seed):
    return fill(wide, x, low, p, seed)


def copied_back(dwide, low, x, p, seed):
    return unfill(dwide, low, p, seed).to(x.dtype), product(dwide[:, low.shape[1] :].T, dropped(x, p, seed))


def gated(both, wide, low, p, seed):
    gate, mlp_up = both.float().chunk(2, 1)
    return fill(wide, (F.silu(gate) * mlp_up).to(both.dtype), low, p, seed)


def gated_back(dwide, low, both, p, seed, into=None):
    gate, mlp_up = both.float().chunk(2, 1)
    gradient = unfill(dwide, low, p, seed)
    sigmoid, silu = torch.sigmoid(gate), F.silu(gate)
    dgate = gradient * mlp_up * (sigmoid + silu * (1 - sigmoid))
    value = dropped((silu * mlp_up).to(both.dtype), p, seed)
    dboth = torch.cat([dgate, gradient * silu], 1).to(both.dtype)
    dboth = dboth if into is None else into.copy_(dboth)
    return dboth, product(dwide[:, low.shape[1] :].T, value)


def product(a, b):
    return a @ b


def unpacked(weights, lora_bs, out):
    rank = lora_bs[0].shape[1]
    width = out.shape[1] - len(lora_bs) * rank
    for index, (rows, weight, lora_b) in enumerate(
        zip(out.split([len(u) for u in lora_bs]), weights, lora_bs, strict=True)
    ):
        rows[:, :width] = dequantize_4bit(weight, weight.quant_state)
        rows[:, width + index * rank : width + (index + 1) * rank] = lora_b.detach()


def rotated(source, target, cosines, sines, heads, backward):
    size = cosines.shape[1]
    x = source.reshape(len(source), -1)[:, : heads * size].reshape(len(source), heads, size).float()
    first, second = x.chunk(2, 2)
    turned = torch.cat([-second, first], 2) * (-1 if backward else 1)
    result = x * cosines[:, None].float() + turned * sines[:, None].float()
    if target.dim() == 3:
        target[:, :heads] = result.to(target.dtype)
    else:
        target[:, : heads * size] = result.flatten(1).to(target.dtype)


def tiles(starts, tokens):
    return starts


def mixed(qkv, starts, heads, kv_heads, scale):
    rows = qkv.view(len(qkv), heads + 2 * kv_heads, -1).transpose(0, 1)[None]
    q, k, v = rows.split((heads, kv_heads, kv_heads), 1)
    documents = zip(*(part.split(starts.diff().tolist(), 2) for part in (q, k, v)), strict=True)
    answers = [F.scaled_dot_product_attention(*d, is_causal=True, scale=scale, enable_gqa=True) for d in documents]
    return torch.cat(answers, 2)[0].transpose(0, 1).flatten(1), qkv.new_empty(0)


def mixed_back(dout, qkv, out, norms, starts, heads, kv_heads, scale):
    with torch.enable_grad():
        given = qkv.detach().requires_grad_()
        return torch.autograd.grad(mixed(given, starts, heads, kv_heads, scale)[0], given, dout)[0]


def entropy(logits, targets):
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    gradient = logits.float().softmax(1) - F.one_hot(targets, logits.shape[1])
    logits.copy_(gradient)
    return losses
