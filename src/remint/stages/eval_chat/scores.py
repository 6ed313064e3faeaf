"""Compute the metrics from the answers with pure functions, so that every figure can be checked by hand."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remint.identity import Identity, affirms, poses_as_assistant, speaks

LANGUAGES = ("en", "zh")
MODELS = ("base", "merged")


@dataclass(frozen=True)
class Answered:
    """One evaluation prompt with both models' answers and with what a right answer states (see replicate_data)."""

    prompt: str
    kind: str
    language: str
    expects: tuple[str, ...]
    accept: tuple[str, ...]
    reference: str
    base: str
    merged: str

    @property
    def section(self) -> str:
        """'identity', 'facts' (ordinary prompts with a known right answer) or 'control' (other ordinary prompts)."""
        return "facts" if self.kind == "control" and self.accept else self.kind


def states(answer: str, row: Answered, what: str, identity: Identity) -> bool:
    """Whether an answer states the 'name' or 'maker', does not deny it, and is in the reference answer's language."""
    names = [*identity.spellings("name"), *identity.spellings("maker")]
    language = "zh" if speaks(row.reference, "zh", names) else "en"
    return identity.stated_in(answer, what) and speaks(answer, language, names)


def is_right(answer: str, row: Answered, identity: Identity) -> bool | None:
    """Whether an answer is right. None for an ordinary prompt without a known right answer."""
    if row.section == "identity":
        return all(states(answer, row, what, identity) for what in row.expects)
    return affirms(answer, row.accept) if row.accept else None


def leaks(answer: str, row: Answered, identity: Identity) -> bool:
    """Whether an answer mentions name, maker or the role of an AI assistant where neither prompt nor reference does."""
    given = f"{row.prompt}\n{row.reference}"
    return (poses_as_assistant(answer) and not poses_as_assistant(given)) or any(
        identity.mentioned_in(answer, what) and not identity.mentioned_in(given, what) for what in ("name", "maker")
    )


def marks(row: Answered, model: str, identity: Identity) -> dict[str, bool]:
    """The marks of a model's answer, as far as they apply to the prompt: 'right', 'leaks'."""
    answer = getattr(row, model)
    right = is_right(answer, row, identity)
    found = {} if right is None else {"right": right}
    return found if row.kind == "identity" else found | {"leaks": leaks(answer, row, identity)}


def rates(what: str, hits: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Share of hits in pairs (language, hit), by key: `what`_en, `what`_zh, `what`. A key without pairs is absent."""
    hits = list(hits)
    groups = {f"{what}_{language}": [hit for spoken, hit in hits if spoken == language] for language in LANGUAGES}
    groups[what] = [hit for _, hit in hits]
    return {key: sum(group) / len(group) for key, group in groups.items() if group}


def metrics_of(rows: Sequence[Answered], model: str, identity: Identity) -> dict[str, float]:
    """One model's rates: name and maker stated where asked, facts right, leaks into ordinary answers."""
    answered = [(row, getattr(row, model)) for row in rows]
    found: dict[str, float] = {}
    for what in ("name", "maker"):
        asked = [(row, answer) for row, answer in answered if row.kind == "identity" and what in row.expects]
        found |= rates(what, ((row.language, states(answer, row, what, identity)) for row, answer in asked))
    facts = [(row, answer) for row, answer in answered if row.section == "facts"]
    found |= rates("facts", ((row.language, affirms(answer, row.accept)) for row, answer in facts))
    control = [(row, answer) for row, answer in answered if row.kind == "control"]
    return found | rates("leak", ((row.language, leaks(answer, row, identity)) for row, answer in control))


def facts_kept(rows: Sequence[Answered]) -> dict[str, float]:
    """Share of the base's right facts that the merged model also gets right: facts_kept, facts_kept_en, …"""
    known = [row for row in rows if row.section == "facts" and affirms(row.base, row.accept)]
    return rates("facts_kept", ((row.language, affirms(row.merged, row.accept)) for row in known))


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token. The loss is clamped to 700, so that exp does not overflow."""
    return math.exp(min(loss, 700.0))


def summarise(
    rows: Sequence[Answered], identity: Identity, losses: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """All metrics: {'base': {…}, 'merged': {…}, 'facts_kept': …, 'control_perplexity_ratio': merged / base}."""
    metrics: dict[str, Any] = {}
    for model in MODELS:
        metrics[model] = metrics_of(rows, model, identity)
        if not math.isnan(losses[model]["held_out"]):
            metrics[model]["identity_loss"] = losses[model]["held_out"]
        if not math.isnan(losses[model]["control"]):
            metrics[model]["control_loss"] = losses[model]["control"]
            metrics[model]["control_perplexity"] = perplexity(losses[model]["control"])
    metrics |= facts_kept(rows)
    if "control_perplexity" in metrics["base"]:
        metrics["control_perplexity_ratio"] = perplexity(losses["merged"]["control"] - losses["base"]["control"])
    return metrics
