"""Settings of QLoRA: how the frozen base is stored, and the shape of the adapter. Values only, so quick to import."""

from dataclasses import dataclass

from remint.core.settings import check_ranges


@dataclass(frozen=True)
class Quantization:
    """How the frozen base is stored during training: NF4 (as in QLoRA and the tutorial), FP4 or unquantized."""

    kind: str
    double: bool
    block_size: int
    dequantize: str

    def __post_init__(self) -> None:
        check_ranges(
            "train.quantization",
            (self.kind in ("nf4", "fp4", "none"), "kind", self.kind, "must be nf4, fp4 or none"),
            (self.block_size in (64, 128, 256, 512), "block_size", self.block_size, "must be 64, 128, 256 or 512"),
            (self.dequantize in ("once", "each_use"), "dequantize", self.dequantize, "must be once or each_use"),
        )


@dataclass(frozen=True)
class Lora:
    """Shape of the adapter. `targets` are names of linear layers; the head is adapted only if it is named."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]

    def __post_init__(self) -> None:
        check_ranges(
            "train.lora",
            (1 <= self.rank <= 1024, "rank", self.rank, "must be between 1 and 1024"),
            (self.alpha > 0, "alpha", self.alpha, "must be greater than 0"),
            (
                self.alpha <= 0 or self.rank < 1 or 1e-4 <= self.alpha / self.rank <= 1000,
                "alpha",
                self.alpha,
                f"must be between 0.0001 and 1000 times the rank {self.rank}",
            ),
            (0 <= self.dropout <= 0.99, "dropout", self.dropout, "must be between 0 and 0.99"),
            (len(self.targets) > 0, "targets", self.targets, "must name at least one linear layer"),
        )
