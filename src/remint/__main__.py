"""The command line: `remint STAGE [key=value …]` runs a stage, `remint chat` starts a chat with the result."""

# ruff: noqa: E402  (during the imports, which take a second, Ctrl-C must end the process without a traceback)
import signal

_on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
import yaml  # type: ignore[import-untyped]

from remint.commands import COMMANDS
from remint.commands.stage import check_pipeline, command_of, local_rank
from remint.core import launch, machine, process, signals
from remint.core.errors import RemintError, Stopped, one_line, out_of_memory, visible
from remint.core.files import read_text
from remint.core.paths import PARAMS, PIPELINE

signal.signal(signal.SIGINT, _on_interrupt)

# Raised for invalid arguments. Typer exports only its subclass.
_UsageError: Any = typer.BadParameter.__base__
# What Typer returns if a signal's exception reaches it while it reads the arguments. A command runs outside of it.
_INTERRUPTED = 130
# These only run other programs or copy a file. Their child processes must not inherit our numeric environment.
_KEEP_ENVIRONMENT = ("recipes", "recipe", "reproduce")


def main() -> int:
    """Run one command. Returns the exit status. A user's mistake is one line on stderr, without a traceback."""
    arguments = sys.argv[1:]
    listening = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    if "LOCAL_RANK" in os.environ:  # asked now, because training removes the variable
        listening = []  # one of several processes never has a handler of ours
    try:
        parent = process.known_parent()
        signals.raise_on_termination()
        if os.environ.get("DVC_STAGE"):
            process.end_with_parent(parent)  # now: what follows imports for seconds
        status = _dispatch(arguments)
        sys.stdout.flush()  # inside the try, where a closed pipe is handled
        return status
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.status
    except RemintError as error:
        if number := _signal_behind(error, listening):
            return 128 + number
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if number := _signal_behind(error, listening):
            return 128 + number
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 128 + signal.SIGPIPE
        line = _machine_fault(error, arguments[0] if arguments else "remint")
        if line is None:
            raise
        print(f"error: {visible(line)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(str(error) or "interrupted", file=sys.stderr, flush=True)
        return 128 + _signal_behind(error, listening)


def _signal_behind(error: BaseException, listening: Sequence[int]) -> int:
    """The signal that led to an error; 0 if none did. A library may have turned a signal's exception into another one.

    The handlers of the signals in `listening` are gone after the first of them.
    """
    chain = [error]
    while (earlier := chain[-1].__context__) is not None:
        chain.append(earlier)
    found = [link.number for link in chain if isinstance(link, signals.Terminated)]
    found += [number for number in listening if signal.getsignal(number) is signal.SIG_DFL]
    found += [signal.SIGINT for link in chain if isinstance(link, KeyboardInterrupt)]
    return next(iter(found), 0)


def _dispatch(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else ""
    if name and not name.startswith("-") and name != "help":
        _check_name(name)
        if name not in _KEEP_ENVIRONMENT and "--help" not in arguments:
            _fix_environment(name, arguments[1:])
    return call(["--help"] if name in ("-h", "help") else arguments)


def call(arguments: Sequence[str]) -> int:
    """Parse the arguments of a command, then run it in this process. Returns the exit status. Raises RemintError."""
    # Shell completion passes the command line in a variable and may need the options of any command.
    name = None if "_REMINT_COMPLETE" in os.environ else (arguments[0] if arguments else "")
    try:
        command = _app(name)(list(arguments) or ["--help"], prog_name="remint", standalone_mode=False)
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx else "remint"
        raise RemintError(
            f"{where}: {error.format_message().rstrip('.')}; `{where} --help` lists its arguments"
        ) from None
    if command == _INTERRUPTED:
        raise KeyboardInterrupt
    return (command() or 0) if callable(command) else (command or 0)


def _check_name(name: str) -> None:
    if name not in COMMANDS and name not in (stages := _stages()):
        check_pipeline()  # a damaged dvc.yaml may lack a stage
        raise RemintError(f"remint: no such command, got {name!r}; choose from {', '.join([*stages, *COMMANDS])}")


def _fix_environment(name: str, rest: Sequence[str]) -> None:
    """Restart the process with the environment variables that fix numeric results, before torch is imported."""
    launch.restart_with(launch.environment(_threads(rest), network=name == "stage_base"))
    if (rank := local_rank()) is not None:
        # A Python handler would wait for a process that may never start.
        for number in signals.STOPPING:
            signal.signal(number, signal.SIG_DFL)
        launch.take_gpu(rank)


def _app(name: str | None) -> typer.Typer:
    """The Typer app with all commands. Only the module of the command `name` is imported, or all if `name` is None."""
    app = typer.Typer(
        help="Give a language model a new identity, and get the same model, byte for byte, every time.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    for stage, summary in _stages().items():
        panel = "Stages of the pipeline, in order"
        app.command(stage, short_help=summary, rich_help_panel=panel)(_deferred(command_of(stage)))
    for command, summary in COMMANDS.items():
        is_needed = name is None or name == command
        function = import_module(f"remint.commands.{command.replace('-', '_')}").main if is_needed else _not_imported
        app.command(command, short_help=summary, rich_help_panel="Commands")(_deferred(function))
    return app


def _deferred(function: Callable[..., int | None]) -> Callable[..., Callable[[], int | None]]:
    """Make a command return its work as a function, to be called outside Typer's handling of interrupts and pipes."""

    @wraps(function)
    def read(**arguments: object) -> Callable[[], int | None]:
        return partial(function, **arguments)

    return read


def _not_imported() -> None:
    """Placeholder for a command that is listed but not called."""


def _stages() -> dict[str, str]:
    """Name and description of each stage in dvc.yaml, in order; empty if there is no such file."""
    content = _read_yaml(PIPELINE)
    stages = content.get("stages") if isinstance(content, dict) else None
    found = stages.items() if isinstance(stages, dict) else ()
    return {str(name): str(stage.get("desc", "")) for name, stage in found if isinstance(stage, dict)}


def _threads(rest: Sequence[str]) -> int:
    """The number of threads in the settings, never the machine's. Mistakes are reported later, with all others."""
    content = _read_yaml(PARAMS)
    runtime = content.get("runtime") if isinstance(content, dict) else None
    found = [str(runtime.get("threads"))] if isinstance(runtime, dict) else [""]
    found += [entry.partition("=")[2] for entry in rest if entry.startswith("runtime.threads=")]
    return int(found[-1]) if found[-1].isdecimal() and 0 < int(found[-1]) <= 512 else 1


def _read_yaml(path: Path) -> object:
    """The content of a YAML file; None if it cannot be read. `runner.config` checks the file later and reports faults.

    PyYAML alone, because importing OmegaConf would add a quarter of a second to every start.
    """
    try:
        return yaml.safe_load(read_text(path, "", limit=2**20))
    except Exception:  # a broken file may raise anything; it is reported later
        return None


def _reader_is_gone() -> bool:
    """Whether the reader of our stdout has closed the pipe, as `head` does. If so, discard the remaining output."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if not pipe.poll(0):  # a closed pipe would report POLLERR
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _machine_fault(error: Exception, command: str) -> str | None:
    """One line for a full disk or another limit of the machine, which our code cannot lift; None for a bug."""
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        return f"{command}: no temporary folder can be written ({one_line(error)}); free space, or name one in TMPDIR"
    if (explained := machine.explain(error)) is None:
        if out_of_memory(error):
            return f"{command}: memory ran out ({one_line(error)}); end other programs and run again"
        return None
    what, cure = explained
    return f"{command}: {what}; {cure}"


if __name__ == "__main__":
    sys.exit(main())
