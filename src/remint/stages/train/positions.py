"""Whether every conversation fits into the positions that the base model was made for."""

from collections.abc import Mapping, Sequence
from typing import Any

from remint.compute.packing import Document
from remint.core.errors import SettingsError
from remint.model.template import Conversation
from remint.stages.train.settings import Train


def check(
    documents: Mapping[str, Sequence[Document]],
    train: Train,
    positions: int,
    tokenizer: Any,
    conversation: Conversation,
) -> None:
    """Raise SettingsError if a record, or a sample prompt with its answer, is longer than `positions` tokens.

    Positions restart with every record, so the length of a row does not matter.
    """
    faults = []
    longest, name = max((len(document.ids), name) for name, found in documents.items() for document in found)
    if longest > positions:
        faults.append(
            f"params: train.max_length: must be at most the {positions} positions of the base, because a record of "
            f"{name}.jsonl has {longest} tokens, got {train.max_length}; lower it to {positions}"
        )
    for index, prompt in enumerate(train.sample_prompts):
        length = len(conversation.prompt(tokenizer, [{"role": "user", "content": prompt}]))
        if length >= positions:
            faults.append(
                f"params: train.sample_prompts[{index}]: must leave room in the {positions} positions of the base, got "
                f"{length} tokens; shorten it"
            )
        elif length + train.sample_tokens > positions:
            faults.append(
                f"params: train.sample_tokens: prompt {index} has {length} tokens, and the base has {positions} "
                f"positions, got {train.sample_tokens}; lower it to {positions - length}"
            )
    if faults:
        raise SettingsError(*faults)
