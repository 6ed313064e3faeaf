"""A conversation with the merged model, one question after the other."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from remint.compute.generation import Sampling, decode, generate
from remint.core.errors import RemintError, got, visible
from remint.core.files import is_encodable
from remint.core.signals import Terminated
from remint.model import loading, template
from remint.model.template import Message


class Streamer(BaseStreamer):
    """Prints an answer while it is generated. It keeps the ids, so that an interrupted answer is not lost."""

    def __init__(self, tokenizer: Any, out: TextIO | None):
        self.ids: list[int] = []
        self._tokenizer, self._out = tokenizer, out
        self._printed, self._prompt_seen = "", False

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt (first call), then one new id per call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self._show(decode(self._tokenizer, self.ids))

    def end(self) -> None:
        """Print nothing: an incomplete character at the end of an answer is not text."""

    def _show(self, text: str) -> None:
        if self._out is None or not text.startswith(self._printed):
            return
        self._out.write(visible(text[len(self._printed) :]))
        self._out.flush()
        self._printed = text


@dataclass
class Speaker:
    """A model with the conversation so far."""

    model: Any
    tokenizer: Any
    conversation: Any
    sampling: Any
    max_new_tokens: int
    system: str | None = None
    history: list[Message] = field(default_factory=list)

    def answer(self, question: str, out: TextIO | None = None) -> dict[str, Any]:
        """Answer a question: stream the text to `out`, append both to the history. Ctrl-C keeps the text so far.

        Returns the answer, the numbers of tokens, and why generation ended: end, length or interrupt.
        Raises RemintError if the text is not UTF-8 or too long for the context.
        """
        if not is_encodable(question + (self.system or "")):
            raise RemintError(f"chat: the text must be UTF-8, {got(question)}; set the terminal or the file to UTF-8")
        self.history.append({"role": "user", "content": question})
        prompt = self._fitting_prompt()
        streamer = Streamer(self.tokenizer, out)
        stopped = False
        try:
            stop = self.conversation.stop_ids(self.tokenizer)
            ids = generate(self.model, stop, [prompt], self.max_new_tokens, self.sampling, streamer)[0]
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated):
                raise
            ids, stopped = streamer.ids, True
        text = decode(self.tokenizer, ids)
        self.history.append({"role": "assistant", "content": text})
        return {
            "question": question,
            "answer": text,
            "prompt_tokens": len(prompt),
            "answer_tokens": len(ids),
            "stopped": "interrupt" if stopped else "length" if len(ids) >= self.max_new_tokens else "end",
        }

    def reset(self) -> None:
        """Forget the conversation."""
        self.history.clear()

    def _fitting_prompt(self) -> list[int]:
        """The prompt. If it exceeds the context, the oldest turns are dropped and a note is printed."""
        limit = self.model.config.max_position_embeddings - self.max_new_tokens
        start = [{"role": "system", "content": self.system}] if self.system is not None else []
        while True:
            prompt: list[int] = self.conversation.prompt(self.tokenizer, [*start, *self.history])
            if len(prompt) <= limit or len(self.history) <= 1:
                break
            del self.history[:2]
            print("(the oldest turn no longer fits and is forgotten)", file=sys.stderr)
        if len(prompt) > limit:
            self.history.pop()
            raise RemintError(f"chat: the question has {len(prompt)} tokens, at most {limit} fit; shorten it")
        return prompt


def load(folder: Path, sampling: Sampling, seed: int, max_new_tokens: int, system: str | None) -> Speaker:
    """Load the model in `folder`, ready to answer. Raises RemintError if there is none."""
    if not (folder / "config.json").is_file():
        raise RemintError(f"{folder}: no model there; `make repro` builds it")
    torch.manual_seed(seed)
    tokenizer = loading.load_tokenizer(folder)
    model = loading.load_model(folder, torch.float32, loading.device())
    return Speaker(model, tokenizer, template.load(folder), sampling, max_new_tokens, system)
