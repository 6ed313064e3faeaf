"""The command line: `remint STAGE [key=value …]` runs a stage, `remint chat` talks to the result."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from remint.core.errors import RemintError, Stopped, no_right, no_room, one_line, visible

_COMMANDS = {
    "chat": "talk to the merged model",
    "serve": "answer by HTTP with the merged model",
    "ui": "show the runs in MLflow's pages",
    "export": "write the merged model in the layout of its base (internlm2)",
    "import-adapter": "turn an adapter that XTuner trained for InternLM2 into one for the base",
    "check": "read all settings and say what is wrong with them",
    "sync": "write the pipeline's present state to MLflow as one run",
    "summary": "say what was built, how well, and what to type next",
    "verify": "recompute the checksums of every artefact, check provenance and signature",
    "sign": "sign the merged model with an SSH key",
    "reproduce": "rebuild the last commit elsewhere and compare every byte",
    "recipes": "list the ready-made params.yaml files",
    "recipe": "put one of them in place",
}
# Commands with options of their own, by module.
_WITH_OPTIONS = {
    "chat": "remint.terminal",
    "serve": "remint.server",
    "ui": "remint.ui",
    "export": "remint.export",
    "import-adapter": "remint.import_adapter",
}
_WITHOUT_OPTIONS = {
    "check": "remint.preflight",
    "sync": "remint.tracking",
    "summary": "remint.summary",
    "verify": "remint.summary",
}


def main() -> int:
    """Run one command; returns the exit status. A user's mistake is told in a line each, without a traceback."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    try:
        status = _dispatch(arguments[0], arguments[1:])
        sys.stdout.flush()  # here a reader that has ended is still no fault
        return status
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.status
    except RemintError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        told = _of_the_machine(error, arguments[0])
        if told is None:
            raise
        print(f"error: {visible(told)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether the reader of what is printed has ended, as `head` does; what is left is then thrown away."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if not pipe.poll(0):  # it would tell POLLERR
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _of_the_machine(error: Exception, command: str) -> str | None:
    """The line for a fault of disk or rights, which no code of ours can mend; None for what is a bug."""
    if no_room(error):
        return (
            f"{command}: the disk is full ({one_line(error)}); free space and run again, nothing that was whole is lost"
        )
    if no_right(error):
        return f"{command}: a file may not be read or written ({one_line(error)}); mend its permissions and run again"
    return None


def _dispatch(name: str, rest: Sequence[str]) -> int:
    if name in ("recipes", "recipe"):
        return import_module("remint.recipes").main(name, rest)
    if name == "reproduce":  # before the environment is fixed: what it starts must not depend on that
        return import_module("remint.reproduce").main(rest)
    from remint import fingerprint, memory, workers
    from remint.core import launch

    known = [*fingerprint.stages(), *_COMMANDS]
    if name not in known:
        raise RemintError(f"remint: no such command, got {name!r}; choose from {', '.join(known)}")
    # Before anything heavy is imported: the process starts anew when a variable is not yet set.
    launch.restart_with(launch.environment(_threads(rest), network=name == "stage_base"))
    if workers.rank() is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait for a process that may never come
        launch.take_gpu(int(os.environ["LOCAL_RANK"]))
    if name in _WITH_OPTIONS:
        with memory.explained(name, {}):
            return import_module(_WITH_OPTIONS[name]).main(rest)
    if name in _WITHOUT_OPTIONS:
        argparse.ArgumentParser(prog=f"remint {name}", description=f"This will {_COMMANDS[name]}.").parse_args(rest)
        getattr(import_module(_WITHOUT_OPTIONS[name]), name)()
        return 0
    if name == "sign":
        return _sign(rest)
    return run_stage(name, rest)


def _sign(rest: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="remint sign", description="Sign the merged model with an SSH key.")
    parser.add_argument("key", type=Path, metavar="KEY", help="private key, like ~/.ssh/id_ed25519")
    import_module("remint.signature").sign(parser.parse_args(rest).key)
    return 0


def run_stage(stage: str, rest: Sequence[str]) -> int:
    """Compose the stage's settings, open tracking, run."""
    from omegaconf import OmegaConf

    from remint import fingerprint, memory, preflight, workers
    from remint.core import config
    from remint.core.log import silent

    parser = argparse.ArgumentParser(
        prog=f"remint {stage}", description=f"Run the stage {stage} with settings from params.yaml."
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings for this run alone, like train.lr=1e-3"
    )
    parser.add_argument("--cfg", action="store_true", help="print the composed settings and stop")
    # Hydra's own programs want `--cfg job`.
    options = parser.parse_args([word for word in rest if "--cfg" not in rest or word != "job"])
    if os.environ.get("DVC_STAGE"):
        preflight.settings()  # an experiment, too, is to learn of a late stage's mistake before an early one runs
    asks = preflight.asks_as(stage)
    raw = config.compose_raw(asks, options.overrides)
    arguments = config.to_objects(asks, raw, options.overrides)
    if options.cfg:
        print(OmegaConf.to_yaml(OmegaConf.create(_plain(OmegaConf.to_container(raw, resolve=True)))), end="")
        return 0
    if not os.environ.get("DVC_STAGE") and workers.rank() is None:
        for told in preflight.other_inputs(stage, options.overrides):
            print(f"warning: {told}", file=sys.stderr)
    run = import_module(f"remint.stages.{stage}.run").run
    key = fingerprint.of_stage(stage, raw)
    if "fingerprint" in run.__annotations__:
        arguments["fingerprint"] = key
    if "dependencies" in run.__annotations__:
        arguments["dependencies"] = fingerprint.dependencies(stage, raw.paths)
    rank = workers.rank()
    if rank is not None or os.environ.get("DVC_STAGE"):  # set by DVC for what it starts
        import_module("remint.process").end_with_parent()
    if stage == "train" and rank is None and arguments["train"].processes > 1:
        return workers.start(arguments["train"].processes, [stage, *rest])
    tracked = import_module("remint.tracking").stage_run(stage, key, raw) if not rank else nullcontext(silent)
    with tracked as log, memory.explained(stage, arguments):
        run(**arguments, log=log)
    return 0


def _plain(value: Any) -> Any:
    """Settings with paths as text, which YAML can show."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


def _threads(rest: Sequence[str]) -> int:
    """The declared number of threads, never the machine's: a mistake in it is told later, where all of them are."""
    from remint.core.config import load_yaml
    from remint.core.paths import PARAMS

    runtime = load_yaml(PARAMS).get("runtime")
    found = [str(runtime.get("threads"))] if isinstance(runtime, dict) else [""]
    found += [entry.partition("=")[2] for entry in rest if entry.startswith("runtime.threads=")]
    return int(found[-1]) if found[-1].isdecimal() and 0 < int(found[-1]) <= 512 else 1


def _usage() -> str:
    lines = ["usage: remint STAGE [key=value …] | remint COMMAND", "", "stages of the pipeline, in order:"]
    lines += [f"  {stage}" for stage in ("replicate_data", "stage_base", "train", "convert", "merge", "eval_chat")]
    lines += ["", "commands:", *(f"  {name:<16}{text}" for name, text in _COMMANDS.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
