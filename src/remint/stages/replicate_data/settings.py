"""The `replicate_data` section of params.yaml."""

from dataclasses import dataclass

from remint.core.settings import check_ranges


@dataclass(frozen=True)
class ReplicateData:
    """Source files and how they become the training and held-out sets.

    A `*_share` holds out that fraction of the questions in place of a held-out file. The answers of `control` are
    learned. In `control_base` the model is held to the base's own answers, which `base_answers` names if they are known.
    """

    identity: list[str]
    identity_held_out: list[str]
    identity_held_out_share: float
    identity_copies: int
    control: list[str]
    control_base: list[str]
    base_answers: str | None
    control_held_out: list[str]
    control_held_out_share: float
    control_copies: int

    def __post_init__(self) -> None:
        check_ranges(
            "replicate_data",
            (len(self.identity) > 0, "identity", self.identity, "must name at least one file"),
            (
                bool(self.identity_held_out) or self.identity_held_out_share > 0,
                "identity_held_out",
                self.identity_held_out,
                "must name a file if identity_held_out_share is 0, or nothing can be evaluated",
            ),
            (
                self.base_answers is None or bool(self.control_base),
                "base_answers",
                self.base_answers,
                "must be null if control_base names no file",
            ),
            *_share_rule("identity_held_out", self.identity_held_out, self.identity_held_out_share),
            *_share_rule("control_held_out", self.control_held_out, self.control_held_out_share),
            (
                1 <= self.identity_copies <= 100_000,
                "identity_copies",
                self.identity_copies,
                "must be between 1 and 100000",
            ),
            (
                0 <= self.control_copies <= 100_000,
                "control_copies",
                self.control_copies,
                "must be between 0 and 100000",
            ),
        )


def _share_rule(name: str, files: list[str], share: float) -> list[tuple[bool, str, object, str]]:
    return [
        (0 <= share < 1, f"{name}_share", share, "must be at least 0 and below 1"),
        (not (files and share), f"{name}_share", share, f"must be 0 if {name} names files"),
    ]
