"""`remint chat`: talk to the merged model in a terminal, or answer one question for a program."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from typer import Option

from remint.core.errors import RemintError, visible
from remint.core.settings import check_ranges
from remint.core.signals import Terminated
from remint.runner.options import explaining_ranges

if TYPE_CHECKING:
    from remint.serving.speaker import Speaker

_HELP = """\
/reset          forget the conversation
/retry          answer the last question again
/system TEXT    set the system prompt and start over; without TEXT, restore the trained one
/temperature X  0 is greedy decoding, higher values vary more
/history        show the conversation
/help           this list
/exit           leave (as does Ctrl-D); Ctrl-C stops an answer"""


def main(
    once: Annotated[str | None, Option(metavar="QUESTION", help="Answer one question and exit.")] = None,
    json: Annotated[bool, Option("--json", help="Print each answer as one JSON object.")] = False,
    model: Annotated[Path | None, Option(help="Folder of the model; default: the pipeline's.")] = None,
    system: Annotated[str | None, Option(help="System prompt; default: the one used in training.")] = None,
    temperature: Annotated[float, Option(help="0 is greedy decoding, as in the evaluation.")] = 0.0,
    top_p: Annotated[float, Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, Option(help="Top-k sampling; 0 is off.")] = 0,
    seed: Annotated[int, Option(help="Seed for temperatures above 0.")] = 0,
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = 512,
) -> None:
    """Talk to the merged model: a conversation in a terminal, one answer per line in a pipe, one answer with --once."""
    with explaining_ranges():
        check_ranges(
            "chat",
            (1 <= max_new_tokens <= 10**6, "max_new_tokens", max_new_tokens, "must be between 1 and 1000000"),
            (0 <= seed < 2**63, "seed", seed, "must be at least 0 and below 2^63"),
        )
    # Importing torch takes seconds: check the arguments first.
    from remint.compute.generation import Sampling
    from remint.core.paths import Paths
    from remint.runner import memory
    from remint.serving import speaker

    with explaining_ranges():
        sampling = Sampling(temperature, top_p, top_k)
    with memory.explaining_errors("chat", {}):
        loaded = speaker.load(model or Paths().model, sampling, seed, max_new_tokens, system)
        if once is not None:
            _once(loaded, once, json)
        elif sys.stdin.isatty() and not json:
            _conversation(loaded)
        else:
            _pipe(loaded, sys.stdin, json)


def _once(speaker: "Speaker", question: str, as_json: bool) -> None:
    if not question.strip():
        raise RemintError("chat: the question is empty, got ''; write one after --once")
    reply = speaker.answer(question.strip())
    print(_as_json(reply) if as_json else visible(reply["answer"]))


def _pipe(speaker: "Speaker", lines: TextIO, as_json: bool) -> None:
    """Read each line as a turn of one conversation, and print each answer as one line."""
    for line in lines:
        if line.strip():
            reply = speaker.answer(line.strip())
            print(_as_json(reply) if as_json else " ".join(visible(reply["answer"]).split()), flush=True)


def _as_json(reply: dict[str, Any]) -> str:
    """One line of JSON. Text of any script stays readable; characters that could control a terminal are escaped."""
    line = json.dumps(reply, ensure_ascii=False)
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
        except Terminated:
            raise
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        if line in ("/exit", "/quit"):
            return
        try:
            question = _command(speaker, line) if line.startswith("/") else line
            if question:
                _reply(speaker, question)
        except RemintError as error:
            print(error)


def _reply(speaker: "Speaker", question: str) -> None:
    """Stream the answer to stdout, then a note if it is incomplete."""
    reply = speaker.answer(question, sys.stdout)
    note = {"interrupt": " (stopped)", "length": " (cut: --max-new-tokens)"}.get(reply["stopped"], "")
    print(note)


def _command(speaker: "Speaker", line: str) -> str | None:
    """Run a /command. Returns a question if it must be answered now. Raises RemintError for an unknown command."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        speaker.reset()
        print("(forgotten)")
    elif name == "/retry":
        questions = [index for index, message in enumerate(speaker.history) if message["role"] == "user"]
        if not questions:
            raise RemintError("chat: nothing to retry yet; ask something first")
        question = speaker.history[questions[-1]]["content"]
        del speaker.history[questions[-1] :]
        return question
    elif name == "/system":
        speaker.system = rest.strip() or None
        speaker.reset()
        print(f"(system prompt: {speaker.system or 'the trained one'}; the conversation starts over)")
    elif name == "/temperature":
        try:
            speaker.sampling = replace(speaker.sampling, temperature=float(rest))
        except ValueError:
            raise RemintError(f"chat: /temperature takes a number, got {rest!r}; 0 is greedy, 0.7 varies") from None
        print(f"(temperature {speaker.sampling.temperature:g})")
    elif name == "/history":
        for message in speaker.history:
            print(f"{message['role']}: {visible(message['content'])}")
    elif name == "/help":
        print(_HELP)
    else:
        raise RemintError(f"chat: no such command, got {name!r}; /help lists them")
    return None
