"""Starts the processes of a multi-process training, each as torchrun would, and watches them until all have ended.

torchrun itself works, too, for example on several machines. But its agent kills processes 30 seconds after a signal,
saved or not, and loses their exit status. So the processes of a single machine are started here.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

from remint.core import signals
from remint.core.errors import RemintError, SettingsError, got
from remint.core.launch import LOST

Worker = subprocess.Popen[bytes]
# Seconds before the others are killed after one process failed: they may report their own error, or wait forever.
_GRACE = 15.0
_STOPPED = tuple(128 + number for number in signals.STOPPING)
# All traffic stays on the loopback interface: no other machine takes part.
_LOCAL = {"MASTER_ADDR": "127.0.0.1"} | (
    {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}
)


def rank() -> int | None:
    """This process's rank; None if the world size is 1. Raises SettingsError if torchrun's variables are not valid."""
    return _variable("RANK") if _variable("WORLD_SIZE") > 1 else None


def local_rank() -> int | None:
    """This process's rank among those of this machine; None if the world size is 1 or no launcher has set it.

    Raises SettingsError if torchrun's variables are not valid.
    """
    return _variable("LOCAL_RANK") if "LOCAL_RANK" in os.environ and _variable("WORLD_SIZE") > 1 else None


def _variable(name: str) -> int:
    """The value of one of torchrun's variables: a number of processes, or a rank below it."""
    value = os.environ.get(name, "1" if name == "WORLD_SIZE" else "")
    least, most = (1, 2**31) if name == "WORLD_SIZE" else (0, _variable("WORLD_SIZE") - 1)
    if value.isascii() and value.isdecimal() and len(value) < 12 and least <= int(value) <= most:
        return int(value)
    raise SettingsError(
        f"environment: {name}: must be a whole number from {least} to {most}, {got(value)}; "
        "unset WORLD_SIZE, RANK and LOCAL_RANK, or start the processes with torchrun"
    )


def start(processes: int, arguments: Sequence[str]) -> int:
    """Run `remint ARGUMENTS` as `processes` processes. Returns their exit status.

    The first signal is passed on to each of them; the second one kills them. Raises RemintError if one was killed.
    """
    from torch import distributed

    _check_gpus(processes)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    common = {**os.environ, **_LOCAL, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        workers: list[Worker] = []
        received = stack.enter_context(_forwarded(workers))
        for number in range(processes):
            place = {"RANK": str(number), "LOCAL_RANK": str(number)}
            workers.append(_started(arguments, {**common, **place}, outputs[number] if number else None))
        if received:  # a signal that arrived while they were being started
            for worker in workers:
                worker.send_signal(received[0])
        killed = _wait(workers)
        statuses = [worker.returncode for worker in workers]
        if received and any(statuses):
            return 128 + received[0]
        return _exit_status(statuses, outputs, killed)


def _started(arguments: Sequence[str], environment: dict[str, str], output: IO[str] | None) -> Worker:
    """Start one process. With `output`, its stderr goes there and its stdout is dropped. Else it inherits both."""
    return subprocess.Popen(
        [sys.executable, "-m", "remint", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if output else None,
        stderr=output,
        process_group=0,  # so that Ctrl-C reaches it only through our own handler
    )


def _check_gpus(processes: int) -> None:
    from torch import cuda

    from remint.model import loading

    if loading.device().type == "cuda" and processes > cuda.device_count():
        raise SettingsError(
            f"params: train.processes: must be at most {cuda.device_count()}, the number of GPUs, got {processes}; raise "
            "train.accumulation instead, or compute on the CPU with REMINT_DEVICE=cpu"
        )


@contextlib.contextmanager
def _forwarded(workers: Sequence[Worker]) -> Iterator[list[int]]:
    """Yield the list of received signals that ask to stop. The workers get the first one; the second one kills them."""
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        for worker in workers:
            worker.send_signal(signal.SIGKILL if received else number)
        received.append(number)

    with signals.handled(receive):
        yield received


def _wait(workers: Sequence[Worker]) -> set[int]:
    """Wait until all have ended. Returns the ranks of those that were killed because another one failed."""
    killed: set[int] = set()
    deadline = float("inf")
    while running := [number for number, worker in enumerate(workers) if worker.poll() is None]:
        if deadline == float("inf") and any(worker.returncode not in (None, 0, *_STOPPED) for worker in workers):
            deadline = time.monotonic() + _GRACE
        if time.monotonic() > deadline:
            killed.update(running)
            for number in running:
                workers[number].kill()
        time.sleep(0.05)
    return killed


def _exit_status(statuses: Sequence[int], outputs: Sequence[IO[str]], killed: set[int]) -> int:
    """The exit status of the training. First prints the error of a process whose stderr was captured.

    Raises RemintError if a process was ended by a signal that we did not send.
    """
    for number, status in enumerate(statuses):
        if status < 0 and number not in killed:
            raise RemintError(
                f"train: process {number + 1} of {len(statuses)} was ended by {signal.Signals(-status).name}; the same command "
                "continues after the last checkpoint"
            )
    own = [number for number, status in enumerate(statuses) if status > 0 and status not in (LOST, *_STOPPED)]
    if own and own[0] > 0:
        outputs[own[0]].seek(0)
        print(outputs[own[0]].read(), end="", file=sys.stderr)
    if own:
        return statuses[own[0]]
    return next((status for status in statuses if status in _STOPPED), int(any(statuses)))
