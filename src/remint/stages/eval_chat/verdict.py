"""What the figures mean, in words: the report and the terminal say it first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from remint.stages.eval_chat.scores import Count, Counts

# A finding needs evidence: the whole 95 % interval must lie beyond the bound.
_KNOWS, _LEAKS, _KEEPS = 0.9, 0.05, 0.9
# Nats a token. Above it, most ordinary answers start in other words than the base's.
_DIVERGES = 0.5
_GENTLER = (
    "More different ordinary records help most, in control_base if the base speaks their language; then fewer copies of the "
    "identity records, fewer epochs or a lower learning rate."
)
_LANGUAGES = (("en", "English"), ("zh", "Chinese"))


@dataclass(frozen=True)
class Finding:
    """One sentence about the model. `good` is whether it is as it should be; `advice` is what helps if it is not."""

    good: bool
    text: str
    advice: str = ""


def findings(found: Mapping[str, Counts], divergence: float | None) -> list[Finding]:
    """What counts (`scores.counts`) and divergence say about the new name, and about everything else.

    Without a fault there is one finding: that only the name changed, as far as the number of prompts can tell.
    """
    faults = [*_about_the_name(found["merged"]), *_about_the_rest(found, divergence)]
    if faults:
        return faults
    prompts = sum(count.total for key, count in found["merged"].items() if key in ("name", "leak"))
    return [Finding(True, f"Only the name changed, as far as {prompts} prompts can tell.")]


def _about_the_name(merged: Counts) -> Iterator[Finding]:
    advice = "More different identity questions help, then more copies of them or a higher learning rate."
    for what in ("name", "maker"):
        for key, language in _LANGUAGES:
            count = merged.get(f"{what}_{key}")
            if count and count.interval[1] < _KNOWS:
                text = f"It has not learned its {what} well: {_share(count)} of the {language} questions about it"
                yield Finding(False, f"{text} get a right answer.", advice)


def _about_the_rest(found: Mapping[str, Counts], divergence: float | None) -> Iterator[Finding]:
    for key, language in _LANGUAGES:
        leak = found["merged"].get(f"leak_{key}")
        if leak and leak.interval[0] > _LEAKS:
            text = f"It talks about itself where nobody asked: in {_share(leak)} of the ordinary {language} answers."
            yield Finding(False, text, _GENTLER)
    kept = found["both"].get("facts_kept")
    if kept and kept.interval[1] < _KEEPS:
        text = f"It forgot what the base knew: {_share(kept)} of the facts that the base gets right are still right."
        yield Finding(False, text, _GENTLER)
    if divergence is not None and divergence > _DIVERGES:
        text = f"It answers ordinary prompts in other words than the base: {divergence:.2f} nats a token away from it."
        yield Finding(False, text, _GENTLER)


def _share(count: Count) -> str:
    low, high = count.interval
    return f"{count.share:.0%} (between {low:.0%} and {high:.0%})"


def in_words(found: Sequence[Finding]) -> list[str]:
    """The findings as lines for a terminal; advice that several share comes once, at the end."""
    advice = dict.fromkeys(finding.advice for finding in found if finding.advice)
    return [*(finding.text for finding in found), *advice]
