"""InternLM2's layout turned into Llama's, so that its own code is never needed.

The two differ in names and in one fused matrix: the rows of `wqkv` go by key-value head, and for each of these come the
queries of its group, the key, the value (InternLM's modeling_internlm2.py; its tools/convert2llama.py does the same).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

MODEL_TYPE = "internlm2"

_NAMES = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_FUSED = "attention.wqkv"
_DROPPED = (
    "auto_map",
    "architectures",
    "model_type",
    "bias",
    "attn_implementation",
    "_name_or_path",
    "transformers_version",
)


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model as a Llama configuration; what names the model's own code is left out."""
    kept = {key: value for key, value in config.items() if key not in _DROPPED}
    bias = bool(config.get("bias", False))
    return {**kept, "attention_bias": bias, "mlp_bias": False}


def to_llama(name: str, tensor: torch.Tensor, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The Llama tensors that one InternLM2 tensor holds. Raises KeyError for a name that InternLM2 does not have."""
    if name in _NAMES:
        yield _NAMES[name], tensor
        return
    prefix, _, rest = name.partition(".layers.")
    number, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    layer = f"{prefix}.layers.{number}"
    if part == _FUSED:
        for which, split in zip(
            "qkv", split_qkv(tensor, config.num_attention_heads, config.num_key_value_heads), strict=True
        ):
            yield f"{layer}.self_attn.{which}_proj.{kind}", split
    else:
        yield f"{layer}.{_LAYER_NAMES[part]}.{kind}", tensor


def split_qkv(fused: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value rows of a fused matrix (or bias) of shape (kv_heads × (heads / kv_heads + 2) × head size, …)."""
    group = heads // kv_heads
    rows = fused.unflatten(0, (kv_heads, group + 2, -1))
    return rows[:, :group].flatten(0, 2), rows[:, group].flatten(0, 1), rows[:, group + 1].flatten(0, 1)
