"""Records that hold the model to the base: the base's own answers, and what it says at each of their tokens.

The base is the model of this run before its first step: LoRA's B is zero then, so the adapter adds nothing. Both results
are kept in the scratch folder, for a run that continues and for other runs with the same base and records.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from remint.compute.generation import answer_ids, decode
from remint.compute.loss import SupervisedLoss, taught
from remint.compute.packing import Document, document, encode, pack
from remint.core import manifest
from remint.core.draft import artefact
from remint.core.errors import ArtefactError, SettingsError, Stopped
from remint.core.files import read_rows
from remint.model.template import Conversation
from remint.stages.train.loop import autocast
from remint.stages.train.process_group import ProcessGroup
from remint.stages.train.settings import Train

# The file in the artefact `checkpoint` with the base's answers, if a record holds the model to the base.
ANSWERS = "base_answers.jsonl"
_LIKELY = "likely.safetensors"
# Prompts that the base answers together. A fixed number: padding changes the rounding.
_BATCH = 32

Row = Mapping[str, Any]
History = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Answer:
    """The base's own answer to a prompt. A length limit cut it off if it is not `finished`."""

    text: str
    finished: bool


Answers = dict[History, Answer]


@dataclass(frozen=True)
class Base:
    """The base of a run, before the first step.

    The first process of `group` asks it and writes the results into the folder `cache`; all processes read them there.
    """

    model: SupervisedLoss
    tokenizer: Any
    conversation: Conversation
    train: Train
    folder: Path
    cache: Path
    conditions: Mapping[str, Any]
    group: ProcessGroup
    signals: Sequence[int]

    def ask(self, rows: Sequence[Row], known: Answers) -> Answers:
        """The base's greedy answers to the prompts of the rows that hold the model to it, except the `known` ones."""
        unknown = list(dict.fromkeys(key for row in rows if is_held(row) and (key := history(row)) not in known))
        if not unknown:
            return {}
        folder = self._cached("answers", unknown, lambda draft: _write_rows(draft, self._asked(unknown)))
        return {_key(row["history"]): Answer(row["answer"], row["finished"]) for row in read_rows(folder / ANSWERS)}

    def teach(self, documents: Sequence[Document]) -> list[Document]:
        """The documents; those that hold the model to the base get what it says at their supervised tokens."""
        unique = list({id(doc): doc for doc in documents if doc.is_held}.values())
        if not unique:
            return list(documents)
        content = [manifest.digest(b"".join((doc.ids.tobytes(), doc.targets.tobytes()))) for doc in unique]
        folder = self._cached("likely", content, lambda draft: save_file(self._likely(unique), draft / _LIKELY))
        tensors, ends = load_file(folder / _LIKELY), np.cumsum([doc.learned for doc in unique])[:-1]
        parts = zip(unique, *(np.split(tensors[name], ends) for name in ("ids", "log_probs")), strict=True)
        known = {id(doc): replace(doc, base=(ids, log_probs)) for doc, ids, log_probs in parts}
        return [known.get(id(doc), doc) for doc in documents]

    def _asked(self, histories: Sequence[History]) -> Answers:
        tokens = self.train.distillation.tokens
        messages = [_messages(key) for key in histories]
        with self.model.answering(), self._progress("the base answers", len(histories), "answer") as bar:

            def done(count: int) -> None:
                bar.update(count)
                self._check_signals()

            self.model.eval()
            model = self.model.model
            rows = answer_ids(model, self.tokenizer, self.conversation, messages, tokens, _BATCH, done)
        return {
            key: Answer(decode(self.tokenizer, ids), len(ids) < tokens)
            for key, ids in zip(histories, rows, strict=True)
        }

    def _likely(self, documents: Sequence[Document]) -> dict[str, np.ndarray]:
        """Ids (int32) and log-probabilities (fp32) at the supervised tokens of all documents, one after the other."""
        rows = len(pack([len(doc.ids) for doc in documents], self.train.max_length))
        with self._progress("the base says", rows, "row") as bar:

            def done(count: int) -> None:
                bar.update(count)
                self._check_signals()

            with autocast(self.train, next(self.model.parameters()).device):
                found = taught(self.model, documents, self.train.max_length, self.train.micro_batch, done)
        said = [doc.base for doc in found if doc.base is not None]
        return {name: np.concatenate([part[i] for part in said]) for i, name in enumerate(("ids", "log_probs"))}

    def _cached(self, what: str, content: Any, write: Callable[[Path], object]) -> Path:
        """The folder with a result for `content`. The first process makes it, unless it is there already."""
        settings = {name: getattr(self.train, name) for name in ("precision", "kernels", "max_length", "micro_batch")}
        key = {
            **settings,
            "base": content_digest(self.folder),
            "content": content,
            "tokens": self.train.distillation.tokens,
            "quantization": asdict(self.train.quantization),
            "template": asdict(self.conversation),
            "conditions": self.conditions,
        }
        folder = self.cache / f"{what}-{manifest.digest(key)}"
        if self.group.leads and not _is_whole(folder, what):
            with artefact(folder, what) as (draft, _):
                write(draft)
        self.group.agreed(0)
        manifest.verify(folder, what)
        return folder

    def _progress(self, what: str, total: int, unit: str) -> Any:
        return tqdm(total=total, unit=unit, desc=f"train: {what}", dynamic_ncols=True)

    def _check_signals(self) -> None:
        if self.signals:
            raise Stopped("train: stopped before the first step; the same command starts anew", 128 + self.signals[0])


def is_held(row: Row) -> bool:
    """Whether training holds the model to the base in this row of train.jsonl."""
    return bool(row.get("target") == "base")


def history(row: Row) -> History:
    """The messages before the answer, as a key."""
    return _key(row["messages"][:-1])


def known_answers(rows: Sequence[Row]) -> Answers:
    """The base's answers that the rows have already."""
    found = {history(row): row["base_answer"] for row in rows if is_held(row) and row["base_answer"]}
    return {key: Answer(answer["text"], answer["finished"]) for key, answer in found.items()}


def documents(
    rows: Sequence[Row], answers: Answers, tokenizer: Any, conversation: Conversation, train: Train
) -> list[Document]:
    """One document per row, as `packing.encode` makes them; one that holds the model to the base has its answer.

    Of that answer, the first `train.distillation.tokens` tokens are supervised, and the others are left out. The row's
    own answer stands in for one that is not in `answers` yet.
    """
    learned = iter(encode(tokenizer, conversation, (row for row in rows if not is_held(row))))
    own = {history(row): Answer(row["messages"][-1]["content"], True) for row in rows if is_held(row)}
    held = {
        key: _document(key, answers.get(key, answer), tokenizer, conversation, train) for key, answer in own.items()
    }
    return [held[history(row)] if is_held(row) else next(learned) for row in rows]


def _document(key: History, answer: Answer, tokenizer: Any, conversation: Conversation, train: Train) -> Document:
    messages = _messages(key)
    start = len(conversation.prompt(tokenizer, messages))
    ids, learned = conversation.encode(tokenizer, [*messages, {"role": "assistant", "content": answer.text}])
    end = len(learned) - learned[::-1].index(True)
    if not answer.finished:  # the base did not say that its answer ends here
        end -= len(conversation.end_ids(tokenizer))
    end = min(end, start + train.distillation.tokens)
    return replace(document(ids[:end], [index >= start for index in range(end)]), is_held=True)


def as_rows(answers: Answers) -> list[dict[str, Any]]:
    """Answers as rows of a file: the messages before the answer, its text, and whether it is finished."""
    return [
        {"history": _messages(key), "answer": answer.text, "finished": answer.finished}
        for key, answer in answers.items()
    ]


def dump_rows(rows: Sequence[Row]) -> str:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def content_digest(base: Path) -> str:
    """A digest (sha256, hex) of the files of the base, whatever settings and code made them."""
    return manifest.digest(manifest.read_files(base))


def check_answered_by(base: Path, dataset: Mapping[str, Any]) -> None:
    """Raise SettingsError if the dataset, by the facts of its manifest, has the answers of another base."""
    if (known := dataset.get("base_answers")) and known["base"] != content_digest(base):
        raise SettingsError(
            "params: replicate_data.base_answers: must hold the answers of the base in params.yaml, got those of another "
            "one; set it to null, so that training asks the base, and keep its answers by `remint answers`"
        )


def _key(messages: Sequence[Mapping[str, str]]) -> History:
    return tuple((message["role"], message["content"]) for message in messages)


def _messages(key: History) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in key]


def _write_rows(draft: Path, answers: Answers) -> None:
    (draft / ANSWERS).write_text(dump_rows(as_rows(answers)), encoding="utf-8")


def _is_whole(folder: Path, what: str) -> bool:
    try:
        manifest.verify(folder, what)
    except ArtefactError:
        return False
    return True
