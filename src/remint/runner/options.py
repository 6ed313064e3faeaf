"""Explains faults in the options of commands, which are not settings of params.yaml."""

import contextlib
from collections.abc import Iterator

from remint.core.errors import SettingsError


@contextlib.contextmanager
def explaining_ranges() -> Iterator[None]:
    """Add to each fault of `check_ranges`, like `chat.top_p: must be …`, the option to change.

    A setting of params.yaml gets its own advice in `runner/config.py`.
    """
    try:
        yield
    except SettingsError as error:
        faults = ((fault, fault.partition(":")[0].rpartition(".")[2].replace("_", "-")) for fault in error.faults)
        raise SettingsError(*(f"{fault}; change --{option}" for fault, option in faults)) from None
