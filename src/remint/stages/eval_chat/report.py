"""The report as one self-contained HTML page, and its summary as one line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from remint.identity import Identity
from remint.stages.eval_chat.scores import MODELS, Answered, by_topic, counts, marks
from remint.stages.eval_chat.verdict import findings

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
    """One line for the terminal: the report's folder, how often the model is right, and what the new identity cost."""
    merged = metrics["merged"]
    parts = [
        f"name {label} {merged[key]:.0%}"
        for label, key in (("English", "name_en"), ("Chinese", "name_zh"))
        if key in merged
    ]
    parts += [f"maker {merged['maker']:.0%}"] if "maker" in merged else []
    parts += [f"identity leaks into {merged['leak']:.1%} of control answers"] if "leak" in merged else []
    parts += [f"{metrics['facts_kept']:.0%} of the base's facts kept"] if "facts_kept" in metrics else []
    if "same_start" in metrics:
        parts.append(f"{metrics['same_start']:.0%} of control answers start as the base's")
    return f"{folder}: {', '.join(parts)}"


def render(content: Content) -> str:
    """The page as HTML. Text from models and data is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    curves = [
        ("Training loss", "nats per supervised token", curve(content.history, "loss")),
        ("Held-out loss, identity and control", "nats per supervised token", curve(content.history, "held_out_loss")),
        ("Learning rate", "", curve(content.history, "lr")),
    ]
    found = counts(content.rows, content.identity)
    return template.render(
        c=content,
        findings=findings(found, content.metrics.get("divergence")),
        ticks=[{model: _tick(row, model, content.identity) for model in MODELS} for row in content.rows],
        curves=curves,
        counts=found,
        topics=by_topic(content.rows, content.identity),
        size=(_WIDTH, _HEIGHT),
    )


def _tick(row: Answered, model: str, identity: Identity) -> bool:
    """Whether the page ticks an answer: right, as far as that can be checked, and without a leak."""
    found = marks(row, model, identity)
    return found.get("right", True) and not found.get("leaks", False)


def curve(history: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    """Points of a line in the page's coordinates, with the values at the ends of both axes. None without data."""
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
