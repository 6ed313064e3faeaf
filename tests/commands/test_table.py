"""The table of commands and the files agree, and help comes without torch."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from remint.__main__ import call
from remint.commands import COMMANDS
from remint.core.errors import RemintError

FOLDER = Path(import_module("remint.commands").__file__).parent


def test_every_file_is_a_command_of_the_table():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "stage"}
    assert files == {name.replace("-", "_") for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, in_root, capsys):
    assert call([name, "--help"]) == 0
    assert f"Usage: remint {name}" in capsys.readouterr().out


def test_no_command_imports_torch_before_its_arguments_are_read(in_root):
    code = (
        "import sys\nfrom remint.__main__ import _app, _stages\n_app(None)\n"
        "print(sorted({'torch', 'transformers', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--temperature", "hot"], "remint chat: Invalid value for '--temperature'"),
        (["export", "gptq"], "is not one of 'internlm2'"),
        (["sign"], "remint sign: Missing argument 'key'"),
        (["train", "--learning-rate"], "remint train: No such option: --learning-rate"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_the_help(arguments, message, in_root):
    with pytest.raises(RemintError) as caught:
        call(arguments)
    assert message in str(caught.value)
    assert str(caught.value).endswith(f"`remint {arguments[0]} --help` lists its arguments")
    assert len(caught.value.faults) == 1
