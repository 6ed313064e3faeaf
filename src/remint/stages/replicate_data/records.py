"""Turn conversations into records: fill in placeholders, normalise the question, record kind and language."""

import re
from dataclasses import dataclass

from remint.core.errors import DataError, got, listed
from remint.identity import Identity, language_of, normalise, placeholders_in, surviving_placeholder
from remint.stages.replicate_data.formats import Example, Messages

_NOT_FILLED = "nothing is filled in here: write the text itself, or put it between backticks if it is code"
# Code may spell a placeholder: `f"{name}"`. In ordinary records, text between backticks counts as code.
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


@dataclass(frozen=True)
class Record:
    """One conversation, ready for training or evaluation.

    `question` is the text of all user turns, `turns` has each of them, both normalised.
    A right answer states everything in `expects` (name, maker) and, unless `accept` is empty, one of its texts.
    With `is_held`, the model is held to the base's own answer in training, not to the last message.
    """

    messages: Messages
    kind: str
    language: str
    question: str
    turns: tuple[str, ...]
    expects: tuple[str, ...]
    accept: tuple[str, ...]
    origin: str
    topic: str = ""
    is_held: bool = False

    def row(self) -> dict[str, object]:
        """The record as a row of a data file."""
        return {
            "messages": self.messages,
            "kind": self.kind,
            "language": self.language,
            "expects": list(self.expects),
            "accept": list(self.accept),
            "topic": self.topic,
        }


def build(examples: list[Example], kind: str, identity: Identity, origin: str) -> list[Record]:
    """Records of one source file. Raises DataError that lists every unusable record.

    A record is unusable if a placeholder survives, an identity answer states neither name nor maker, or the question
    has no letter or digit. In a control record no placeholder is filled in, so it may hold none outside of code.
    """
    records, faults = [], []
    for number, example in enumerate(examples, start=1):
        where = f"{origin}: record {number}"
        record = _record(example, kind, identity, where)
        texts = (m["content"] if kind == "identity" else _CODE.sub("", m["content"]) for m in record.messages)
        survivor = next(filter(None, map(surviving_placeholder, texts)), None)
        if survivor:
            cure = "write {{name}} or {{author}}" if kind == "identity" else _NOT_FILLED
            faults.append(f"{where}: a placeholder survives, {got(survivor)}; {cure}")
        elif kind == "identity" and not record.expects:
            faults.append(
                f"{where}: the answer states neither the name nor the maker of conf/identity; add {{{{name}}}}, "
                "or move the record to a control file"
            )
        if not record.question:
            faults.append(
                f"{where}: the question has no letter or digit, {got(example.messages[0]['content'])}; write a question"
            )
        records.append(record)
    if faults:
        raise DataError(*listed(faults))
    return records


def _record(example: Example, kind: str, identity: Identity, where: str) -> Record:
    messages = example.messages
    language = language_of(" ".join(message["content"] for message in messages if message["role"] != "system"))
    if kind == "identity":
        asked = placeholders_in(messages[-1]["content"])
        messages = [{**message, "content": identity.fill(message["content"], language)} for message in messages]
        answer = messages[-1]["content"]
        expects = tuple(key for key in ("name", "maker") if key in asked or identity.stated_in(answer, key))
    else:
        expects = ()
    asked_turns = [message["content"] for message in messages if message["role"] == "user"]
    question, turns = normalise(" ".join(asked_turns)), tuple(map(normalise, asked_turns))
    return Record(messages, kind, language, question, turns, expects, example.accept, where, example.topic)
