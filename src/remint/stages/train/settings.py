"""The `train` section of params.yaml; the comments there explain each value."""

from dataclasses import dataclass

from remint.core.settings import DTYPES, check_ranges
from remint.model.qlora import Lora, Quantization

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Distillation:
    """How a record holds the model to the base: the weight of a token, and how many tokens of the answer count."""

    weight: float
    tokens: int

    def __post_init__(self) -> None:
        check_ranges(
            "train.distillation",
            (1e-6 <= self.weight <= 1e6, "weight", self.weight, "must be between 0.000001 and 1000000"),
            (1 <= self.tokens <= 4096, "tokens", self.tokens, "must be between 1 and 4096"),
        )


@dataclass(frozen=True)
class Train:
    """All settings of a training run that can change its result, except the seed and the number of threads."""

    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    clip_norm: float
    warmup_ratio: float
    schedule: str
    epochs: int
    max_length: int
    packing: bool
    micro_batch: int
    accumulation: int
    processes: int
    precision: str
    gradient_checkpointing: bool
    kernels: str
    quantization: Quantization
    lora: Lora
    distillation: Distillation
    system: str
    save_steps: int
    keep_checkpoints: int
    eval_steps: int
    sample_prompts: list[str]
    sample_tokens: int
    resume: bool

    def __post_init__(self) -> None:
        check_ranges("train", *_optimizer_rules(self), *_batch_rules(self), *_watching_rules(self))


def _optimizer_rules(t: Train) -> list[tuple[bool, str, object, str]]:
    return [
        (0 < t.lr <= 1, "lr", t.lr, "must be above 0 and at most 1"),
        (
            # Nearer to 1, float32 would round it to 1, and the average would never leave 0.
            len(t.betas) == 2 and all(0 <= beta <= 0.999999 for beta in t.betas),
            "betas",
            t.betas,
            "must be two numbers between 0 and 0.999999",
        ),
        # Below that, float32 rounds it to 0, and a weight without a gradient would become 0 / 0.
        (1e-30 <= t.eps <= 1, "eps", t.eps, "must be between 1e-30 and 1"),
        (0 <= t.weight_decay <= 10, "weight_decay", t.weight_decay, "must be between 0 and 10"),
        (1e-9 <= t.clip_norm <= 1e9, "clip_norm", t.clip_norm, "must be between 1e-9 and 1e9"),
        (0 <= t.warmup_ratio < 1, "warmup_ratio", t.warmup_ratio, "must be at least 0 and below 1"),
        (t.schedule in SCHEDULES, "schedule", t.schedule, f"must be one of {', '.join(SCHEDULES)}"),
    ]


def _batch_rules(t: Train) -> list[tuple[bool, str, object, str]]:
    return [
        (1 <= t.epochs <= 10_000, "epochs", t.epochs, "must be between 1 and 10000"),
        (8 <= t.max_length <= 1_000_000, "max_length", t.max_length, "must be between 8 and 1000000 tokens"),
        (1 <= t.micro_batch <= 4096, "micro_batch", t.micro_batch, "must be between 1 and 4096"),
        (1 <= t.accumulation <= 4096, "accumulation", t.accumulation, "must be between 1 and 4096"),
        (1 <= t.processes <= 1024, "processes", t.processes, "must be between 1 and 1024"),
        (t.precision in DTYPES, "precision", t.precision, f"must be one of {', '.join(DTYPES)}"),
        (t.kernels in ("fused", "plain"), "kernels", t.kernels, "must be fused or plain"),
    ]


def _watching_rules(t: Train) -> list[tuple[bool, str, object, str]]:
    return [
        (t.save_steps >= 1, "save_steps", t.save_steps, "must be 1 or more"),
        (t.keep_checkpoints >= 1, "keep_checkpoints", t.keep_checkpoints, "must be 1 or more"),
        (t.eval_steps >= 1, "eval_steps", t.eval_steps, "must be 1 or more"),
        (all(p.strip() for p in t.sample_prompts), "sample_prompts", t.sample_prompts, "must hold no empty prompt"),
        (1 <= t.sample_tokens <= 4096, "sample_tokens", t.sample_tokens, "must be between 1 and 4096"),
    ]
