"""Convert InternLM2's layout to Llama's and back, so that InternLM2's own code is never needed.

The two differ in names and in one fused matrix. The rows of `wqkv` are ordered by key-value head. Each of these heads
has the queries of its group, then the key, then the value. Source: InternLM's modeling_internlm2.py; its
tools/convert2llama.py does the same.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from remint.core.errors import ArtefactError, got
from remint.model import description

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
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# The code that InternLM2's publisher ships with such files. This project contains none of it.
_CODE = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
}
_TOKENIZER_CODE = ["tokenization_internlm2.InternLM2Tokenizer", "tokenization_internlm2_fast.InternLM2TokenizerFast"]
# Fields of InternLM2 that name its own code, that llama_config translates, or that do not describe the model.
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
# Fields of a Llama that InternLM2 does not have. own_config translates those that matter.
_LLAMA_ONLY = (
    "attention_bias",
    "attention_dropout",
    "dtype",
    "head_dim",
    "mlp_bias",
    "pretraining_tp",
    "rope_parameters",
)


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model as a Llama configuration. A field that config.json lacks has InternLM2's own default.

    Raises ArtefactError for a kind of RoPE scaling that InternLM2 does not have, and for values of a wrong type.
    """
    config = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **config}
    if faults := [f"config.json: {fault}; get the file again" for fault in description.faults(config)]:
        raise ArtefactError(*faults)
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
        **kept,
        "attention_bias": bool(config.get("bias", True)),
        "mlp_bias": False,
        "rope_parameters": rope,
    }


def own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model as an InternLM2 configuration. Raises ArtefactError if InternLM2's layout cannot describe it."""
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    faults = [
        f"config.json: {name} must be {must} in InternLM2's layout, {got(found)}; this model cannot be exported"
        for name, must, found, fits in (
            ("model_type", "llama", config["model_type"], config["model_type"] == "llama"),
            ("mlp_bias", False, config.get("mlp_bias"), not config.get("mlp_bias")),
            ("rope_type", "default, linear or dynamic", kind, kind in ("default", "linear", "dynamic")),
            ("head_dim", "hidden_size / heads", size, size * config["num_attention_heads"] == config["hidden_size"]),
        )
        if not fits
    ]
    if faults:
        raise ArtefactError(*faults)
    kept = {key: value for key, value in config.items() if key not in _LLAMA_ONLY}
    return {
        **kept,
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": _CODE,
        "model_type": MODEL_TYPE,
        "bias": bool(config.get("attention_bias", False)),
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": rope["factor"]},
        "torch_dtype": config["dtype"],
    }


def tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    """tokenizer_config.json for InternLM2's own tokenizer.

    It gives the markers their names, such as <|im_start|>; tokenizer.model calls them [UNUSED_TOKEN_…].
    """
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(index): {flag: getattr(token, flag) for flag in flags}
        for index, token in tokenizer.added_tokens_decoder.items()
    }
    roles = {role: getattr(tokenizer, role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {
        **roles,
        "added_tokens_decoder": added,
        "additional_special_tokens": tokenizer.extra_special_tokens,
        "auto_map": {"AutoTokenizer": _TOKENIZER_CODE},
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "InternLM2Tokenizer",
    }


def to_llama(name: str, tensor: torch.Tensor, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The Llama tensors that one InternLM2 tensor contains.

    Raises ArtefactError if InternLM2 has no tensor of that name or a fused matrix does not fit the heads.
    """
    if name in _NAMES:
        yield _NAMES[name], tensor
        return
    prefix, _, rest = name.partition(".layers.")
    number, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    layer = f"{prefix}.layers.{number}"
    if part == _FUSED:
        blocks = config.num_attention_heads + 2 * config.num_key_value_heads
        if tensor.dim() == 0 or tensor.shape[0] % blocks:
            raise ArtefactError(
                f"{name}: must have rows for {blocks} heads, {got(tuple(tensor.shape))}; get a file that fits the base"
            )
        split = split_qkv(tensor, config.num_attention_heads, config.num_key_value_heads)
        for own, rows in zip(_QKV, split, strict=True):
            yield f"{layer}.{own}.{kind}", rows
    elif part in _LAYER_NAMES:
        yield f"{layer}.{_LAYER_NAMES[part]}.{kind}", tensor
    else:
        raise ArtefactError(f"base: InternLM2 has no tensor of that name, {got(name)}; get the base model again")


def lora_to_llama(name: str, tensor: torch.Tensor, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The Llama LoRA matrices that one InternLM2 LoRA matrix (`<layer>.lora_A.weight` or `.lora_B.weight`) contains.

    B has the layer's rows and is split like them. The three parts of a fused layer share A. Raises ArtefactError for a
    layer that InternLM2 does not have.
    """
    layer, _, matrix = name.removesuffix(".weight").rpartition(".")
    if matrix == "lora_A" and layer.endswith(_FUSED):
        parts = [(f"{layer.removesuffix(_FUSED)}{own}.weight", tensor) for own in _QKV]
    else:
        parts = list(to_llama(f"{layer}.weight", tensor, config))
    for own, part in parts:
        yield f"{own.removesuffix('weight')}{matrix}.weight", part


def split_qkv(fused: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value rows of a fused matrix or bias.

    `fused` has the shape (kv_heads × (heads / kv_heads + 2) × head size, …).
    """
    group = heads // kv_heads
    rows = fused.unflatten(0, (kv_heads, group + 2, -1))
    return rows[:, :group].flatten(0, 2), rows[:, group].flatten(0, 1), rows[:, group + 1].flatten(0, 1)


def from_llama(
    parts: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a Llama by InternLM2's names. Queries, keys and values are collected by layer and fused.

    Raises ArtefactError if InternLM2 has no place for a name, or if queries, keys or values are missing.
    """
    names = {llama: own for own, llama in _NAMES.items()}
    layer_names = {llama: own for own, llama in _LAYER_NAMES.items()}
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in parts:
        prefix, _, rest = name.partition(".layers.")
        number, _, rest = rest.partition(".")
        part, _, kind = rest.rpartition(".")
        layer = f"{prefix}.layers.{number}"
        if name in names:
            yield names[name], tensor
        elif part in layer_names:
            yield f"{layer}.{layer_names[part]}.{kind}", tensor
        elif part in _QKV:
            fused = f"{layer}.{_FUSED}.{kind}"
            found = waiting.setdefault(fused, {})
            found[part] = tensor
            if len(found) == len(_QKV):
                q, k, v = (waiting[fused][which] for which in _QKV)
                del waiting[fused]
                yield fused, fuse_qkv(q, k, v, config["num_attention_heads"], config["num_key_value_heads"])
        else:
            raise ArtefactError(f"model: InternLM2 has no tensor like this, {got(name)}; this model cannot be exported")
    if waiting:
        raise ArtefactError(
            f"model: lacks queries, keys or values of {sorted(waiting)}; make it again with `dvc repro`"
        )


def fuse_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """The inverse of split_qkv: rows by key-value head, each with the queries of its group, the key and the value."""
    size = q.shape[0] // heads
    rows = [part.unflatten(0, (kv_heads, -1, size)) for part in (q, k, v)]
    return torch.cat(rows, 1).flatten(0, 2)
