"""Generate answers to prompts, with greedy decoding by default: shared by training samples, evaluation and chat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from remint.core.settings import check_ranges
from remint.model.template import Conversation, Message


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy decoding, which ignores `top_p` and `top_k`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            "chat",
            (0 <= self.temperature <= 10, "temperature", self.temperature, "must be between 0 and 10"),
            # Dividing by less would exceed what float32 can hold.
            (not 0 < self.temperature < 1e-3, "temperature", self.temperature, "must be 0 (greedy) or at least 0.001"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1"),
            (0 <= self.top_k < 2**31, "top_k", self.top_k, "must be between 0 (off) and 2147483647"),
        )


def answer_all(
    model: Any,
    tokenizer: Any,
    conversation: Conversation,
    histories: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch: int,
    unfinished: str = "",
) -> list[str]:
    """Greedy answers to many conversations as text; one that `max_new_tokens` cut off ends in `unfinished`."""
    rows = answer_ids(model, tokenizer, conversation, histories, max_new_tokens, batch)
    return [decode(tokenizer, row) + (unfinished if len(row) == max_new_tokens else "") for row in rows]


def answer_ids(
    model: Any,
    tokenizer: Any,
    conversation: Conversation,
    histories: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch: int,
    done: Callable[[int], object] = lambda _: None,
) -> list[list[int]]:
    """Token ids of greedy answers to many conversations, in their order, without the token that ends an answer.

    An answer of `max_new_tokens` was cut off. Prompts of similar length form a batch; the shorter ones are padded on the
    left and masked. After each batch, `done` is called with the number of prompts in it.
    """
    prompts = [conversation.prompt(tokenizer, history) for history in histories]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = generate(
            model, conversation.stop_ids(tokenizer), [prompts[i] for i in chosen], max_new_tokens, Sampling()
        )
        for index, row in zip(chosen, rows, strict=True):
            answers[index] = row
        done(len(chosen))
    return answers


@torch.no_grad()
def generate(
    model: Any,
    stop: Sequence[int],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: Any = None,
) -> list[list[int]]:
    """New token ids for each prompt, without the token of `stop` that ended the answer."""
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(stop), pad_token_id=stop[0], use_cache=True, **chosen
    )
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), stop[0])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    rows = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        streamer=streamer,
    )
    return [_until(row[width:].tolist(), stop) for row in rows]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens and without a partial character that a length limit may leave."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd").strip()


def _until(ids: list[int], stop: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(ids) if token in stop]
    return ids[: ends[0]] if ends else ids
