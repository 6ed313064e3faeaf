"""`remint check`: check all settings and report every mistake, before the first stage starts."""

from remint.core.paths import PARAMS
from remint.runner import pipeline, preflight


def main() -> None:
    """Check all settings, dvc.yaml, and that a base model which you must download yourself is there."""
    pipeline.check_syntax()
    preflight.check_all()
    print(f"{PARAMS}: all settings are valid")
