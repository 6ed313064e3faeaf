"""Make torch compute the same bits every time, and say under which conditions it did."""

import hashlib
import os
import platform
import random
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from remint.core import launch
from remint.core.settings import Runtime

# What computes besides torch: another version may round elsewhere.
_LIBRARIES = ("bitsandbytes", "numpy", "peft", "transformers")


def apply(runtime: Runtime) -> None:
    """Fix thread count and kernels. Call before the first tensor is made."""
    torch.set_num_threads(runtime.threads)
    if runtime.deterministic:
        torch.use_deterministic_algorithms(True)
        # Filling new memory hides no nondeterminism of ours and breaks buffers that are filled lazily.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # chosen by driver and heuristics; the other back ends are torch's own


def seed_step(seed: int, purpose: str, step: int) -> None:
    """Set every random state as a pure function of its arguments.

    With this at the start of each optimizer step, nothing that happens between steps can change the training, and a
    checkpoint needs no random state: seed and step are all there is to restore.
    """
    value = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()[:8], "big")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)


def conditions(device: torch.device) -> dict[str, str | int]:
    """What a result's bytes depend on besides its inputs: recorded with it, compared before a run is continued."""
    facts: dict[str, str | int] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "device": device.type,
        "machine": platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "vendor": _cpu_vendor(),
    }
    facts |= {name: version(name) for name in _LIBRARIES}
    facts |= {name: os.environ.get(name, "") for name in launch.NUMERIC}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _cpu_vendor() -> str:
    """Who made the CPU, '' where nothing says so: MKL multiplies matrices by other kernels on AMD's than on Intel's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
