"""The environment that must be set before Python starts, because libraries read it once while they load."""

import os
import platform
import sys
from collections.abc import Mapping

_AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2,STRICT", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# Those of the block below that decide how a number is rounded or in which order things are met: part of a result's origin.
NUMERIC = (*_AVX2_ONLY, "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC", "PYTHONHASHSEED")
# Exit status of one of several processes that ended because another one did.
LOST = 75


def environment(threads: int, network: bool) -> dict[str, str]:
    """The variables that fix how numbers are computed; `network` lets a stage reach a model hub."""
    block = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_DYNAMIC": "FALSE",
        "MKL_DYNAMIC": "FALSE",
        # A thread that waits for the next operation looks for it so many times, then it sleeps: to wake it takes as long as many
        # an operation of a small model, but to look for longer slows both down where another job wants the core.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1500",
        # Large tensors from memory that is kept, not mapped and cleared by the kernel each time: about 5 % faster training.
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
    # One instruction set for all x86 machines: AVX2 and AVX-512 kernels round differently. MKL obeys on Intel's CPUs; on
    # AMD's it has kernels of its own, which do not change with the instruction set.
    return block | (_AVX2_ONLY if platform.machine() in ("x86_64", "AMD64") else {})


def missing(block: Mapping[str, str]) -> dict[str, str]:
    """What of the block is not yet in force in this process."""
    return {name: value for name, value in block.items() if os.environ.get(name) != value}


def take_gpu(index: int) -> None:
    """Let this process see one of the visible GPUs alone. Call before anything asks what there is."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index)] if visible is None else visible.split(",")[index : index + 1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)


def restart_with(block: Mapping[str, str]) -> None:
    """Replace this process by the same command under the environment block, unless it is in force already."""
    if missing(block):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "remint", *sys.argv[1:]], {**os.environ, **block})
