"""Make torch compute the same bits every time, and record the conditions that those bits depend on."""

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

# Libraries that compute besides torch: another version may round differently.
_LIBRARIES = ("bitsandbytes", "numpy", "peft", "transformers")


def apply(runtime: Runtime) -> None:
    """Fix the thread count and the choice of kernels. Call it before the first tensor is created."""
    torch.set_num_threads(runtime.threads)
    if runtime.deterministic:
        torch.use_deterministic_algorithms(True)
        # Do not let torch fill new memory with NaN: our code never reads uninitialized memory, and filling breaks
        # buffers that are initialized lazily.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    # cuDNN chooses its attention kernels by driver and heuristics. The other backends are part of torch, whose version
    # is locked.
    torch.backends.cuda.enable_cudnn_sdp(False)


def seed_step(seed: int, purpose: str, step: int) -> None:
    """Set the random states of Python, NumPy and torch as a pure function of the arguments.

    It is called at the start of each optimizer step. So nothing that happens between steps can change the training, and
    a checkpoint stores no random state: the seed and the step number are enough.
    """
    value = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()[:8], "big")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)


def conditions(device: torch.device) -> dict[str, str | int]:
    """What a result's bytes depend on besides its inputs: recorded with the result, compared before a run resumes."""
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
    """The CPU vendor, or '' if unknown: MKL uses different matrix product kernels on AMD's CPUs than on Intel's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
