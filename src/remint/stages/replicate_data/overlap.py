"""Find held-out questions that are nearly the same as a question of the training set."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from remint.stages.replicate_data.records import Record

# Two questions with at least this share of common n-grams differ in a word or two.
SIMILAR = 0.7
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class Near:
    """A held-out record and the training record that is most like it. `similarity` is between SIMILAR and 1."""

    held_out: Record
    trained: Record
    similarity: float


def near_duplicates(train: Iterable[Record], held_out: Sequence[Record]) -> list[Near]:
    """For each held-out record whose last question is nearly asked in training, the training record that is most like it.

    The similarity is the Jaccard index of the character n-grams of the normalised questions: the share of those in either
    that are in both. In a training conversation, each turn counts as a question. The time is that of counting the common
    n-grams: linear in the training set, except for n-grams that many held-out questions have.
    """
    asked = [_ngrams(record.turns[-1]) for record in held_out]
    having: dict[str, list[int]] = defaultdict(list)
    for number, ngrams in enumerate(asked):
        for ngram in ngrams:
            having[ngram].append(number)
    found: dict[int, Near] = {}
    for record in train:
        for turn in dict.fromkeys(record.turns):
            ngrams = _ngrams(turn)
            common = Counter(number for ngram in ngrams for number in having.get(ngram, ()))
            for number, count in common.items():
                similarity = count / (len(ngrams) + len(asked[number]) - count)
                if similarity >= max(SIMILAR, found[number].similarity + 1e-9 if number in found else 0):
                    found[number] = Near(held_out[number], record, similarity)
    return [found[number] for number in sorted(found)]


def _ngrams(question: str) -> frozenset[str]:
    """Runs of four characters, or of two if the question is in Chinese, where a character is a word."""
    length = 2 if _CJK.search(question) else 4
    return frozenset(question[start : start + length] for start in range(max(1, len(question) - length + 1)))
