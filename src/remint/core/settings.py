"""Parts of settings classes: range checks, names of dtypes, and the section that several stages share."""

from dataclasses import dataclass

from remint.core.errors import SettingsError, got

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Runtime:
    """How numbers are computed. A different value changes the bytes of the result."""

    threads: int
    deterministic: bool

    def __post_init__(self) -> None:
        check_ranges("runtime", (1 <= self.threads <= 512, "threads", self.threads, "must be between 1 and 512"))


def check_ranges(section: str, *rules: tuple[bool, str, object, str]) -> None:
    """Raise one SettingsError that lists every broken rule. A rule is (holds, setting, value, what it must be)."""
    faults = [f"{section}.{name}: {must}, {got(value)}" for holds, name, value, must in rules if not holds]
    if faults:
        raise SettingsError(*faults)
