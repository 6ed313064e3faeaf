"""One conversation template for training, evaluation, chat and serving. It is stored with every model.

Conversations are tokenized turn by turn, not as one long string. Markers are tokenized as special tokens; text that a
user wrote is tokenized with special tokens switched off. So text that spells a marker never becomes one, and the loss
mask is known without a search for the start of an answer.

Text is tokenized together with the plain words of the markup before it ("user" and a newline), because some tokenizers
join pieces across that border or mark the start of a text. So the ids are the same as for the complete string. Only an
answer always starts with a new token, because the model has to generate it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from remint.core.errors import ArtefactError, got
from remint.core.files import is_encodable, read_object, read_rows
from remint.core.manifest import dump_json
from remint.core.settings import check_ranges

NAME = "template.json"
JINJA_NAME = "chat_template.jinja"

ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]


@dataclass(frozen=True)
class Turn:
    """The markup around one role's text."""

    before: str
    after: str


@dataclass(frozen=True)
class Template:
    """How a conversation becomes tokens. `end` closes an answer and is learned. Any token of `stop` ends generation."""

    bos: str
    system: Turn
    user: Turn
    assistant: Turn
    end: str
    stop: list[str]

    def __post_init__(self) -> None:
        check_ranges("model.template", (bool(self.end), "end", self.end, "must be the token that closes an answer"))
        check_ranges(
            "model.template", (self.end in self.stop, "stop", self.stop, f"must contain the end token {self.end!r}")
        )


@dataclass(frozen=True)
class Conversation:
    """A template and the default system prompt of conversations that have none ('' means no system turn)."""

    template: Template
    system: str

    def save(self, folder: Path) -> None:
        """Write template.json for this project and the same template as Jinja for transformers."""
        (folder / NAME).write_text(dump_json(asdict(self)), encoding="utf-8")
        (folder / JINJA_NAME).write_text(self.jinja(), encoding="utf-8")

    def with_system(self, system: str) -> "Conversation":
        """The same template with another default system prompt."""
        return replace(self, system=system)

    def messages(self, history: Sequence[Message]) -> list[Message]:
        """The conversation with the default system prompt in front, unless it has its own."""
        if self.system and (not history or history[0]["role"] != "system"):
            return [{"role": "system", "content": self.system}, *history]
        return list(history)

    def encode(self, tokenizer: Any, history: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a complete conversation and, for each id, whether it is learned: answers and their end tokens are."""
        ids: list[int] = []
        learned: list[bool] = []

        def add(piece: list[int], learn: bool) -> None:
            ids.extend(piece)
            learned.extend([learn] * len(piece))

        add(_markup(tokenizer, self.template.bos), False)
        for message in self.messages(history):
            turn: Turn = getattr(self.template, message["role"])
            is_answer = message["role"] == "assistant"
            before, content = _opened(tokenizer, turn.before, message["content"], apart=is_answer)
            add(before, False)
            add(content, is_answer)
            if is_answer:
                add(_markup(tokenizer, self.template.end), True)
            add(_markup(tokenizer, turn.after), False)
        return ids, learned

    def prompt(self, tokenizer: Any, history: Sequence[Message]) -> list[int]:
        """Ids up to the start of the assistant's next answer: the same prefix as in training."""
        ids, _ = self.encode(tokenizer, history)
        return ids + _markup(tokenizer, self.template.assistant.before)

    def stop_ids(self, tokenizer: Any) -> list[int]:
        """Ids that end an answer, in the template's order."""
        return [tokenizer.convert_tokens_to_ids(token) for token in self.template.stop]

    def end_ids(self, tokenizer: Any) -> list[int]:
        """Ids of the token that closes an answer."""
        return _markup(tokenizer, self.template.end)

    def jinja(self) -> str:
        """The template as Jinja, which transformers and other tools read. It renders the same text as `encode`."""
        t = self.template
        lines = [
            f"{{{{- {_quote(t.bos)} }}}}" if t.bos else "",
            "{%- if not messages or messages[0]['role'] != 'system' %}"
            f"{{{{- {_quote(t.system.before + self.system + t.system.after)} }}}}{{%- endif %}}"
            if self.system
            else "",
            "{%- for message in messages %}",
            *(
                f"{{%- {keyword} message['role'] == '{role}' %}}"
                f"{{{{- {_quote(turn.before)} + message['content'] + {_quote(after)} }}}}"
                for keyword, role, turn, after in (
                    ("if", "system", t.system, t.system.after),
                    ("elif", "user", t.user, t.user.after),
                    ("elif", "assistant", t.assistant, t.end + t.assistant.after),
                )
            ),
            "{%- else %}{{- raise_exception('unknown role ' + message['role']) }}{%- endif %}",
            "{%- endfor %}",
            f"{{%- if add_generation_prompt %}}{{{{- {_quote(t.assistant.before)} }}}}{{%- endif %}}",
        ]
        return "".join(lines) + "\n"


def load(folder: Path) -> Conversation:
    """The conversation template that is stored with an artefact. Raises ArtefactError if it is missing or not valid."""
    content = read_object(folder / NAME)
    try:
        fields = content["template"]
        turns = {role: Turn(**fields[role]) for role in ROLES}
        markup = (text for turn in turns.values() for text in (turn.before, turn.after))
        plain = [fields["bos"], fields["end"], *fields["stop"], content["system"], *markup]
        if not isinstance(fields["stop"], list) or not all(isinstance(text, str) for text in plain):
            raise TypeError("a field that is not text")
        return Conversation(Template(**{**fields, **turns}), content["system"])
    except (KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder / NAME}: is not a valid template, {got(str(error))}; make it again with `dvc repro`"
        ) from None


def read_conversations(path: Path) -> list[dict[str, Any]]:
    """The rows of a dataset's file. Raises ArtefactError if a row has no `messages` that a template can render."""
    rows = read_rows(path)
    wrong = [number for number, row in enumerate(rows, start=1) if not _is_conversation(row.get("messages"))]
    if wrong:
        raise ArtefactError(f"{path}: line {wrong[0]}: holds no conversation; make it again with `dvc repro`")
    return rows


def is_message(message: Any) -> bool:
    """Whether `message` has a role that a template knows and, as content, text that UTF-8 can encode."""
    return (
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
        and is_encodable(message["content"])
    )


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and all(map(is_message, messages))


def _markup(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def _opened(tokenizer: Any, before: str, content: str, apart: bool) -> tuple[list[int], list[int]]:
    """Ids of a turn's markup and of its text. With `apart`, no token covers a part of both."""
    markers = "|".join(re.escape(token) for token in sorted(tokenizer.added_tokens_encoder, key=len, reverse=True))
    words = re.split(markers, before)[-1] if markers else before
    start, whole = plain_ids(tokenizer, words), plain_ids(tokenizer, words + content)
    if whole[: len(start)] == start:
        return _markup(tokenizer, before), whole[len(start) :]
    if apart:
        return _markup(tokenizer, before), plain_ids(tokenizer, content)
    return _markup(tokenizer, before.removesuffix(words)), whole


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of text that a user wrote: a marker that it spells stays text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


def _quote(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)
