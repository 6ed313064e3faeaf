"""Choose which records are trained on or held out, and in which order: pure functions of records and seed."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from remint.core.errors import DataError, listed
from remint.stages.replicate_data.records import Record


def held_out_by_share(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split into (train, held-out). Records of one question stay together; each language is split by the same share."""
    if share == 0:
        return list(records), []
    groups: dict[str, dict[str, list[Record]]] = defaultdict(dict)
    for record in records:
        groups[record.language].setdefault(record.question, []).append(record)
    train: list[Record] = []
    held_out: list[Record] = []
    for language, by_question in sorted(groups.items()):
        questions = sorted(by_question)
        order = np.random.default_rng([seed, len(language)]).permutation(len(questions))
        cut = round(share * len(questions))
        for position, index in enumerate(order):
            (held_out if position < cut else train).extend(by_question[questions[index]])
    return train, held_out


def check_disjoint(train: Sequence[Record], held_out: Sequence[Record]) -> None:
    """Raise DataError that lists every held-out question that is also trained on."""
    trained = {record.question: record.origin for record in train}
    faults = [
        f"{record.origin}: the same question is trained on in {trained[record.question]}; remove one of the two"
        for record in held_out
        if record.question in trained
    ]
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
