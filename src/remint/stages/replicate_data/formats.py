"""Read the supported data formats: Alpaca, OpenAI, ShareGPT and XTuner. Reports all faults of a file at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remint.core.errors import DataError, got, listed
from remint.core.files import is_encodable, parse_json, read_text
from remint.identity import mentions

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One conversation of a source file.

    A right answer states one of `accept`; () if the file lists none. `topic` is the record's `kind`, like "greeting".
    """

    messages: Messages
    accept: tuple[str, ...] = ()
    topic: str = ""


_MAX_BYTES = 4 * 2**30  # enough for a million long records; a file is read into memory at once
_ONE_KEY = "keep one of the two"
_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read(path: Path, answered: bool = True) -> list[Example]:
    """The examples of a JSON list or JSONL file. Messages are {'role', 'content'} and end with the assistant's answer.

    If not all are `answered`, a record may end with the question; its answer is then the empty text.

    Raises DataError that lists every fault: file, record, field, what was found and what to do.
    """
    records, examples, faults = _records(path), [], []
    for number, record in enumerate(records, start=1):
        try:
            examples.append(_example(record, answered))
        except DataError as error:
            faults += [f"{path}: record {number}: {fault}" for fault in error.faults]
    if not records:
        faults = [f"{path}: holds no records; write at least one, or remove the file from replicate_data"]
    if faults:
        raise DataError(*listed(faults))
    return examples


def _example(record: Any, answered: bool) -> Example:
    messages = _conversation(record, answered)
    accept = record.get("accept", [])
    if not isinstance(accept, list) or not all(
        isinstance(text, str) and text.strip() and is_encodable(text) for text in accept
    ):
        raise DataError(f"field 'accept': must be a list of texts, {got(accept)}; list what makes an answer right")
    asked = " ".join(message["content"] for message in messages[:-1])
    given = [text for text in accept if mentions(asked, text)]
    if given:
        raise DataError(f"field 'accept': the question itself contains {given[0][:60]!r}; reword the question")
    if faults := _optional_text_faults(record, "kind"):
        raise DataError(*faults)
    return Example(messages, tuple(accept), (record.get("kind") or "").strip())


def _records(path: Path) -> list[Any]:
    cure = "put the file there or change replicate_data in params.yaml"
    text = read_text(path, cure, DataError, _MAX_BYTES)
    if not text.strip():
        return []
    if path.suffix == ".jsonl":
        return list(_lines(path, text))
    hint = (
        "if the file has one record per line, give it the suffix .jsonl"
        if text.lstrip().startswith("{")
        else "fix it there or on the line before"
    )
    records = parse_json(text, str(path), hint, DataError, one_key=_ONE_KEY)
    if not isinstance(records, list):
        raise DataError(f"{path}: must be a list of records, {got(records)}; put [ and ] around the records")
    return records


def _lines(path: Path, text: str) -> Iterator[Any]:
    faults: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            where = f"{path}: line {number}"
            yield parse_json(line, where, "write one complete record per line", DataError, one_key=_ONE_KEY)
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError(*listed(faults))


def _conversation(record: Any, answered: bool) -> Messages:
    if not isinstance(record, dict):
        raise DataError(f"must be an object with fields, {got(record)}; see data/source for examples")
    if "messages" in record:
        return _turns(record, "messages", "role", "content", {role: role for role in _ROLES}, answered)
    if "conversations" in record:
        return _turns(record, "conversations", "from", "value", _SHAREGPT_ROLES, answered)
    if "conversation" in record:
        return _xtuner(record)
    if "instruction" in record or "output" in record:
        return _alpaca(record, answered)
    raise DataError(
        f"has none of the known fields, {got(sorted(record))}; use instruction/input/output (alpaca), "
        "messages (OpenAI), conversations (ShareGPT) or conversation (XTuner)"
    )


def _alpaca(record: dict[str, Any], answered: bool) -> Messages:
    faults = []
    for field in ("instruction", "output") if answered else ("instruction",):
        faults += _text_faults(record, field)
    for field in ("input", "system") if answered else ("input", "system", "output"):
        faults += _optional_text_faults(record, field)
    if faults:
        raise DataError(*faults)
    # Without an input, no newline follows the question: training and chat must see the same text.
    question = "\n".join(part for part in (record["instruction"].strip(), (record.get("input") or "").strip()) if part)
    system = (record.get("system") or "").strip()
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": question},
        {"role": "assistant", "content": (record.get("output") or "").strip()},
    ]


def _xtuner(record: dict[str, Any]) -> Messages:
    """The messages of a list of turns, each with a question and its answer. The first turn may have a system prompt."""
    turns = record["conversation"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"field 'conversation': must be a list of objects, {got(turns)}; write input and output in each"
        )
    messages, faults = [], []
    for index, turn in enumerate(turns):
        found = [*_text_faults(turn, "input"), *_text_faults(turn, "output"), *_optional_text_faults(turn, "system")]
        system = "" if found else (turn.get("system") or "").strip()
        if index and system:
            found.append(f"field 'system': only the first turn may have one, {got(system)}; move it there")
        if turn.get("output_with_loss", True) is not True:
            found.append("field 'output_with_loss': every answer is trained on here, got false; remove the turn")
        faults += [f"turn {index + 1} of 'conversation': {fault}" for fault in found]
        if not found:
            messages += [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": turn["input"].strip()})
            messages.append({"role": "assistant", "content": turn["output"].strip()})
    if faults:
        raise DataError(*faults)
    return messages


def _turns(
    record: dict[str, Any], field: str, role_key: str, text_key: str, roles: dict[str, str], answered: bool
) -> Messages:
    turns = record[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"field {field!r}: must be a list of turns, {got(turns)}; write at least a question and an answer"
        )
    messages, faults = [], []
    for index, turn in enumerate(turns):
        where = f"field '{field}[{index}]'"
        if not isinstance(turn, dict):
            faults.append(f"{where}: must be an object, {got(turn)}; write {{{role_key!r}: …, {text_key!r}: …}}")
        elif not isinstance(turn.get(role_key), str) or turn[role_key] not in roles:
            faults.append(
                f"{where}: {role_key!r} must be one of {', '.join(roles)}, {got(turn.get(role_key))}; rename the role"
            )
        else:
            faults += [f"{where}: {fault}" for fault in _text_faults(turn, text_key)]
            messages.append({"role": roles[turn[role_key]], "content": str(turn.get(text_key)).strip()})
    if not (answered or faults) and messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": ""})
    faults = faults or _order_faults(field, [message["role"] for message in messages])
    if faults:
        raise DataError(*faults)
    return messages


def _order_faults(field: str, roles: list[str]) -> list[str]:
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken and spoken == ["user", "assistant"] * (len(spoken) // 2):
        return []
    return [
        f"field {field!r}: turns must alternate user, assistant, … after at most one system prompt "
        f"and end with the assistant, {got(', '.join(roles))}; reorder or drop turns"
    ]


def _text_faults(record: dict[str, Any], field: str) -> list[str]:
    if field not in record:
        return [f"field {field!r}: missing, {got(sorted(record))}; add it"]
    if not isinstance(record[field], str):
        cure = "put it in quotes" if isinstance(record[field], (int, float)) else "write a single string"
        return [f"field {field!r}: must be text, {got(record[field])}; {cure}"]
    if not record[field].strip():
        return [f"field {field!r}: is empty; write the text or drop the record"]
    return _encoding_faults(record, field)


def _optional_text_faults(record: dict[str, Any], field: str) -> list[str]:
    if record.get(field) is not None and not isinstance(record[field], str):
        return [f"field {field!r}: must be text or absent, {got(record[field])}; put it in quotes"]
    return _encoding_faults(record, field) if record.get(field) else []


def _encoding_faults(record: dict[str, Any], field: str) -> list[str]:
    if is_encodable(record[field]):
        return []
    return [f"field {field!r}: holds half of a surrogate pair, {got(record[field])}; type the character again"]
