"""`remint check`: check all settings and report every mistake, before the first stage starts."""

from remint.core.paths import PARAMS
from remint.runner import preflight


def main() -> None:
    """Check all settings, and that a base model which you must download yourself is there."""
    preflight.check_all()
    print(f"{PARAMS}: all settings are valid")
