"""The `convert` section of params.yaml."""

import re
from dataclasses import dataclass

from remint.core.settings import DTYPES, check_ranges


@dataclass(frozen=True)
class Convert:
    """Which checkpoint becomes the adapter, and the precision that it is stored in."""

    checkpoint: str | int
    dtype: str

    def __post_init__(self) -> None:
        known = self.checkpoint in ("last", "best") or re.fullmatch(r"[0-9]{1,8}", str(self.checkpoint)) is not None
        check_ranges(
            "convert",
            (known, "checkpoint", self.checkpoint, "must be last, best or the number of a kept step"),
            (self.dtype in DTYPES, "dtype", self.dtype, f"must be one of {', '.join(DTYPES)}"),
        )
