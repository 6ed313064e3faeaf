"""What the section `replicate_data` of params.yaml says."""

from dataclasses import dataclass

from remint.core.config import check


@dataclass(frozen=True)
class ReplicateData:
    """Source files and how they become the training and the held-out set. `None` in no field: all is explicit."""

    identity: list[str]
    held_out: list[str]
    control: list[str]
    identity_held_out_share: float
    control_held_out_share: float
    identity_copies: int
    control_copies: int

    def __post_init__(self) -> None:
        share, control = self.identity_held_out_share, self.control_held_out_share
        split = not self.held_out
        check(
            "replicate_data",
            (len(self.identity) > 0, "identity", self.identity, "must name at least one file"),
            (0 <= share < 1, "identity_held_out_share", share, "must be at least 0 and below 1"),
            (share == 0 or split, "identity_held_out_share", share, "must be 0 where held_out names files"),
            (share > 0 or not split, "identity_held_out_share", share, "must be above 0 where held_out names no file"),
            (0 <= control < 1, "control_held_out_share", control, "must be at least 0 and below 1"),
            (1 <= self.identity_copies <= 100_000, "identity_copies", self.identity_copies, "must be between 1 and 100000"),
            (0 <= self.control_copies <= 100_000, "control_copies", self.control_copies, "must be between 0 and 100000"),
        )
