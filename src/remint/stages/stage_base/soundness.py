"""Whether a base can be used at all: weights that are numbers, and a tokenizer that gives a text back."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from remint.core.errors import ArtefactError, got, listed
from remint.core.files import read_object
from remint.model import description

_GENERATION = "generation_config.json"
_SAMPLE = "Who are you? I am model 7."


class WeightFaults:
    """Collects tensors that are there twice or have values that are no finite numbers, and tied tensors that differ."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._faults: list[str] = []
        self._tied: dict[str, str] = {}
        self._names: set[str] = set()

    def look(self, name: str, stored: torch.Tensor, cast: torch.Tensor) -> None:
        """Look at one tensor, as the source stores it and after the cast to the dtype of `data/base`."""
        # NaN is the smallest and the largest of any values with a NaN. Counting them all takes 20 times as long.
        if not cast.numel() or all(end.isfinite() for end in torch.aminmax(cast)):
            return
        bad = cast.numel() - int(cast.isfinite().sum())
        before = stored.numel() - int(stored.isfinite().sum())
        if before:
            self._faults.append(
                f"base: tensor {name}: {before} of {stored.numel()} values are NaN or infinite; get the base model again"
            )
        else:
            kind = str(self._dtype).removeprefix("torch.")
            largest = float(stored.abs().max())
            self._faults.append(
                f"base: tensor {name}: {bad} of {stored.numel()} values are too large for {kind}, {got(largest)}; "
                "set `dtype: bfloat16` or `dtype: float32` in conf/model/<name>.yaml"
            )

    def look_at_name(self, name: str) -> None:
        """Remember the name of a tensor, which no other tensor may have, also not in another shard."""
        if name in self._names:
            self._faults.append(
                f"base: tensor {name}: is there twice, in one shard or in two; get the base model again"
            )
        self._names.add(name)

    def look_at_tied(self, name: str, cast: torch.Tensor) -> None:
        """Remember the output head or the embedding of a model whose config.json says that both are one tensor."""
        data = cast.contiguous().view(torch.uint8).numpy()
        self._tied[name] = hashlib.sha256(data.data).hexdigest()

    def check(self) -> None:
        """Raise ArtefactError that lists every fault found."""
        if len(set(self._tied.values())) > 1:
            self._faults.append(
                f"base: config.json has tie_word_embeddings true, but {' and '.join(sorted(self._tied))} differ, got two "
                "tensors; set it to false, or get the base model again"
            )
        if self._faults:
            raise ArtefactError(*listed(self._faults))


def check_generation_config(folder: Path, vocabulary: int) -> None:
    """Raise ArtefactError if the folder's generation_config.json names a token that the model does not have."""
    path = folder / _GENERATION
    if os.path.lexists(path):
        content = read_object(path, "get the file again")
        if faults := list(description.token_faults(content, vocabulary)):
            raise ArtefactError(*(f"{path}: {fault}; get the file again" for fault in faults))


def check_tokenizer(tokenizer: Any, rows: int) -> None:
    """Raise ArtefactError if the tokenizer cannot encode a text, cannot give it back, or has ids without an embedding.

    `rows` is the number of embedding rows.
    """
    if faults := list(_tokenizer_faults(tokenizer, rows)):
        raise ArtefactError(*(f"base: the tokenizer {fault}; get the base model again" for fault in faults))


def _tokenizer_faults(tokenizer: Any, rows: int) -> Iterator[str]:
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        yield "has an empty vocabulary, got 0 tokens"
        return
    if len(vocabulary) > rows:
        yield f"has {len(vocabulary)} tokens, the embedding {rows} rows, so they do not match"
    elif (largest := max(vocabulary.values())) >= rows:
        token = next(token for token, index in vocabulary.items() if index == largest)
        yield f"gives {token[:40]!r} the id {largest}, the embedding has only {rows} rows, so they do not match"
    ids = tokenizer.encode(_SAMPLE, add_special_tokens=False)
    if not ids:
        yield f"encodes {_SAMPLE!r} to no token, got []"
    elif tokenizer.unk_token_id is not None and all(index == tokenizer.unk_token_id for index in ids):
        yield f"knows no part of {_SAMPLE!r}, got only {tokenizer.unk_token!r}"
    elif (text := tokenizer.decode(ids, skip_special_tokens=True)).strip() != _SAMPLE:
        yield f"does not give {_SAMPLE!r} back, {got(text)}"
