"""InternLM2's layout turned into Llama's, so that its own code is never needed.

The two differ in names and in one fused matrix: the rows of `wqkv` go by key-value head, and for each of these come the
queries of its group, the key, the value (InternLM's modeling_internlm2.py; its tools/convert2llama.py does the same).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from remint.core.errors import ArtefactError, got

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
# What names the base's own code, or says nothing about the model.
_DROPPED = (
    "auto_map",
    "architectures",
    "model_type",
    "bias",
    "rope_theta",
    "rope_scaling",
    "attn_implementation",
    "_name_or_path",
    "transformers_version",
)


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model as a Llama configuration; where config.json is silent, InternLM2's own defaults count.

    Raises ArtefactError for a kind of RoPE scaling that InternLM2 does not have.
    """
    kept = {key: value for key, value in config.items() if key not in _DROPPED}
    rope = {"rope_theta": float(config.get("rope_theta", 10000)), "rope_type": "default"}
    scaling = config.get("rope_scaling")
    if scaling:
        kind = scaling.get("type", scaling.get("rope_type"))
        if kind not in ("linear", "dynamic") or "factor" not in scaling:
            raise ArtefactError(
                f"config.json: rope_scaling must be linear or dynamic with a factor, {got(scaling)}; get the file again"
            )
        rope |= {"rope_type": kind, "factor": float(scaling["factor"])}
    return {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        **kept,
        "attention_bias": bool(config.get("bias", True)),
        "mlp_bias": False,
        "rope_parameters": rope,
    }


def to_llama(name: str, tensor: torch.Tensor, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The Llama tensors that one InternLM2 tensor holds. Raises ArtefactError for a name that InternLM2 does not have."""
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
    elif part in _LAYER_NAMES:
        yield f"{layer}.{_LAYER_NAMES[part]}.{kind}", tensor
    else:
        raise ArtefactError(f"base: InternLM2 has no tensor of that name, {got(name)}; get the base model again")


def split_qkv(fused: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value rows of a fused matrix (or bias) of shape (kv_heads × (heads / kv_heads + 2) × head size, …)."""
    group = heads // kv_heads
    rows = fused.unflatten(0, (kv_heads, group + 2, -1))
    return rows[:, :group].flatten(0, 2), rows[:, group].flatten(0, 1), rows[:, group + 1].flatten(0, 1)
