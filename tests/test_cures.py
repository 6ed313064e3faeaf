"""The advice in a refusal works: each command that a message names in backticks is run, and the refusal is gone."""

import re
import shlex
import shutil
import signal
import subprocess

import pytest

from tests.workplace import wait_for

pytestmark = pytest.mark.slow


def write(toy, name, text):
    (toy.root / name).parent.mkdir(parents=True, exist_ok=True)
    (toy.root / name).write_text(text, encoding="utf-8")


def append(toy, name, text="\n# changed\n"):
    with (toy.root / name).open("a", encoding="utf-8") as file:
        file.write(text)


def damage(toy):
    append(toy, "data/model/file")


def without_manifest(toy):
    (toy.root / "data/model/manifest.json").unlink()
    for path in (toy.root / "data/model").iterdir():
        move_away(toy, str(path.relative_to(toy.root)))


def move_away(toy, name):
    (toy.root / name).rename(toy.root.parent / f"kept-{name.replace('/', '-')}")


def own_recipe(toy):
    toy.edit("seed: 42", "seed: 43")


def wrong_cache(toy):
    entry = next(p for p in (toy.root / ".dvc/cache").glob("runs/*/*/*") if "remint train" in p.read_text())
    entry.write_text(entry.read_text().replace("lr: 0.003", "lr: 0.5"))


def remove_named_file(toy, said):
    """Remove the file at the start of the message."""
    (toy.root / said.split(": ")[1]).unlink()


VERIFY, CHECK, MERGE = ("remint", "verify"), ("remint", "check"), ("docker/run", "python", "-m", "remint", "merge")

# What causes the refusal, the command that is refused, what it says, and what the user does besides the named commands.
CASES = {
    "a damaged artefact": (damage, VERIFY, "data/model/file: content differs", None),
    "an artefact without its manifest": (without_manifest, VERIFY, "data/model: has no manifest.json", None),
    "a file of another in an artefact": (
        lambda toy: write(toy, "data/model/thesis.txt", "mine"),
        VERIFY,
        "data/model/thesis.txt: is not part of the artefact",
        lambda toy, _: move_away(toy, "data/model/thesis.txt"),
    ),
    "a file of another where a stage writes": (
        lambda toy: write(toy, "data/model/thesis.txt", "mine"),
        MERGE,
        "data/model: holds what no stage wrote, and it would be lost: thesis.txt; move it away",
        lambda toy, _: move_away(toy, "data/model/thesis.txt"),
    ),
    "a draft of another": (
        lambda toy: write(toy, "data/.model.draft/thesis.txt", "mine"),
        MERGE,
        "data/.model.draft: must be absent, got what no stage wrote; move it away",
        lambda toy, _: move_away(toy, "data/.model.draft"),
    ),
    "another setting than the artefact's": (
        lambda toy: toy.edit("dtype: base", "dtype: float32"),
        VERIFY,
        "data/model: was made with merge.dtype 'base', params.yaml has 'float32'",
        lambda toy, _: toy.run("dvc", "repro"),
    ),
    "dvc.lock of another run": (
        lambda toy: write(toy, "dvc.lock", (toy.root / "dvc.lock").read_text().replace("lr: 0.003", "lr: 0.5")),
        VERIFY,
        "data/checkpoint: was made with train.lr 0.003, dvc.lock has 0.5",
        None,
    ),
    "an unknown section": (
        lambda toy: append(toy, "params.yaml", "\ntrian: {lr: 1}\n"),
        CHECK,
        "params.yaml: trian: no such section; write train or remove it",
        lambda toy, _: write(toy, "params.yaml", (toy.root / "params.yaml").read_text().split("\ntrian")[0]),
    ),
    "a section paths": (
        lambda toy: append(toy, "params.yaml", "\npaths: {model: thesis}\n"),
        CHECK,
        "the folders of the pipeline are fixed and no setting",
        lambda toy, _: write(toy, "params.yaml", (toy.root / "params.yaml").read_text().split("\npaths")[0]),
    ),
    "an unknown setting": (
        lambda toy: toy.edit("  lr: 3.0e-3", "  lrr: 3.0e-3"),
        CHECK,
        "train.lrr: no such setting; write lr or remove it",
        lambda toy, _: toy.edit("  lrr: 3.0e-3", "  lr: 3.0e-3"),
    ),
    "a value out of range": (
        lambda toy: toy.edit("  lr: 3.0e-3", "  lr: 30.0"),
        CHECK,
        "train.lr: must be above 0 and at most 1, got 30.0; change it in params.yaml",
        lambda toy, _: toy.edit("  lr: 30.0", "  lr: 3.0e-3"),
    ),
    "a params.yaml that is a list": (
        lambda toy: write(toy, "params.yaml", "[1]\n"),
        CHECK,
        "params.yaml: must be a mapping of sections",
        None,
    ),
    "no section train": (
        lambda toy: toy.edit("\ntrain:\n", "\nother:\n"),
        CHECK,
        "section 'train' is missing; copy it from conf/params.yaml",
        lambda toy, _: shutil.copyfile(toy.root / "conf/params.yaml", toy.root / "params.yaml"),
    ),
    "a dvc.yaml without stages": (
        lambda toy: write(toy, "dvc.yaml", "stages: []\n"),
        CHECK,
        "dvc.yaml: stages: must be a mapping",
        None,
    ),
    "another output in dvc.yaml": (
        lambda toy: write(
            toy,
            "dvc.yaml",
            (toy.root / "dvc.yaml")
            .read_text()
            .replace("    outs:\n      - data/model\n", "    outs:\n      - thesis\n"),
        ),
        CHECK,
        "stages.merge.outs: must be data/model or in it, got 'thesis'",
        None,
    ),
    "no git repository": (
        lambda toy: (toy.root / ".git").rename(toy.root.parent / "kept-git"),
        CHECK,
        "is not a git repository, which DVC needs",
        None,
    ),
    "a recipe over changes of one's own": (
        own_recipe,
        ("make", "recipe", "NAME=smoke"),
        "holds your own changes",
        "FORCE=1",
    ),
    "an unknown recipe": (
        lambda toy: None,
        ("make", "recipe", "NAME=smok"),
        "no such recipe, got 'smok'; choose from ",
        "NAME=smoke",
    ),
    "a wrong entry of the run cache": (
        wrong_cache,
        ("make", "share"),
        "it has 0.5; remove that file",
        remove_named_file,
    ),
}


def commands_in(said):
    """The commands in backticks of the error lines of a message."""
    lines = [line for line in said.splitlines() if line.startswith(("error: ", "data/", "ERROR: "))]
    return [found for line in lines for found in re.findall(r"`([^`…]+)`", line)]


@pytest.mark.parametrize("case", CASES)
def test_what_a_refusal_advises_ends_it(toy, case):
    cause, command, text, action = CASES[case]
    cause(toy)
    done = subprocess.run(
        command, cwd=toy.root, env=toy.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = done.stdout
    assert done.returncode, said
    assert text in said
    assert "Traceback" not in said
    if isinstance(action, str):
        command = (*[word for word in command if word.split("=")[0] != action.split("=")[0]], action)
    elif action:
        action(toy, said)
    else:
        advised = commands_in(said)
        assert advised, said
        for line in dict.fromkeys(advised):
            # A toy has no figures for the summary at the end of `make repro`.
            toy.run(*shlex.split("dvc repro" if line == "make repro" else line))
    toy.run(*command)
    if (kept := toy.root.parent / "kept-git").exists():
        shutil.rmtree(toy.root / ".git")
        kept.rename(toy.root / ".git")
    toy.run("git", "checkout", "-q", "--", ".")


def test_a_limit_is_raised_by_the_command_that_is_named(toy):
    line = "ulimit -Sf 0 && {} docker/run python -m remint merge"
    found = toy.run("bash", "-c", line.format(""), status=1)
    assert "larger than this process may write, 0 bytes (ulimit -f), so nothing was replaced" in found
    (advised,) = {command for command in commands_in(found) if command.startswith("ulimit")}
    toy.run("bash", "-c", line.format(f"{advised} &&"))


def test_another_process_that_makes_the_artefact_is_waited_for(toy):
    (toy.root / ".scratch/hold-inside").touch()
    process = toy.start(*MERGE)
    wait_for((toy.root / ".scratch/at-inside").exists, process)
    said = toy.run(*MERGE, status=1)
    assert "another process is making data/model; wait for it or end it" in said
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    (toy.root / ".scratch/hold-inside").unlink()
    toy.run(*MERGE)
