"""Talk to the merged model in a terminal, or answer one question for a program."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from remint import chat, modeling
from remint.chat import Message
from remint.core.config import check, places
from remint.core.errors import RemintError, got, visible
from remint.core.files import is_encodable
from remint.generation import Sampling, Streamer, decode, generate

_HELP = """\
/reset          forget the conversation
/retry          answer the last question again
/system TEXT    set the system text and start anew; without TEXT, go back to the trained one
/temperature X  0 always picks the likeliest word, higher values vary more
/history        show the conversation
/help           this list
/exit           leave (so does Ctrl-D); Ctrl-C stops an answer"""


def main(arguments: Sequence[str]) -> int:
    """`remint chat`: a conversation on a terminal, one answer a line in a pipe, one answer with --once."""
    options = _options(arguments)
    speaker = _speaker(options)
    if options.once is not None:
        return _once(speaker, options.once, options.json)
    if sys.stdin.isatty() and not options.json:
        return _conversation(speaker)
    return _pipe(speaker, sys.stdin, options.json)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="remint chat", description="Talk to the merged model.")
    parser.add_argument("--once", metavar="QUESTION", help="answer one question and leave")
    parser.add_argument("--json", action="store_true", help="print each answer as one JSON object")
    parser.add_argument("--model", type=Path, help="folder of the model (default: the pipeline's)")
    parser.add_argument("--system", help="system text (default: the trained one)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default: what was evaluated")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    return parser.parse_args(arguments)


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
        """Ask, stream the answer to `out`, remember both. Ctrl-C keeps what was said until then."""
        if not is_encodable(question + (self.system or "")):
            raise RemintError(f"chat: the text must be UTF-8, {got(question)}; set the terminal or the file to UTF-8")
        self.history.append({"role": "user", "content": question})
        prompt = self._fitting_prompt()
        streamer = Streamer(self.tokenizer, out)
        stopped = False
        try:
            stop = self.conversation.stop_ids(self.tokenizer)
            ids = generate(self.model, stop, [prompt], self.max_new_tokens, self.sampling, streamer)[0]
        except KeyboardInterrupt:
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
        """The prompt; where the context is too small for it, the oldest turns are left out, and the user is told."""
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


def _speaker(options: argparse.Namespace) -> Speaker:
    check(
        "chat",
        (options.max_new_tokens >= 1, "max_new_tokens", options.max_new_tokens, "must be 1 or more"),
        (0 <= options.seed < 2**63, "seed", options.seed, "must be at least 0 and below 2^63"),
    )
    folder = options.model or places().model
    if not (folder / "config.json").is_file():
        raise RemintError(f"{folder}: no model there; `make repro` builds it")
    sampling = Sampling(options.temperature, options.top_p, options.top_k)
    torch.manual_seed(options.seed)
    tokenizer = modeling.load_tokenizer(folder)
    model = modeling.load_model(folder, torch.float32, modeling.device())
    return Speaker(model, tokenizer, chat.load(folder), sampling, options.max_new_tokens, options.system)


def _once(speaker: Speaker, question: str, as_json: bool) -> int:
    if not question.strip():
        raise RemintError("chat: the question is empty, got ''; write one after --once")
    said = speaker.answer(question.strip())
    print(_as_json(said) if as_json else visible(said["answer"]))
    return 0


def _pipe(speaker: Speaker, lines: TextIO, as_json: bool) -> int:
    """Each line a turn of one conversation, each answer a line."""
    for line in lines:
        if line.strip():
            said = speaker.answer(line.strip())
            print(_as_json(said) if as_json else " ".join(visible(said["answer"]).split()), flush=True)
    return 0


def _as_json(said: dict[str, Any]) -> str:
    """One line of JSON, readable in any script, with an escape where a character could drive a terminal."""
    line = json.dumps(said, ensure_ascii=False)
    return "".join(char if char == visible(char) else json.dumps(char)[1:-1] for char in line)


def _conversation(speaker: Speaker) -> int:
    import readline  # noqa: F401  (gives input() line editing and history)

    print("Ask something. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        if line in ("/exit", "/quit"):
            return 0
        try:
            question = _command(speaker, line) if line.startswith("/") else line
            if question:
                _say(speaker, question)
        except RemintError as error:
            print(error)


def _say(speaker: Speaker, question: str) -> None:
    said = speaker.answer(question, sys.stdout)
    note = {"interrupt": " (stopped)", "length": " (cut: --max-new-tokens)"}.get(said["stopped"], "")
    print(note)


def _command(speaker: Speaker, line: str) -> str | None:
    """Do what a /command says; returns a question if one is to be answered now."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        speaker.reset()
        print("(forgotten)")
    elif name == "/retry":
        asked = [index for index, message in enumerate(speaker.history) if message["role"] == "user"]
        if not asked:
            raise RemintError("chat: nothing to retry yet; ask something first")
        question = speaker.history[asked[-1]]["content"]
        del speaker.history[asked[-1] :]
        return question
    elif name == "/system":
        speaker.system = rest.strip() or None
        speaker.reset()
        print(f"(system text: {speaker.system or 'the trained one'}; the conversation starts anew)")
    elif name == "/temperature":
        try:
            speaker.sampling = replace(speaker.sampling, temperature=float(rest))
        except ValueError:
            raise RemintError(f"chat: /temperature takes a number, got {rest!r}; 0 is greedy, 0.7 is lively") from None
        print(f"(temperature {speaker.sampling.temperature:g})")
    elif name == "/history":
        for message in speaker.history:
            print(f"{message['role']}: {visible(message['content'])}")
    elif name == "/help":
        print(_HELP)
    else:
        raise RemintError(f"chat: no such command, got {name!r}; /help lists them")
    return None
