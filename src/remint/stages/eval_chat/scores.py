"""Compute the metrics from the answers with pure functions, so that every figure can be checked by hand."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest  # type: ignore[import-untyped]

from remint.identity import Identity, affirms, poses_as_assistant, speaks

LANGUAGES = ("en", "zh")
MODELS = ("base", "merged")


@dataclass(frozen=True)
class Answered:
    """One evaluation prompt with both models' answers and with what a right answer states (see replicate_data).

    `same_start` is whether both answers start with the same tokens. `topic` is the kind of prompt, if its record names one.
    """

    prompt: str
    kind: str
    language: str
    expects: tuple[str, ...]
    accept: tuple[str, ...]
    reference: str
    base: str
    merged: str
    same_start: bool = False
    topic: str = ""

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


@dataclass(frozen=True)
class Count:
    """How many of `total` answers are hits."""

    hits: int
    total: int

    @property
    def share(self) -> float:
        """The share of hits."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the share (Wilson 1927)."""
        found = binomtest(self.hits, self.total).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


Counts = dict[str, Count]


def counted(what: str, hits: Iterable[tuple[str, bool]]) -> Counts:
    """Counts of pairs (language, hit), by key: `what`_en, `what`_zh, `what`. A key without pairs is absent."""
    hits = list(hits)
    groups = {f"{what}_{language}": [hit for spoken, hit in hits if spoken == language] for language in LANGUAGES}
    groups[what] = [hit for _, hit in hits]
    return {key: Count(sum(group), len(group)) for key, group in groups.items() if group}


def counts_of(rows: Sequence[Answered], model: str, identity: Identity) -> Counts:
    """One model's counts: name and maker stated where asked, facts right, leaks into ordinary answers."""
    answered = [(row, getattr(row, model)) for row in rows]
    found: Counts = {}
    for what in ("name", "maker"):
        asked = [(row, answer) for row, answer in answered if row.kind == "identity" and what in row.expects]
        found |= counted(what, ((row.language, states(answer, row, what, identity)) for row, answer in asked))
    facts = [(row, answer) for row, answer in answered if row.section == "facts"]
    found |= counted("facts", ((row.language, affirms(answer, row.accept)) for row, answer in facts))
    control = [(row, answer) for row, answer in answered if row.kind == "control"]
    return found | counted("leak", ((row.language, leaks(answer, row, identity)) for row, answer in control))


def counts_of_both(rows: Sequence[Answered]) -> Counts:
    """Counts that compare the merged model with the base.

    `facts_kept` counts facts that both get right, of those that the base gets right. `same_answer` and `same_start` count
    ordinary prompts to which both give the same answer, or answers that start with the same tokens.
    """
    known = [row for row in rows if row.section == "facts" and affirms(row.base, row.accept)]
    control = [row for row in rows if row.kind == "control"]
    return {
        **counted("facts_kept", ((row.language, affirms(row.merged, row.accept)) for row in known)),
        **counted("same_start", ((row.language, row.same_start) for row in control)),
        **counted("same_answer", ((row.language, row.base == row.merged) for row in control)),
    }


def counts(rows: Sequence[Answered], identity: Identity) -> dict[str, Counts]:
    """The counts of each model, and those that compare them, under 'both'."""
    return {model: counts_of(rows, model, identity) for model in MODELS} | {"both": counts_of_both(rows)}


def by_topic(rows: Sequence[Answered], identity: Identity) -> dict[str, Counts]:
    """Counts of the merged model by topic of the prompt: 'right' for questions about identity, 'leaks' for others."""
    found: dict[str, Counts] = {"right": {}, "leaks": {}}
    marked = [(row, marks(row, "merged", identity)) for row in rows if row.topic]
    for what, kind in (("right", "identity"), ("leaks", "control")):
        for topic in sorted({row.topic for row, _ in marked if row.kind == kind}):
            hits = [bool(mark[what]) for row, mark in marked if row.kind == kind and row.topic == topic]
            found[what][topic] = Count(sum(hits), len(hits))
    return found


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token. The loss is clamped to 700, so that exp does not overflow."""
    return math.exp(min(loss, 700.0))


def summarise(
    rows: Sequence[Answered],
    identity: Identity,
    losses: Mapping[str, Mapping[str, float]],
    divergence: float = math.nan,
) -> dict[str, Any]:
    """All metrics: {'base': {…}, 'merged': {…}, 'facts_kept': …, 'same_start': …, 'divergence': …, …}.

    `divergence` is the mean divergence of the merged model from the base on ordinary prompts; NaN if there are none.
    """
    found = counts(rows, identity)
    metrics: dict[str, Any] = {}
    for model in MODELS:
        metrics[model] = {key: count.share for key, count in found[model].items()}
        if not math.isnan(losses[model]["held_out"]):
            metrics[model]["identity_loss"] = losses[model]["held_out"]
        if not math.isnan(losses[model]["control"]):
            metrics[model]["control_loss"] = losses[model]["control"]
            metrics[model]["control_perplexity"] = perplexity(losses[model]["control"])
    metrics |= {key: count.share for key, count in found["both"].items()}
    if not math.isnan(divergence):
        metrics["divergence"] = divergence
    if "control_perplexity" in metrics["base"]:
        metrics["control_perplexity_ratio"] = perplexity(losses["merged"]["control"] - losses["base"]["control"])
    return metrics
