"""`remint check`: check all settings and report every mistake, before the first stage starts."""

import sys

from remint.core.errors import RemintError
from remint.core.paths import PARAMS
from remint.runner import pipeline, preflight

# docker/install puts a line into the environment that loads this module when Python starts.
GUARDS = "remint.runner.dvc_hook"


def main() -> None:
    """Check all settings, dvc.yaml, and that a base model which you must download yourself is there."""
    if GUARDS not in sys.modules:
        raise RemintError(
            f"{sys.prefix}: its DVC has no guards, so it could remove files of yours or record a wrong origin; run "
            "`make setup`"
        )
    pipeline.check_syntax()
    preflight.check_all()
    print(f"{PARAMS}: all settings are valid")
