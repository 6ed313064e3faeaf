"""Times what the processes exchange in a training step. `gpus.py` starts it under torchrun, one process a GPU.

    python -m torch.distributed.run --standalone --nproc-per-node=2 \
        benchmarks/gpus_exchange.py llama3-8b FILE

It calls the stage's own `StepSum` with gradients of the shape's adapter, and the bare collectives with buffers of the
same size. The first process writes the medians to FILE as JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpus_job import ROOT, adapter_sizes
from train_speed import roof

sys.path[:0] = [str(ROOT / "src")]
WARM, TIMES = 3, 10


def main() -> None:
    """Time the exchange of one shape and write the result."""
    from remint.core import launch

    shape, target = sys.argv[1], Path(sys.argv[2])
    launch.take_gpu(int(os.environ["LOCAL_RANK"]))
    import torch

    from remint.model import loading
    from remint.stages.train.process_group import joined

    device = loading.device()
    with joined(int(os.environ["WORLD_SIZE"]), device) as group:
        found = measure(torch, group, device, adapter_sizes(shape))
        if group.leads:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            target.write_text(json.dumps(found | {"roof": roof(torch, device, dtype)}), encoding="utf-8")


def measure(torch: Any, group: Any, device: Any, sizes: list[int]) -> dict[str, float]:
    """Seconds of each part of the exchange, and its bytes."""
    import torch.distributed as dist

    from remint.stages.train.process_group import StepSum

    parameters = [torch.nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
    step_sum = StepSum(group, parameters)
    loss = torch.zeros((), device=device)
    gradients = [torch.ones_like(parameter) for parameter in parameters]

    def add() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        step_sum.add(loss, group.size)

    def seconds(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        times = []
        for _ in range(WARM + TIMES):
            before()
            finish_queued(torch, device)
            group.agreed(0)  # all begin together
            started = time.monotonic()
            action()
            finish_queued(torch, device)
            times.append(time.monotonic() - started)
        return statistics.median(times[WARM:])

    part = seconds(add)
    rest = seconds(step_sum.finish, before=add)
    length = -(-(sum(sizes) + 1) // group.size) * group.size
    sent, received = (torch.zeros(length, device=device) for _ in range(2))
    return {
        "bytes": 4.0 * length,
        "add_s": part,
        "finish_s": rest,
        "all_to_all_s": seconds(lambda: dist.all_to_all_single(received, sent)),
        "all_gather_s": seconds(lambda: dist.all_gather_single(received, sent[: length // group.size])),
    }


def finish_queued(torch: Any, device: Any) -> None:
    """Wait until the device has done all that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
