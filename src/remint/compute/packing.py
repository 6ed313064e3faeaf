"""Turn conversations into rows of tokens: shift the targets inside each document, then pack the documents uncut.

A target is at the position that predicts its token and never crosses a document boundary, so packing cannot change the
loss. Position ids restart with every document; attention derives the document boundaries from them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from remint.model.template import Conversation

IGNORED = -100


@dataclass(frozen=True)
class Document:
    """Token ids of one conversation, and for each position the id to predict or IGNORED (both int32, same length).

    With `is_held`, the model is held to the base at the supervised positions, instead of learning their targets. `base`
    is what the base says there, once it was asked: ids (int32) and log-probabilities (float32) of the most likely
    tokens, both of shape (learned, TOP).
    """

    ids: np.ndarray
    targets: np.ndarray
    is_held: bool = False
    base: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def learned(self) -> int:
        """Number of supervised tokens."""
        return int((self.targets != IGNORED).sum())


def encode(tokenizer: Any, conversation: Conversation, rows: Iterable[Mapping[str, Any]]) -> list[Document]:
    """One document per row, in order. Equal rows share one Document object, so copies cost neither time nor memory."""
    known: dict[tuple[tuple[str, str], ...], Document] = {}
    documents = []
    for row in rows:
        key = tuple((message["role"], message["content"]) for message in row["messages"])
        if key not in known:
            ids, learned = conversation.encode(tokenizer, row["messages"])
            known[key] = document(ids, learned)
        documents.append(known[key])
    return documents


def document(ids: Sequence[int], learned: Sequence[bool]) -> Document:
    """Shift the targets: the target at a position is the next token if that token is supervised, else IGNORED."""
    tokens = np.asarray(ids, dtype=np.int32)
    targets = np.full(len(tokens), IGNORED, dtype=np.int32)
    targets[:-1] = np.where(np.asarray(learned[1:], dtype=bool), tokens[1:], IGNORED)
    return Document(tokens, targets)


def cut(documents: Sequence[Document], max_length: int) -> list[Document]:
    """Documents of at most `max_length` tokens. A longer one is split into several; no token and no target is lost.

    Copies of one document share its pieces.
    """
    pieces: dict[int, list[Document]] = {}
    for whole in documents:
        if id(whole) not in pieces:
            parts = [slice(start, start + max_length) for start in range(0, len(whole.ids), max_length)]
            pieces[id(whole)] = [Document(whole.ids[part], whole.targets[part], whole.is_held) for part in parts]
    return [piece for whole in documents for piece in pieces[id(whole)]]


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack all documents, uncut, into few rows of at most `max_length` tokens, by best-fit decreasing.

    Returns for each row its indices into `lengths`. The time is linear in the number of documents: rows are indexed by
    their free space, with one bit for each value that occurs. Johnson (1974) bounds the number of rows by 11/9 of the
    optimum, plus one.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(max_length + 1)]
    occupied = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = occupied >> lengths[index]
        if fitting:
            space = lengths[index] + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                occupied ^= 1 << space
        else:
            space, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        left = space - lengths[index]
        by_space[left].append(row)
        occupied |= 1 << left
    return rows


def epoch_rows(lengths: Sequence[int], max_length: int, packing: bool, seed: int, epoch: int) -> list[list[int]]:
    """The rows of one epoch in training order, each a list of document indices: a pure function of its arguments."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if not packing:
        return [[int(index)] for index in order]
    packed = pack([lengths[index] for index in order], max_length)
    return [[int(order[i]) for i in packed[row]] for row in random.permutation(len(packed))]


Batch = dict[str, torch.Tensor]


def collate(rows: Sequence[Sequence[Document]]) -> Batch:
    """A batch of rows: input_ids, position_ids and labels (the targets), int64 of shape (rows, longest row).

    `starts` (int32, documents + 1) are the starts of the documents in the flattened batch, and its end. `learned`
    (int64) are the flat positions that have a target. Padding is a document of its own at the end of a row, with ids 0
    and no target: causal attention and the restarted positions hide it from all other documents.

    If the model is held to the base in a document, the batch has four more tensors, as in `teacher.Teacher`: `hard` and
    `soft` (int64) index `learned`, and `base_ids` (int64) and `base_log_probs` (fp32) belong to the soft positions.
    """
    width = max(sum(len(doc.ids) for doc in row) for row in rows)
    batch = {name: np.zeros((len(rows), width), dtype=np.int64) for name in ("input_ids", "position_ids", "labels")}
    batch["labels"][:] = IGNORED
    lengths = []
    for number, row in enumerate(rows):
        start = 0
        for doc in row:
            end = start + len(doc.ids)
            batch["input_ids"][number, start:end] = doc.ids
            batch["labels"][number, start:end] = doc.targets
            batch["position_ids"][number, start:end] = np.arange(end - start)
            start = end
            lengths.append(len(doc.ids))
        batch["position_ids"][number, start:] = np.arange(width - start)
        lengths += [width - start] if width > start else []
    return {
        **{name: torch.from_numpy(array) for name, array in batch.items()},
        "starts": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "learned": torch.from_numpy(np.flatnonzero(batch["labels"] != IGNORED)),
        **_of_base([doc for row in rows for doc in row]),
    }


def _of_base(documents: Sequence[Document]) -> Batch:
    held = [doc.base for doc in documents if doc.base is not None]
    if not held:
        return {}
    soft = np.concatenate([np.full(doc.learned, doc.base is not None) for doc in documents])
    return {
        "hard": torch.from_numpy(np.flatnonzero(~soft)),
        "soft": torch.from_numpy(np.flatnonzero(soft)),
        "base_ids": torch.from_numpy(np.concatenate([ids for ids, _ in held]).astype(np.int64)),
        "base_log_probs": torch.from_numpy(np.concatenate([log_probs for _, log_probs in held])),
    }


def moved(batch: Batch, where: torch.device) -> Batch:
    """The batch with its tensors moved to a device."""
    return {name: value.to(where) for name, value in batch.items()}
