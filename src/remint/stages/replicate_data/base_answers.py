"""The base's own answers to ordinary prompts, from a file that `remint answers` wrote."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remint.core.errors import DataError, got, listed
from remint.core.files import is_encodable, parse_json, read_text
from remint.identity import speaks
from remint.stages.replicate_data.records import Record

# At least this share of the answers must be in the language of the prompt. The base teaches nothing in a language that
# it does not speak.
_SPOKEN = 0.8
_CURE = "write it with `remint answers`, or set replicate_data.base_answers to null: training then asks the base"
_FIELDS = ("history", "answer", "finished")

History = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Answer:
    """What the base answered. A length limit cut it off if it is not `finished`."""

    text: str
    finished: bool


@dataclass(frozen=True)
class BaseAnswers:
    """Answers of one base by the messages before them. `base` is the digest of the artefact `base` that gave them."""

    base: str
    known: Mapping[History, Answer]

    def of(self, record: Record) -> Answer | None:
        """The answer to a record's prompt, or None if the file has none."""
        return self.known.get(history(record.messages[:-1]))


def history(messages: Iterable[Mapping[str, str]]) -> History:
    """Messages as a key."""
    return tuple((message["role"], message["content"]) for message in messages)


def read(path: Path) -> BaseAnswers:
    """Read a file of answers: {"base": digest, "base_name": …, "answers": [{"history", "answer", "finished"}, …]}.

    Raises DataError that lists every fault.
    """
    content = parse_json(read_text(path, _CURE, DataError), str(path), _CURE, DataError)
    if not isinstance(content, dict) or not isinstance(content.get("base"), str):
        raise DataError(f"{path}: must be an object with the digest of a base, {got(content)}; {_CURE}")
    rows = content.get("answers")
    if not isinstance(rows, list):
        raise DataError(f"{path}: field 'answers': must be a list, {got(rows)}; {_CURE}")
    if wrong := [number for number, row in enumerate(rows, start=1) if not _is_answer(row)]:
        raise DataError(
            *listed(f"{path}: answer {number}: must have {', '.join(_FIELDS)}; {_CURE}" for number in wrong)
        )
    known = {history(row["history"]): Answer(row["answer"], row["finished"]) for row in rows}
    return BaseAnswers(content["base"], known)


def _is_answer(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("history"), list):
        return False
    texts = [row.get("answer")]
    for message in row["history"]:
        texts += [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
    return isinstance(row.get("finished"), bool) and all(isinstance(text, str) and is_encodable(text) for text in texts)


def check(records: Sequence[Record], answers: BaseAnswers | None) -> None:
    """Raise DataError for each file whose known answers are mostly in another language than its prompts."""
    if answers is None:
        return
    by_file: dict[str, list[bool]] = {}
    for record in records:
        if record.is_held and (found := answers.of(record)) is not None:
            name = record.origin.rpartition(": record ")[0]
            by_file.setdefault(name, []).append(speaks(found.text, record.language))
    faults = [
        f"{name}: the base answers only {sum(spoken) / len(spoken):.0%} of the prompts in their language, which teaches "
        "it nothing; name the file in replicate_data.control, with reference answers"
        for name, spoken in sorted(by_file.items())
        if sum(spoken) / len(spoken) < _SPOKEN
    ]
    if faults:
        raise DataError(*faults)
