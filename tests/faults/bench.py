"""Runs faults one after the other, each in a forked process, and returns what a user would have seen.

A start costs seconds of imports. So the bench is a process that has imported everything, and each fault gets a fork of
it: environment variables, limits and a crash stay in the fork.
"""

import contextlib
import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from remint.core import launch
from tests.conftest import ROOT

_SECONDS = 300  # no command takes longer, a training on a busy machine included
_LINES = 31  # 30 faults and the number of those left out
_FORM = re.compile(r"[^:\s].*?: .+; .+", re.S)
_ADDED = re.compile(r"(\.\.\. and \d+ more)|( {2}\S+: .*)")


@dataclass(frozen=True)
class Fault:
    """One wrong thing and the command that meets it. `change` damages a copy of the workplace."""

    name: str
    argv: tuple[str, ...]
    change: Callable[[Path], object] = lambda place: None
    variables: dict[str, str | None] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    statuses: tuple[int, ...] = (1,)
    signal: tuple[int, float] = (0, 0.0)  # number, and seconds after the start
    form: bool = True  # whether it must be reported as `error: where: what; cure`
    real: bool = False  # whether it runs as a user's command, not in a fork
    says: tuple[str, ...] = ()  # texts that the output must hold
    within: Callable[[], object] = lambda: None  # called in the fork before the command, in the folder of the fault
    # Called with the folder of the fault and the template; raises AssertionError if the command left a wrong state.
    after: Callable[[Path, Path], object] = lambda place, template: None


def copy(template: Path, place: Path) -> None:
    """A copy whose files are hard links: a fault replaces a file and never writes into one."""
    shutil.copytree(template, place, copy_function=os.link, symlinks=True)


def run_all(faults: list[Fault], template: Path, folder: Path, results: Path) -> None:
    """Run each fault in its own copy of `template`; write [name, complaint] of each that is not reported well."""
    folder.mkdir()
    gc.collect()
    gc.freeze()  # a fork that collects would copy every page of the imports
    complaints = []
    for number, fault in enumerate(faults):
        place = folder / f"{number:04}"
        copy(template, place)
        fault.change(place)
        started = time.monotonic()
        status, said = (_as_command if fault.real else in_fork)(fault, place)
        if os.environ.get("BENCH_TIMES"):
            print(f"{time.monotonic() - started:.1f} s {fault.name}", flush=True)
        if complaint := complain(fault, status, said) or _left(fault, place, template):
            complaints.append([fault.name, complaint])
            print(f"{fault.name}: {complaint}", flush=True)
        _remove(place)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{len(faults)} faults, {used.ru_utime + used.ru_stime:.1f} s of a core", flush=True)
    results.write_text(json.dumps([len(faults), complaints]), encoding="utf-8")


def _left(fault: Fault, place: Path, template: Path) -> str:
    """What is wrong with the state that a command left; empty if it is as it should be."""
    try:
        fault.after(place, template)
    except AssertionError as error:
        return f"the state that it left is wrong: {error}"
    return ""


def _remove(place: Path) -> None:
    """Remove a folder, also if a fault made parts of it read-only."""
    for parent, _, _ in os.walk(place):
        Path(parent).chmod(0o755)
    shutil.rmtree(place)


def complain(fault: Fault, status: int, said: str) -> str:
    """What is wrong with the report of a fault; empty if it is as it should be."""
    shown = f"\n  status {status}, {' '.join(map(ascii, fault.argv))}\n{said[-1500:]}"
    # Python itself reports an interrupt during its own start, before any of our code runs.
    if "Traceback" in said and ("/remint/" in said or not fault.real):
        return f"a traceback{shown}"
    if fault.real and "KeyboardInterrupt" in said:
        return ""
    if status not in fault.statuses:
        return f"status is not one of {fault.statuses}{shown}"
    if absent := [text for text in fault.says if text not in said]:
        return f"does not say {absent[0]!r}{shown}"
    if not fault.form or status == 0:
        return ""
    if any(ord(char) < 32 and char not in "\n\t\r" for char in said):  # a progress bar returns to the start of its line
        return f"control characters{shown}"
    lines = said.split("error: ", 1)[-1].splitlines() if "error: " in said else []
    if not lines:
        return f"no line `error: …`{shown}"
    if len(lines) > _LINES:
        return f"{len(lines)} lines{shown}"
    if wrong := [line for line in lines if not _FORM.fullmatch(line) and not _ADDED.fullmatch(line)]:
        return f"not of the form `where: what; cure`: {wrong[0]!r}{shown}"
    return ""


def in_fork(fault: Fault, place: Path) -> tuple[int, str]:
    """Run the command of a fault in a fork, in the folder `place`. Returns its exit status and its output."""
    read, write = os.pipe()  # not a file, because a fault may limit the size of files
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            _become(fault, place, write)
        finally:
            os._exit(99)
    os.close(write)
    os.set_blocking(read, False)
    said = bytearray()
    status = _wait(pid, fault, lambda: _drain(read, said))
    os.close(read)
    return status, said.decode(errors="replace")


def _drain(read: int, said: bytearray) -> None:
    with contextlib.suppress(BlockingIOError):
        while block := os.read(read, 1 << 16):
            said += block


def _become(fault: Fault, place: Path, output: int) -> None:
    """In the fork: run the command as the interpreter would, and exit with its status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command starts, as while it imports
    os.chdir(place)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 256)
    for name, value in fault.variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.argv = ["remint", *fault.argv]
    from remint.__main__ import _threads, main

    if store := sys.modules.get("remint.runner.store"):  # it looked at the working directory when it was imported
        store.ROOT, store._OWN = place, f"sqlite:///{place / 'mlflow.db'}"
    # What the command would set before it starts itself again.
    os.environ |= launch.environment(_threads(fault.argv[1:]), network=fault.argv[0] == "stage_base")
    fault.within()
    for limit, value in fault.limits.items():
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _wait(pid: int, fault: Fault, drain: Callable[[], None]) -> int:
    """Send the fault's signal, wait for the fork; returns its exit status, or -N if signal N ended it."""
    number, delay = fault.signal
    start = time.monotonic()
    sent = not number
    while True:
        drain()
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            drain()
            return os.waitstatus_to_exitcode(status)
        if not sent and time.monotonic() - start > delay:
            os.kill(pid, number)
            sent = True
        if time.monotonic() - start > _SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _as_command(fault: Fault, place: Path) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DVC"))}
    environment |= {"PYTHONPATH": str(ROOT / "src")}
    environment |= {name: value for name, value in fault.variables.items() if value is not None}

    def limit() -> None:
        for which, value in fault.limits.items():
            resource.setrlimit(which, (value, value))

    with subprocess.Popen(
        [sys.executable, "-m", "remint", *fault.argv],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=limit,
    ) as process:
        if fault.signal[0]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(fault.signal[1])
            process.send_signal(fault.signal[0])
        said = process.communicate(timeout=_SECONDS * 3)[0]
    return process.returncode, said.decode(errors="replace")
