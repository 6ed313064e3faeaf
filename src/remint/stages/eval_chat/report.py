"""The report as one self-contained page, and the line that says how well it went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from remint.identity import Identity
from remint.stages.eval_chat.scores import Answered, leaks

_TEMPLATE = Path(__file__).parent / "report.html.jinja"
_WIDTH, _HEIGHT = 520, 150


@dataclass(frozen=True)
class Content:
    """Everything the page shows."""

    identity: Identity
    metrics: Mapping[str, Any]
    rows: Sequence[Answered]
    history: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    model: Mapping[str, Any]
    checkpoint: Mapping[str, Any]


def headline(metrics: Mapping[str, Any], folder: Path) -> str:
    """Two lines for the terminal: how often it is right, what it cost, where to read more."""
    merged = metrics["merged"]
    parts = [
        f"name {label} {merged[key]:.0%}"
        for label, key in (("English", "name_en"), ("Chinese", "name_zh"))
        if key in merged
    ]
    parts += [f"maker {merged['maker']:.0%}"] if "maker" in merged else []
    parts += [f"leaks into {merged['leak']:.1%} of other answers"] if "leak" in merged else []
    if "control_perplexity_ratio" in metrics:
        parts.append(f"control perplexity × {metrics['control_perplexity_ratio']:.2f} of the base's")
    return f"{folder}: {', '.join(parts)}"


def render(content: Content) -> str:
    """The page as HTML; text of models and data is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    curves = [
        ("Training loss", "nats per learned token", curve(content.history, "loss")),
        ("Held-out loss", "nats per learned token", curve(content.history, "held_out_loss")),
        ("Learning rate", "", curve(content.history, "lr")),
    ]
    return template.render(
        c=content, marks=[_marks(row, content.identity) for row in content.rows], curves=curves, size=(_WIDTH, _HEIGHT)
    )


def _marks(row: Answered, identity: Identity) -> dict[str, bool | None]:
    """What the page ticks or crosses for each model: True right, False wrong."""
    stated = {"name": identity.named_in, "maker": identity.maker_in}
    if row.kind == "control":
        return {model: not leaks(getattr(row, model), row.reference, identity) for model in ("base", "merged")}
    return {model: all(stated[what](getattr(row, model)) for what in row.expects) for model in ("base", "merged")}


def curve(history: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    """Points of a line in the page's coordinates, with the values at the ends of both axes; None without data."""
    points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    if not points:
        return None
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = min(0.0, *values), max(values) or 1.0
    span = max(1, steps[-1] - steps[0])
    scaled = [
        (round((step - steps[0]) / span * _WIDTH, 1), round((1 - (value - low) / ((high - low) or 1)) * _HEIGHT, 1))
        for step, value in points
    ]
    return {"points": scaled, "first": steps[0], "last": steps[-1], "low": low, "high": high, "end": values[-1]}
