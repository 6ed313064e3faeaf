"""What a config.json must say about a model: values of the right JSON type, in a range that can be computed with."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from remint.core.errors import got

_MOST_LAYERS = 1000
# Far above any real model; they only keep a wrong number from becoming a huge object.
_SIZES = {
    "hidden_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "num_hidden_layers": _MOST_LAYERS,
    "num_attention_heads": 100_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 1_000_000_000,
}
_OPTIONAL_SIZES = {"num_key_value_heads": 100_000, "head_dim": 100_000_000}
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "bias")  # `bias` is InternLM2's
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield `field must be …, got …` for each value of a config.json with which no model can be built or trained."""
    sizes = list(_size_faults(config))
    yield from sizes
    if not sizes:
        yield from _shape_faults(config)
        yield from token_faults(config, config["vocab_size"])
    yield from _number_faults(config)
    for name in _FLAGS:
        if type(config.get(name, False)) is not bool:
            yield f"{name} must be true or false, {got(config[name])}"


def token_faults(config: Mapping[str, Any], vocabulary: int) -> Iterator[str]:
    """Faults of the ids of special tokens, in a config.json or generation_config.json: they must be in the vocabulary.

    An id may be null. There may be several end tokens, as a list.
    """
    for name in _TOKEN_IDS:
        value = config.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not (ids and all(_is_whole(index, 0, vocabulary - 1) for index in ids)):
            yield f"{name} must be an id from 0 to {vocabulary - 1}, {got(value)}"


def _size_faults(config: Mapping[str, Any]) -> Iterator[str]:
    for name, most in _SIZES.items():
        if not _is_whole(config.get(name), 1, most):
            yield f"{name} must be an integer from 1 to {most}, {got(config.get(name))}"
    for name, most in _OPTIONAL_SIZES.items():
        if config.get(name) is not None and not _is_whole(config[name], 1, most):
            yield f"{name} must be an integer from 1 to {most} or null, {got(config[name])}"


def _shape_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that do not fit each other. All of them are positive integers."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    key_value_heads = config.get("num_key_value_heads") or heads
    if heads % key_value_heads:
        yield f"num_attention_heads must be a multiple of num_key_value_heads {key_value_heads}, {got(heads)}"
    if config.get("head_dim") is None and hidden % heads:
        yield f"hidden_size must be a multiple of num_attention_heads {heads}, {got(hidden)}"
    elif (width := config.get("head_dim") or hidden // heads) % 2:
        yield f"the size of a head must be even, because rotary positions turn pairs of numbers, {got(width)}"


def _number_faults(config: Mapping[str, Any]) -> Iterator[str]:
    eps = config.get("rms_norm_eps", 1e-6)
    if not _is_number(eps, 1e-20, 0.1):
        yield f"rms_norm_eps must be a number from 1e-20 to 0.1, {got(eps)}"
    dropout = config.get("attention_dropout", 0.0)
    if not _is_number(dropout, 0, 0.99):
        yield f"attention_dropout must be a number from 0 to 0.99, {got(dropout)}"
    yield from _rope_faults([("rope_theta", config.get("rope_theta"))])
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if isinstance(rope, dict):
            yield from _rope_faults((f"{name}.{key}", value) for key, value in rope.items())
        elif rope is not None:
            yield f"{name} must be an object or null, {got(rope)}"


def _rope_faults(entries: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Faults of the numbers for rotary positions: a base of 1 or less turns all pairs alike or the wrong way."""
    for name, value in entries:
        field = name.rpartition(".")[2]
        if field == "rope_theta" and value is not None and not _is_number(value, 1.0001, 1e15):
            yield f"{name} must be a number above 1, at most 1e15, {got(value)}"
        elif field == "factor" and value is not None and not _is_number(value, 1e-3, 1e6):
            yield f"{name} must be a number from 0.001 to 1000000, {got(value)}"
        elif type(value) in (int, float) and not _is_number(value, -1e15, 1e15):
            yield f"{name} must be a number of at most 1e15, {got(value)}"


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most and math.isfinite(value)
