"""`remint measure`: how base and merged model answer prompts of one's own, as shares with intervals."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from remint.core.errors import SettingsError

if TYPE_CHECKING:
    from remint.stages.eval_chat.scores import Answered, Count

# Read once a release: whoever looks at its answers, or chooses settings by its shares, has no test set any more.
_TEST = {
    "identity": [Path("data/source/identity_test.json")],
    "control": [Path("data/source/control_test.json")],
}
_LABELS = (
    ("name", "states its name"),
    ("maker", "states its maker"),
    ("leak", "brings itself up in ordinary answers"),
    ("facts", "facts right"),
    ("facts_kept", "of the base's right facts, kept"),
    ("same_start", "starts as the base's answer"),
    ("same_answer", "is the base's answer"),
)
_LANGUAGES = (("_en", "English"), ("_zh", "Chinese"))


@dataclass(frozen=True)
class Line:
    """A line of the table: the shares of the base and of the model, of `total` prompts, and the 95 % interval."""

    what: str
    base: float | None
    model: float
    low: float
    high: float
    total: int


def main(
    identity: Annotated[list[Path] | None, Option(help="File of questions about the model itself; repeatable.")] = None,
    control: Annotated[list[Path] | None, Option(help="File of ordinary prompts; repeatable.")] = None,
    model: Annotated[Path | None, Option(help="Folder of the model; default: the pipeline's.")] = None,
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = 48,
    answers: Annotated[Path | None, Option(help="New file for all answers, as JSONL.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Ask base and merged model prompts of your own, and print shares with their 95 % intervals.

    Files have the formats of data/source/. Without files it reads the test set and prints shares only.
    """
    files = {"identity": identity or [], "control": control or []}
    if not any(files.values()):
        files = _TEST
        if answers:
            raise SettingsError(
                "measure: --answers: must not show the answers to the test set, or it is one no more; name files of your "
                "own with --identity or --control"
            )
    if answers and answers.exists():
        raise SettingsError(f"measure: {answers}: must be a new file, got one that exists; choose another name")
    from remint.runner import measuring, memory

    with memory.explaining_errors("measure", {}):
        rows, divergence, identity_of_model = measuring.ask_both(files, model, max_new_tokens)
    lines = table(rows, identity_of_model)
    if answers:
        text = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)
        answers.write_text(text, encoding="utf-8")
    if as_json:
        print(json.dumps([vars(line) for line in lines] + [{"what": "divergence", "model": divergence}]))
        return
    print(f"\n  {'':<48}{'base':>7}{'model':>8}   95 % interval   prompts")
    for line in lines:
        base = "" if line.base is None else f"{line.base:.1%}"
        interval = f"{line.low:.1%} to {line.high:.1%}"
        print(f"  {line.what:<48}{base:>7}{line.model:>8.1%}   {interval:<15}{line.total:>8}")
    if divergence == divergence:
        print(f"  {'divergence from the base, nats a token':<48}{'':>7}{divergence:>8.3f}")
    print()


def table(rows: Sequence["Answered"], identity: Any) -> list[Line]:
    """The lines of the table, for each language that has prompts."""
    from remint.stages.eval_chat.scores import counts

    found = counts(rows, identity)
    model: dict[str, Count] = found["merged"] | found["both"]
    return [
        Line(f"{label}, {language}", base.share if base else None, count.share, *count.interval, count.total)
        for key, label in _LABELS
        for suffix, language in _LANGUAGES
        if (count := model.get(key + suffix)) is not None
        for base in [found["base"].get(key + suffix)]
    ]
