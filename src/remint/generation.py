"""Answer prompts, greedily unless told otherwise: one function for training's samples, evaluation and chat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from remint.chat import Conversation, Message
from remint.core.config import check


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy and ignores the other two."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check(
            "chat",
            (0 <= self.temperature <= 10, "temperature", self.temperature, "must be between 0 and 10"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k", self.top_k, "must be 0 (off) or more"),
        )


@torch.no_grad()
def answer_all(
    model: Any,
    tokenizer: Any,
    conversation: Conversation,
    histories: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch: int,
    done: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """Greedy answers to many conversations, in their order.

    Prompts of equal length are answered together, so that no padding enters the computation; `done` is told how many
    prompts each batch finished.
    """
    prompts = [conversation.prompt(tokenizer, history) for history in histories]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    answers = [""] * len(prompts)
    for _, indices in sorted(by_length.items()):
        for start in range(0, len(indices), batch):
            chosen = indices[start : start + batch]
            rows = generate(
                model, tokenizer, conversation, [prompts[i] for i in chosen], max_new_tokens, Sampling(), streamer=None
            )
            for index, row in zip(chosen, rows, strict=True):
                answers[index] = decode(tokenizer, row)
            done(len(chosen))
    return answers


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    conversation: Conversation,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: Any,
) -> list[list[int]]:
    """New ids for prompts of one common length, without the token that ended each answer."""
    stop = conversation.stop_ids(tokenizer)
    chosen = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=stop[0], use_cache=True, **chosen)
    ids = torch.tensor(list(prompts), device=model.device)
    mask = torch.ones_like(ids)
    rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
    return [_until(row[ids.shape[1] :].tolist(), stop) for row in rows]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of an answer, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _until(ids: list[int], stop: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(ids) if token in stop]
    return ids[: ends[0]] if ends else ids
