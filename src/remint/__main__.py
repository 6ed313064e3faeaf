"""The command line: `remint STAGE [key=value …]` runs a stage, `remint chat` talks to the result."""

import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
import yaml  # type: ignore[import-untyped]

from remint.commands import COMMANDS
from remint.commands.stage import command_of
from remint.core import launch
from remint.core.errors import RemintError, Stopped, no_right, no_room, one_line, visible
from remint.core.files import read_text
from remint.core.paths import PARAMS, PIPELINE

# The error of words that a command does not take; Typer exports only its subclass.
_UsageError: Any = typer.BadParameter.__base__
# These run other programs or copy a file: what they start must not inherit our numeric environment.
_AS_THEY_ARE = ("recipes", "recipe", "reproduce")


def main() -> int:
    """Run one command; returns the exit status. A user's mistake is one line on stderr, without a traceback."""
    arguments = sys.argv[1:]
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()  # here a reader that has ended is still no fault
        return status
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.status
    except RemintError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 128 + signal.SIGPIPE
        line = _machine_fault(error, arguments[0] if arguments else "remint")
        if line is None:
            raise
        print(f"error: {visible(line)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else ""
    if name and not name.startswith("-") and name != "help":
        _check_name(name)
        if name not in _AS_THEY_ARE and "--help" not in arguments:
            _fix_environment(name, arguments[1:])
    return call(["--help"] if name in ("-h", "help") else arguments)


def call(arguments: Sequence[str]) -> int:
    """Read the arguments of a command, then run it in this process; returns the exit status. Raises RemintError."""
    # While a shell completes a word, the words come in a variable, and any command's options may be asked for.
    name = None if "_REMINT_COMPLETE" in os.environ else (arguments[0] if arguments else "")
    try:
        command = _app(name)(list(arguments) or ["--help"], prog_name="remint", standalone_mode=False)
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx else "remint"
        raise RemintError(
            f"{where}: {error.format_message().rstrip('.')}; `{where} --help` shows what it takes"
        ) from None
    return (command() or 0) if callable(command) else (command or 0)


def _check_name(name: str) -> None:
    if name not in COMMANDS and name not in (stages := _stages()):
        if not stages:
            read_text(PIPELINE, "run this at the root of the repository, or get the file again", RemintError)
        raise RemintError(f"remint: no such command, got {name!r}; choose from {', '.join([*stages, *COMMANDS])}")


def _fix_environment(name: str, rest: Sequence[str]) -> None:
    """Start the process anew under the variables that fix how numbers are computed, before anything heavy is imported."""
    launch.restart_with(launch.environment(_threads(rest), network=name == "stage_base"))
    if (local_rank := os.environ.get("LOCAL_RANK")) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # Python's own handler would wait for a process that may never come
        launch.take_gpu(int(local_rank))


def _app(name: str | None) -> typer.Typer:
    """All commands. Only the module of the command `name` is imported; of all if it is None."""
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
        is_asked = name is None or name == command
        function = import_module(f"remint.commands.{command.replace('-', '_')}").main if is_asked else _not_imported
        app.command(command, short_help=summary, rich_help_panel="Commands")(_deferred(function))
    return app


def _deferred(function: Callable[..., int | None]) -> Callable[..., Callable[[], int | None]]:
    """A command that returns what is to be done: it is done outside Typer, which has handlers of its own for interrupts and pipes."""

    @wraps(function)
    def read(**arguments: object) -> Callable[[], int | None]:
        return partial(function, **arguments)

    return read


def _not_imported() -> None:
    """Stands for a command that is listed and not called."""


def _stages() -> dict[str, str]:
    """Name and description of each stage in dvc.yaml, in their order; none where there is no such file."""
    content = _read_yaml(PIPELINE)
    stages = content.get("stages") if isinstance(content, dict) else None
    return {str(name): str(stage.get("desc", "")) for name, stage in stages.items()} if isinstance(stages, dict) else {}


def _threads(rest: Sequence[str]) -> int:
    """The declared number of threads, never the machine's. A mistake in it is reported later, with all others."""
    content = _read_yaml(PARAMS)
    runtime = content.get("runtime") if isinstance(content, dict) else None
    found = [str(runtime.get("threads"))] if isinstance(runtime, dict) else [""]
    found += [entry.partition("=")[2] for entry in rest if entry.startswith("runtime.threads=")]
    return int(found[-1]) if found[-1].isdecimal() and 0 < int(found[-1]) <= 512 else 1


def _read_yaml(path: Path) -> object:
    """What a YAML file holds, None if it cannot be read: `runner.config` checks it later and says what is wrong.

    PyYAML alone, because OmegaConf would take a quarter of a second before every start.
    """
    try:
        return yaml.safe_load(read_text(path, "", limit=2**20))
    except Exception:  # a broken file may raise anything; see above
        return None


def _reader_is_gone() -> bool:
    """Whether the reader of what is printed has ended, as `head` does; what is left is then thrown away."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if not pipe.poll(0):  # it would report POLLERR
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _machine_fault(error: Exception, command: str) -> str | None:
    """One line for a full disk or a missing permission, which no code of ours can cure; None for what is a bug."""
    if no_room(error):
        return (
            f"{command}: the disk is full ({one_line(error)}); free space and run again, nothing that was whole is lost"
        )
    if no_right(error):
        return (
            f"{command}: a file may not be read or written ({one_line(error)}); correct its permissions and run again"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
