"""`remint chat`: talk to the merged model in a terminal, or answer one question for a program."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from typer import Option

from remint.core.errors import RemintError, visible
from remint.core.settings import check_ranges

if TYPE_CHECKING:
    from remint.serving.speaker import Speaker

_HELP = """\
/reset          forget the conversation
/retry          answer the last question again
/system TEXT    set the system text and start anew; without TEXT, go back to the trained one
/temperature X  0 always picks the likeliest word, higher values vary more
/history        show the conversation
/help           this list
/exit           leave (so does Ctrl-D); Ctrl-C stops an answer"""


def main(
    once: Annotated[str | None, Option(metavar="QUESTION", help="Answer one question and exit.")] = None,
    json: Annotated[bool, Option("--json", help="Print each answer as one JSON object.")] = False,
    model: Annotated[Path | None, Option(help="Folder of the model; default: the pipeline's.")] = None,
    system: Annotated[str | None, Option(help="System text; default: the one used in training.")] = None,
    temperature: Annotated[float, Option(help="0 is greedy decoding, as in the evaluation.")] = 0.0,
    top_p: Annotated[float, Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, Option(help="Top-k sampling; 0 is off.")] = 0,
    seed: Annotated[int, Option(help="Seed for temperatures above 0.")] = 0,
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = 512,
) -> None:
    """Talk to the merged model: a conversation in a terminal, one answer per line in a pipe, one answer with --once."""
    check_ranges(
        "chat",
        (max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be 1 or more"),
        (0 <= seed < 2**63, "seed", seed, "must be at least 0 and below 2^63"),
    )
    # torch takes seconds to import: not before the arguments are known to be right.
    from remint.compute.generation import Sampling
    from remint.runner import memory
    from remint.runner.config import places
    from remint.serving import speaker

    sampling = Sampling(temperature, top_p, top_k)
    with memory.explained("chat", {}):
        loaded = speaker.load(model or places().model, sampling, seed, max_new_tokens, system)
        if once is not None:
            _once(loaded, once, json)
        elif sys.stdin.isatty() and not json:
            _conversation(loaded)
        else:
            _pipe(loaded, sys.stdin, json)


def _once(speaker: "Speaker", question: str, as_json: bool) -> None:
    if not question.strip():
        raise RemintError("chat: the question is empty, got ''; write one after --once")
    said = speaker.answer(question.strip())
    print(_as_json(said) if as_json else visible(said["answer"]))


def _pipe(speaker: "Speaker", lines: TextIO, as_json: bool) -> None:
    """Each line a turn of one conversation, each answer a line."""
    for line in lines:
        if line.strip():
            said = speaker.answer(line.strip())
            print(_as_json(said) if as_json else " ".join(visible(said["answer"]).split()), flush=True)


def _as_json(said: dict[str, Any]) -> str:
    """One line of JSON, readable in any script, with an escape where a character could drive a terminal."""
    line = json.dumps(said, ensure_ascii=False)
    return "".join(char if char == visible(char) else json.dumps(char)[1:-1] for char in line)


def _conversation(speaker: "Speaker") -> None:
    import readline  # noqa: F401  (gives input() line editing and history)

    print("Ask something. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        if line in ("/exit", "/quit"):
            return
        try:
            question = _command(speaker, line) if line.startswith("/") else line
            if question:
                _say(speaker, question)
        except RemintError as error:
            print(error)


def _say(speaker: "Speaker", question: str) -> None:
    said = speaker.answer(question, sys.stdout)
    note = {"interrupt": " (stopped)", "length": " (cut: --max-new-tokens)"}.get(said["stopped"], "")
    print(note)


def _command(speaker: "Speaker", line: str) -> str | None:
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
