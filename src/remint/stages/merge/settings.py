"""The `merge` section of params.yaml."""

from dataclasses import dataclass

from remint.core.settings import DTYPES, check_ranges

_DTYPES = ("base", *DTYPES)


@dataclass(frozen=True)
class Merge:
    """What the adapter is merged into, how the result is stored, and how far it may differ from base + adapter."""

    into: str
    dtype: str
    max_divergence: float
    min_agreement: float

    def __post_init__(self) -> None:
        check_ranges(
            "merge",
            (self.into in ("original", "dequantized"), "into", self.into, "must be original or dequantized"),
            (self.dtype in _DTYPES, "dtype", self.dtype, f"must be one of {', '.join(_DTYPES)}"),
            (0 < self.max_divergence <= 100, "max_divergence", self.max_divergence, "must be above 0 and at most 100"),
            (0 <= self.min_agreement <= 1, "min_agreement", self.min_agreement, "must be between 0 and 1"),
        )
