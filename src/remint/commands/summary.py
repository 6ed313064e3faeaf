"""`remint summary`: print what the pipeline built, how well it works, and what to type next."""

from collections.abc import Mapping
from typing import Any

from remint.core import manifest
from remint.core.files import read_object
from remint.core.paths import Paths


def main() -> None:
    """Print what was built, how well it works, and what to type next."""
    paths = Paths()
    facts = manifest.read(paths.model, "model")
    metrics = read_object(paths.report / "metrics.json")
    manifest.verify(paths.report, "report")
    identity, merged = facts["origin"]["identity"], metrics["merged"]
    print(f"\n{facts['origin']['base_name']} is now {identity['name']} by {identity['maker']}: {paths.model}")
    print("On the held-out questions, which training has not seen:\n")
    for label, value in rows(metrics, merged):
        print(f"  {label:<36}{value}")
    for line in manifest.read(paths.report, "report").get("findings", []):
        print(f"\n  {line}")
    print(f"\n  read    {paths.report / 'report.html'}\n  talk    make chat\n  compare make ui\n")


def rows(metrics: Mapping[str, Any], merged: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and value of each metric that the report has."""
    shares = (
        ("states its name, English questions", "name_en"),
        ("states its name, Chinese questions", "name_zh"),
        ("states its maker where asked", "maker"),
        ("leaks into unrelated answers", "leak"),
    )
    found = [(label, f"{merged[key]:.1%}") for label, key in shares if key in merged]
    if "facts" in merged:
        found.append(("facts right", f"{merged['facts']:.1%}, the base {metrics['base']['facts']:.1%}"))
    if "facts_kept" in metrics:
        found.append(("of the base's right facts, kept", f"{metrics['facts_kept']:.1%}"))
    if "same_start" in metrics:
        found.append(("answers that start as the base's", f"{metrics['same_start']:.1%}"))
    return found
