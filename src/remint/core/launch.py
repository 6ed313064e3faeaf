"""Environment variables that must be set before Python starts, because libraries read them only once, on loading."""

import os
import platform
import sys
from collections.abc import Mapping

_AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2,STRICT", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# Variables of the block below that affect rounding or the order of operations. A result's provenance records them.
NUMERIC = (*_AVX2_ONLY, "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC", "PYTHONHASHSEED")
# Exit status of a process that ended because another process of the same training ended.
LOST = 75


def environment(threads: int, network: bool) -> dict[str, str]:
    """The variables that fix how numbers are computed. `network` allows a stage to use the Hugging Face Hub."""
    block = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_DYNAMIC": "FALSE",
        "MKL_DYNAMIC": "FALSE",
        # Idle threads spin this often before sleeping. Waking one costs as much as several operations of a small model.
        # Longer spinning would slow down this job and any other job that needs the core.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1500",
        # Keep the memory of large tensors for reuse. Otherwise the kernel would map and clear it each time. Training is
        # about 5 % faster.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "FLASH_ATTENTION_DETERMINISTIC": "1",
        "HF_HUB_OFFLINE": "0" if network else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TZ": "UTC",
        "LC_ALL": "C.UTF-8",
    }
    # One instruction set for all x86 machines, because AVX2 and AVX-512 kernels round differently. MKL follows it on
    # Intel CPUs. On AMD CPUs, MKL uses other kernels, which do not depend on the instruction set.
    return block | (_AVX2_ONLY if platform.machine() in ("x86_64", "AMD64") else {})


def missing(block: Mapping[str, str]) -> dict[str, str]:
    """The variables of the block that do not yet have their value in this process."""
    return {name: value for name, value in block.items() if os.environ.get(name) != value}


def take_gpu(index: int) -> None:
    """Restrict this process to one of the visible GPUs. Call it before anything queries the GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index)] if visible is None else visible.split(",")[index : index + 1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)


def restart_with(block: Mapping[str, str]) -> None:
    """Replace this process with the same command under the environment block, unless the block is already set."""
    if missing(block):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "remint", *sys.argv[1:]], {**os.environ, **block})
