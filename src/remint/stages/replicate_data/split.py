"""Choose which records are trained on or held out, and in which order: pure functions of records and seed."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from remint.core.errors import DataError, listed
from remint.stages.replicate_data.records import Record


def held_out_by_share(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split into (train, held-out). Each language is split by the same share.

    Records that share a question stay together, also if it is only one turn of a longer conversation.
    """
    if share == 0:
        return list(records), []
    names = _linked(records)
    groups: dict[str, dict[str, list[Record]]] = defaultdict(dict)
    for record in records:
        groups[record.language].setdefault(names[record.question], []).append(record)
    train: list[Record] = []
    held_out: list[Record] = []
    for language, by_question in sorted(groups.items()):
        questions = sorted(by_question)
        order = np.random.default_rng([seed, len(language)]).permutation(len(questions))
        cut = round(share * len(questions))
        for position, index in enumerate(order):
            (held_out if position < cut else train).extend(by_question[questions[index]])
    return train, held_out


def _linked(records: Sequence[Record]) -> dict[str, str]:
    """For each question the name of its group: questions with a common turn form one, named by the first of them."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    for record in records:
        for name in (record.question, *record.turns):
            leader.setdefault(name, name)
            # A turn without a letter or digit, like "?", links nothing.
            if name:
                first, second = sorted((find(name), find(record.question)))
                leader[second] = first
    return {record.question: find(record.question) for record in records}


def check_disjoint(train: Sequence[Record], held_out: Sequence[Record]) -> None:
    """Raise DataError that lists every held-out question that is also trained on.

    A question counts as trained on if it is any user turn of a training conversation. What is asked in a held-out
    conversation is its last turn; the turns before only lead to it.
    """
    trained: dict[str, str] = {}
    for record in train:
        for question in (record.question, *record.turns):
            trained.setdefault(question, record.origin)
    faults = []
    for record in held_out:
        asked = next((name for name in (record.question, record.turns[-1]) if name and name in trained), None)
        if asked is not None:
            faults.append(
                f"{record.origin}: the same question is trained on in {trained[asked]}; remove one of the two"
            )
    if faults:
        raise DataError(*listed(faults))


def replicated_order(counts: Sequence[tuple[int, int]], seed: int) -> np.ndarray:
    """Row numbers of the training set in training order: int64, length sum(records × copies).

    `counts` holds (records, copies) for consecutive blocks of records. `seed` determines the permutation.
    """
    starts = np.cumsum([0, *(count for count, _ in counts)])
    blocks = [
        np.tile(np.arange(start, start + count), copies) for start, (count, copies) in zip(starts, counts, strict=False)
    ]
    return np.random.default_rng(seed).permutation(np.concatenate(blocks).astype(np.int64))
