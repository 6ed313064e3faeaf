"""The `eval_chat` section of params.yaml."""

from dataclasses import dataclass

from remint.core.settings import check_ranges


@dataclass(frozen=True)
class EvalChat:
    """How the report's answers are generated. Decoding is always greedy, which is also chat's default."""

    max_new_tokens: int
    batch: int

    def __post_init__(self) -> None:
        check_ranges(
            "eval_chat",
            (1 <= self.max_new_tokens <= 8192, "max_new_tokens", self.max_new_tokens, "must be between 1 and 8192"),
            (1 <= self.batch <= 4096, "batch", self.batch, "must be between 1 and 4096"),
        )
