"""From answers to figures: pure functions, so every figure of the report can be checked by hand."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remint.identity import Identity

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Answered:
    """One prompt of the evaluation with both models' answers and what a right one states."""

    prompt: str
    kind: str
    language: str
    expects: tuple[str, ...]
    reference: str
    base: str
    merged: str


def rate(hits: Sequence[bool]) -> float | None:
    """Share of true values, None of nothing."""
    return sum(hits) / len(hits) if hits else None


def identity_rates(rows: Sequence[Answered], identity: Identity, model: str) -> dict[str, float]:
    """How often name and maker are right, per language and in all: name_en, name_zh, name, maker_en, …"""
    rates: dict[str, float | None] = {}
    for what, stated in (("name", identity.named_in), ("maker", identity.maker_in)):
        asked = [row for row in rows if row.kind == "identity" and what in row.expects]
        for language in LANGUAGES:
            rates[f"{what}_{language}"] = rate(
                [stated(getattr(row, model)) for row in asked if row.language == language]
            )
        rates[what] = rate([stated(getattr(row, model)) for row in asked])
    return {key: value for key, value in rates.items() if value is not None}


def leaks(answer: str, reference: str, identity: Identity) -> bool:
    """Whether an answer states name or maker though a right one does not."""
    return any(stated(answer) and not stated(reference) for stated in (identity.named_in, identity.maker_in))


def leak_rates(rows: Sequence[Answered], identity: Identity, model: str) -> dict[str, float]:
    """How often the identity appears in answers to control prompts: leak_en, leak_zh, leak."""
    control = [row for row in rows if row.kind == "control"]
    rates = {
        f"leak_{language}": rate(
            [leaks(getattr(r, model), r.reference, identity) for r in control if r.language == language]
        )
        for language in LANGUAGES
    }
    rates["leak"] = rate([leaks(getattr(row, model), row.reference, identity) for row in control])
    return {key: value for key, value in rates.items() if value is not None}


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats a token."""
    return math.exp(min(loss, 700.0))


def summarise(
    rows: Sequence[Answered], identity: Identity, losses: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """All figures: {'base': {…}, 'merged': {…}, 'control_perplexity_ratio': merged / base}."""
    metrics: dict[str, Any] = {}
    for model in ("base", "merged"):
        metrics[model] = identity_rates(rows, identity, model) | leak_rates(rows, identity, model)
        if not math.isnan(losses[model]["held_out"]):
            metrics[model]["held_out_loss"] = losses[model]["held_out"]
        if not math.isnan(losses[model]["control"]):
            metrics[model]["control_loss"] = losses[model]["control"]
            metrics[model]["control_perplexity"] = perplexity(losses[model]["control"])
    if "control_perplexity" in metrics["base"]:
        metrics["control_perplexity_ratio"] = perplexity(losses["merged"]["control"] - losses["base"]["control"])
    return metrics
