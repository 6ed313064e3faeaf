"""`remint check`: read all settings and say what is wrong with them, before the first stage starts."""

from remint.core.paths import PARAMS
from remint.runner import preflight


def main() -> None:
    """Read all settings, and look for a base model that has to be brought by hand."""
    preflight.check_all()
    print(f"{PARAMS}: in order")
