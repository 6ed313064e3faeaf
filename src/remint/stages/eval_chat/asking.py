"""Ask a model the questions of an evaluation, and compare what it says with what the base says."""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from remint.compute.generation import answer_ids, decode
from remint.compute.loss import SupervisedLoss, mean_loss, taught
from remint.compute.packing import Document, cut, document, encode
from remint.core.errors import SettingsError, brief, got
from remint.model import loading
from remint.model.template import Conversation, Message
from remint.stages.eval_chat.scores import Answered
from remint.stages.eval_chat.settings import EvalChat

# The held-out loss must not depend on how training was packed, so its rows have their own fixed length.
_LOSS_LENGTH = 2048
# Of an answer to an ordinary prompt: the tokens at which the divergence from the base is measured, and those that count as
# its start.
_DIVERGENCE_TOKENS, _START_TOKENS = 16, 8


def check_positions(
    folder: Path, conversation: Conversation, rows: Sequence[dict[str, Any]], settings: EvalChat
) -> None:
    """Raise SettingsError if a prompt and its answer are longer than the positions that the model was made for."""
    tokenizer, positions = loading.load_tokenizer(folder), loading.positions(folder)
    lengths = [len(conversation.prompt(tokenizer, row["messages"][:-1])) for row in rows]
    longest = max(lengths, default=0)
    if longest + settings.max_new_tokens <= positions:
        return
    question = rows[lengths.index(longest)]["messages"][-2]["content"]
    cure = f"lower it to {positions - longest}" if longest < positions else "shorten that question"
    raise SettingsError(
        f"params: eval_chat.max_new_tokens: a question and its answer must fit into the {positions} positions of the "
        f"model, {got(settings.max_new_tokens)} for the question of {longest} tokens {brief(question)}; {cure}"
    )


@dataclass(frozen=True)
class Answer:
    """Token ids of an answer without the token that ends it, and its text."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Asked:
    """What one model answered to all records, and its mean loss (nats per token) on the reference answers of each set.

    `said` is what it says at the first tokens of its own answers to the ordinary prompts. `divergence` is its mean
    divergence (nats per token) from what the base says at the first tokens of the base's answers; NaN if not asked.
    """

    answers: list[Answer]
    losses: dict[str, float]
    said: list[Document]
    divergence: float


def ask(
    name: str,
    folder: Path,
    conversation: Conversation,
    records: Sequence[tuple[str, dict[str, Any]]],
    settings: EvalChat,
    said_by_base: Sequence[Document] | None = None,
) -> Asked:
    """Ask one model, computed in fp32. Without `said_by_base`, the model is the base."""
    tokenizer = loading.load_tokenizer(folder)
    model = loading.load_model(folder, torch.float32, loading.device())
    histories = [row["messages"][:-1] for _, row in records]
    with tqdm(total=len(records), unit="answer", desc=f"eval_chat: {name}", dynamic_ncols=True) as bar:
        limits = settings.max_new_tokens, settings.batch
        rows = answer_ids(model, tokenizer, conversation, histories, *limits, lambda n: bar.update(n))
    loss, length = SupervisedLoss(model), min(_LOSS_LENGTH, model.config.max_position_embeddings)
    losses = {
        kind: mean_loss(
            loss, cut(encode(tokenizer, conversation, [row for use, row in records if use == kind]), length), length
        )
        for kind in ("held_out", "control")
    }
    said: list[Document] = []
    if said_by_base is None:
        ordinary = [
            (history, ids)
            for (kind, _), history, ids in zip(records, histories, rows, strict=True)
            if kind == "control" and ids
        ]
        documents = [_first_tokens(tokenizer, conversation, history, ids) for history, ids in ordinary]
        said = taught(loss, [doc for doc in documents if len(doc.ids) <= length], length)
    asked = Asked(
        [Answer(row, _text(tokenizer, row, settings.max_new_tokens)) for row in rows],
        losses,
        said,
        math.nan if said_by_base is None else mean_loss(loss, said_by_base, length),
    )
    del model, loss
    gc.collect()
    return asked


def _first_tokens(tokenizer: Any, conversation: Conversation, history: Sequence[Message], ids: list[int]) -> Document:
    """A prompt with the first tokens of an answer, which are supervised."""
    prompt, answer = conversation.prompt(tokenizer, history), ids[:_DIVERGENCE_TOKENS]
    return document([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def _text(tokenizer: Any, ids: list[int], max_new_tokens: int) -> str:
    return decode(tokenizer, ids) + ("…" if len(ids) == max_new_tokens else "")


def answered(row: dict[str, Any], base: Answer, merged: Answer) -> Answered:
    *history, answer = row["messages"]
    prompt = "\n".join(message["content"] for message in history if message["role"] == "user")
    return Answered(
        prompt=prompt,
        kind=row["kind"],
        language=row["language"],
        expects=tuple(row["expects"]),
        accept=tuple(row["accept"]),
        reference=answer["content"],
        base=base.text,
        merged=merged.text,
        topic=row.get("topic", ""),
        same_start=base.ids[:_START_TOKENS] == merged.ids[:_START_TOKENS],
    )
