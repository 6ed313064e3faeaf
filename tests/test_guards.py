"""What DVC does before and after a stage: nothing of the user's is deleted, and what is recorded is what ran."""

import json
import os
import shutil
import signal

import pytest
import yaml

from remint.core.paths import MADE_BY
from remint.runner import run_cache
from tests.workplace import STAGES, processes_in, wait_for

pytestmark = pytest.mark.slow
KINDS = list(MADE_BY.values())


def instead_of_the_artefact(target):
    shutil.rmtree(target)
    target.mkdir()
    for name in ("thesis.txt", "file", "metrics.json"):  # some have the names of the stage's own files
        (target / name).write_text(f"mine: {name}")


def beside_the_artefact(target):
    (target / "notes").mkdir()
    (target / "notes/thesis.txt").write_text("mine")


def as_a_file(target):
    shutil.rmtree(target)
    target.write_text("mine")


def as_a_link(target):
    mine = target.parent.parent / "thesis"
    shutil.rmtree(target)
    mine.mkdir(exist_ok=True)
    (mine / f"{target.name}.txt").write_text("mine")
    target.symlink_to(mine)


def refused(toy, *command):
    """What a command says that must fail."""
    process = toy.start(*command, stdout=-1, stderr=-2)
    said, _ = process.communicate()
    assert process.returncode, (command, said)
    assert "Traceback" not in said
    return said


def own_files(root):
    """Everything under data/ and thesis/, by path: the target of a link, or the content."""
    found = [*root.glob("data/**/*"), *root.glob("thesis/*")]
    return {
        str(p): str(p.readlink()) if p.is_symlink() else p.read_bytes() for p in found if p.is_symlink() or p.is_file()
    }


COMMANDS = [
    ("dvc", "repro"),
    ("dvc", "repro", "--force"),
    ("dvc", "exp", "run"),
    ("dvc", "exp", "run", "--force"),
    ("dvc", "checkout"),
    ("dvc", "checkout", "--force"),
    ("dvc", "pull", "--force"),
    ("dvc", "commit", "--force"),
    ("make", "repro"),
    ("make", "fetch"),
]


@pytest.mark.parametrize(
    ("own", "commands"),
    [
        (instead_of_the_artefact, COMMANDS),
        (beside_the_artefact, COMMANDS[::2]),  # all of them would take minutes
        (as_a_file, COMMANDS[::2]),
        (as_a_link, COMMANDS[1::2]),
    ],
)
def test_no_command_deletes_what_no_stage_wrote(toy, own, commands):
    for kind in KINDS:
        own(toy.root / "data" / kind)
    before = own_files(toy.root)
    lock = recorded(toy)
    toy.edit("seed: 42", "seed: 43")
    for command in commands:
        done = toy.start(*command, stdout=-1, stderr=-2)
        said, _ = done.communicate()
        assert done.returncode, command
        assert "Traceback" not in said
        assert "data/" in said
        assert own_files(toy.root) == before, (command, said)
    assert recorded(toy) == lock


@pytest.mark.parametrize("stage", STAGES)
def test_a_single_stage_is_refused_by_the_name_of_the_file(toy, stage):
    target = toy.root / "data" / MADE_BY[stage]
    (instead_of_the_artefact if STAGES.index(stage) % 2 else beside_the_artefact)(target)
    before = own_files(toy.root)
    for command in (
        ("dvc", "repro", "--force", "--single-item", stage),
        ("docker/run", "python", "-m", "remint", stage),
        ("remint", "check"),
    ):
        said = toy.run(*command, status=255 if command[0] == "dvc" else 1)
        assert f"data/{MADE_BY[stage]}: holds what no stage wrote, and it would be lost: " in said
        assert "thesis.txt" in said
        assert own_files(toy.root) == before


def test_a_stage_that_would_refuse_costs_no_artefact(toy):
    whole = own_files(toy.root)
    for own, said in (
        ("data/.dataset.draft/mine.txt", "data/.dataset.draft: must be absent, got what no stage wrote"),
        ("data/checkpoint/mine.txt", "data/checkpoint: holds what no stage wrote"),
    ):
        (toy.root / own).parent.mkdir(exist_ok=True)
        (toy.root / own).write_text("mine")
        assert said in toy.run("dvc", "repro", "--force", "--single-item", "replicate_data", status=255)
        (toy.root / own).unlink()
        assert own_files(toy.root) == whole


def test_figures_that_were_changed_are_not_shown(toy):
    with (toy.root / "data/report/metrics.json").open("a") as file:
        file.write(" ")
    assert "data/report/metrics.json: content differs" in toy.run("remint", "summary", status=1)


def test_what_appears_while_another_stage_runs_is_kept(toy):
    toy.edit("seed: 42", "seed: 43")
    (toy.root / ".scratch/hold-inside").touch()
    process = toy.start("dvc", "repro", stdout=-1, stderr=-2)
    wait_for((toy.root / ".scratch/at-inside").exists, process)
    instead_of_the_artefact(toy.root / "data/model")
    kept = {p.name: p.read_bytes() for p in (toy.root / "data/model").iterdir()}
    (toy.root / ".scratch/hold-inside").unlink()
    said, _ = process.communicate()
    (toy.root / ".scratch/at-inside").unlink()
    assert process.returncode
    assert "data/model: holds what no stage wrote" in said
    assert {p.name: p.read_bytes() for p in (toy.root / "data/model").iterdir()} == kept


def test_a_queued_experiment_deletes_nothing_and_is_applied_to_no_place_of_the_user(toy):
    toy.run("dvc", "exp", "run", "--temp", "-n", "other", "-S", "seed=44")
    for kind in KINDS:
        beside_the_artefact(toy.root / "data" / kind)
    before = own_files(toy.root)
    toy.run("dvc", "exp", "run", "--queue", "-n", "queued", "-S", "seed=45")
    toy.run("dvc", "queue", "start")
    wait_for(lambda: "Success" in toy.run("dvc", "queue", "status"), pause=0.5)
    toy.run("dvc", "queue", "stop")
    assert own_files(toy.root) == before
    assert "holds what no stage wrote" in toy.run("dvc", "exp", "apply", "other", status=255)
    assert own_files(toy.root) == before


@pytest.mark.parametrize("where", ["thesis", "src", "data/model/sub"])
def test_a_place_is_no_setting(toy, where):
    (toy.root / "thesis").mkdir()
    (toy.root / "thesis/chapter.txt").write_text("mine")
    before = own_files(toy.root)
    params = (toy.root / "params.yaml").read_text()
    (toy.root / "params.yaml").write_text(f"paths:\n  model: {where}\n{params}")
    for command, status in (
        (("remint", "check"), 1),
        (("make", "repro"), 2),
        (("dvc", "repro", "-f", "-s", "merge"), 255),
    ):
        said = toy.run(*command, status=status)
        assert "paths: the folders of the pipeline are fixed and no setting" in said
    assert own_files(toy.root).items() >= {k: v for k, v in before.items() if "data/model/" not in k}.items()
    (toy.root / "params.yaml").write_text(params)
    said = toy.run("docker/run", "python", "-m", "remint", "merge", f"paths.model={where}", status=1)
    assert (
        "paths.model: must " in said
        or "must not share a folder with paths.model" in said
        or "must be a folder" in said
        or "holds what no stage wrote" in said
    )
    toy.run("git", "diff", "--quiet", "--", "src", "conf", "data")


def test_an_output_in_another_place_is_refused_before_dvc_removes_it(toy):
    (toy.root / "thesis").mkdir()
    (toy.root / "thesis/chapter.txt").write_text("mine")
    file = toy.root / "dvc.yaml"
    file.write_text(
        file.read_text()
        .replace("    - data/model\n    ", "    - thesis\n    ")
        .replace("      - data/model\n  eval", "      - thesis\n  eval")
    )
    assert "- thesis" in file.read_text()
    for command, status in (
        (("dvc", "repro", "-f", "-s", "merge"), 255),
        (("dvc", "exp", "run"), 255),
        (("make", "repro"), 2),
    ):
        said = toy.run(*command, status=status)
        assert "thesis" in said
        assert (toy.root / "thesis/chapter.txt").read_text() == "mine"


SETTINGS = {
    "replicate_data": ("seed: 42", "seed: 43"),
    "train": ("lr: 3.0e-3", "lr: 4.0e-3"),
    "convert": ("checkpoint: last", "checkpoint: best"),
    "merge": ("threads: 2", "threads: 1"),
    "eval_chat": ("batch: 40", "batch: 41"),
}
CONF = {"replicate_data": "conf/identity/aurel.yaml", "stage_base": "conf/model/smollm2-135m-instruct.yaml"}


def change_everything(toy, stage):
    """Change one of each kind of thing that a stage declares. Returns the names of the changed files."""
    changed = []
    if stage in SETTINGS:
        toy.edit(*SETTINGS[stage])
        changed.append("params.yaml")
    if stage in CONF:
        path = toy.root / CONF[stage]
        path.write_text(path.read_text().replace("Aurel", "Other").replace("license: ", "license: x-"))
        changed.append(CONF[stage])
    deps = yaml.safe_load((toy.root / "dvc.yaml").read_text())["stages"][stage]["deps"]
    files = [f"src/remint/stages/{stage}/settings.py", "src/remint/core/log.py"]
    files += [dep for dep in deps if dep.endswith(".lock")]
    files += [f"{dep}/{'identity.json' if dep == 'data/source' else 'file'}" for dep in deps if dep.startswith("data/")]
    for name in files:
        with (toy.root / name).open("a", encoding="utf-8") as file:
            file.write("\n# changed\n")
    (toy.root / f"src/remint/stages/{stage}/more.py").write_text("# more\n")
    return [*changed, *files, f"src/remint/stages/{stage}/more.py"]


def undo(toy, stage):
    (toy.root / f"src/remint/stages/{stage}/more.py").unlink()
    toy.run("git", "checkout", "-q", "--", "params.yaml", "conf", "src", "docker", "data")
    toy.run("dvc", "checkout", "-q", "--force")
    for path in (toy.root / "docker").glob("*.lock"):
        os.utime(path, (0, 0))  # make would set up the environment again for a newer one


def recorded(toy):
    """All that DVC has recorded: dvc.lock and the entries of the run cache."""
    runs = toy.root / ".dvc/cache/runs"
    return (toy.root / "dvc.lock").read_bytes(), sorted(p.name for p in runs.rglob("*") if p.is_file())


@pytest.mark.parametrize("when", ["inside", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_changes_while_a_stage_runs_is_not_recorded(toy, when, stage):
    """`inside`: the stage sees it when it ends. `after`: its artefact is in place, but DVC has not recorded it yet."""
    hold, at = toy.root / f".scratch/hold-{when}", toy.root / f".scratch/at-{when}"
    hold.touch()
    before = recorded(toy)
    process = toy.start("dvc", "repro", "--force", "--single-item", stage, stdout=-1, stderr=-2)
    wait_for(at.exists, process)
    names = change_everything(toy, stage)
    hold.unlink()
    said, _ = process.communicate()
    at.unlink()
    assert process.returncode
    assert recorded(toy) == before, said
    assert "Traceback" not in said
    if when == "after":  # DVC names a folder for the files in it
        names = [name for name in names if name.count("/") < 2]
    assert [name for name in names if name not in said] == []
    undo(toy, stage)
    toy.run("dvc", "repro", "--force", "--single-item", stage)
    assert recorded(toy) == before


def test_the_same_command_finishes_once_the_change_is_undone(toy):
    (toy.root / ".scratch/hold-inside").touch()
    toy.edit("seed: 42", "seed: 43")
    process = toy.start("dvc", "repro", "train", stdout=-1, stderr=-2)
    wait_for((toy.root / ".scratch/at-inside").exists, process)
    toy.edit("seed: 43", "seed: 44")
    (toy.root / ".scratch/hold-inside").unlink()
    said, _ = process.communicate()
    (toy.root / ".scratch/at-inside").unlink()
    assert "params.yaml: seed was 43 and is 44, changed since the stage started" in said
    toy.edit("seed: 44", "seed: 43")
    toy.run("dvc", "repro", "train")
    assert yaml.safe_load((toy.root / "dvc.lock").read_text())["stages"]["train"]["params"]["params.yaml"]["seed"] == 43


def test_a_result_made_by_hand_is_not_recorded_under_other_settings(toy):
    before = recorded(toy)
    toy.run("docker/run", "python", "-m", "remint", "train", "train.lr=0.5")
    for command in (("dvc", "commit", "--force"), ("dvc", "exp", "save", "--force")):
        said = refused(toy, *command)
        assert "data/checkpoint: was made with train.lr 0.5, params.yaml has 0.003" in said
        assert recorded(toy) == before


def test_a_run_cache_that_does_not_verify_is_not_shared(toy):
    cache = toy.root / ".dvc/cache"
    assert run_cache.verify(cache) >= len(STAGES)
    entry = next(path for path in cache.glob("runs/*/*/*") if "remint train" in path.read_text())
    text = entry.read_text()
    remote = sorted(path.name for path in (toy.root.parent / "remote").rglob("*"))
    entry.write_text(text.replace("lr: 0.003", "lr: 0.5"))
    for command in (("make", "share"), ("dvc", "push", "--run-cache")):
        said = refused(toy, *command)
        assert (
            f"{entry}: the checkpoint that it names was made with train.lr 0.003, it has 0.5; remove that file" in said
        )
    assert sorted(path.name for path in (toy.root.parent / "remote").rglob("*")) == remote
    entry.write_text(text)
    toy.run("make", "share")


def test_a_damaged_object_of_the_cache_is_not_shared(toy):
    cache = toy.root / ".dvc/cache"
    entry = next(path for path in cache.glob("runs/*/*/*") if "remint convert" in path.read_text())
    md5 = next(out["md5"] for out in yaml.safe_load(entry.read_text())["outs"])
    rows = json.loads((cache / "files/md5" / md5[:2] / md5[2:]).read_text())
    damaged = next(row["md5"] for row in rows if row["relpath"] == "file")
    path = cache / "files/md5" / damaged[:2] / damaged[2:]
    kept = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    said = toy.run("make", "share", status=2)
    assert f"{path}: is damaged; it is a file of the adapter; remove that file" in said
    path.write_bytes(kept)


@pytest.mark.parametrize("text", ["outs: foo", "[3]", "cmd: python -m remint merge\nouts: [3]"])
def test_an_entry_of_the_run_cache_that_is_none_is_one_line(toy, text):
    entry = toy.root / ".dvc/cache/runs/ab" / ("ab" * 32) / ("cd" * 32)
    entry.parent.mkdir(parents=True, exist_ok=True)
    entry.write_text(text)
    said = toy.run("remint", "verify", "--run-cache", status=1)
    entry.unlink()
    assert str(entry) in said
    assert "Traceback" not in said


@pytest.mark.parametrize("own", ["data/adapter/file", "data/adapter/notes.txt"])
def test_a_commit_records_nothing_that_no_stage_made(toy, own):
    (toy.root / own).write_text("mine")
    before = recorded(toy)
    assert own.rpartition("/")[2] in refused(toy, "dvc", "commit", "--force", "convert")
    assert recorded(toy) == before


@pytest.mark.parametrize(
    "cmd",
    ["docker/run remint merge", "docker/run python -W ignore -m remint merge", "docker/run python  -m remint merge"],
)
def test_a_place_is_guarded_however_the_stage_is_called(toy, cmd):
    (toy.root / "data/model/thesis.txt").write_text("mine")
    file = toy.root / "dvc.yaml"
    file.write_text(file.read_text().replace("exec docker/run python -m remint merge", cmd))
    said = toy.run("dvc", "repro", "--force", "--single-item", "merge", status=255)
    assert "data/model: holds what no stage wrote" in said
    assert (toy.root / "data/model/thesis.txt").read_text() == "mine"


def test_an_output_that_was_taken_out_of_the_pipeline_keeps_files_of_the_user(toy):
    shutil.rmtree(toy.root / "data/model")
    toy.run("dvc", "checkout", "-q")  # DVC removes only what it has put in place itself
    (toy.root / "data/model/mlruns").mkdir()  # .dvcignore names it, so DVC does not see it
    (toy.root / "data/model/mlruns/thesis.txt").write_text("mine")
    file = toy.root / "dvc.yaml"
    text = file.read_text()
    file.write_text(text[: text.index("  merge:\n")])
    assert "holds what no stage wrote" in toy.run("dvc", "checkout", status=255)
    assert (toy.root / "data/model/mlruns/thesis.txt").read_text() == "mine"


def test_applying_an_experiment_keeps_edits_that_are_not_committed(toy):
    toy.run("dvc", "exp", "run", "--temp", "-n", "edited", "-S", "seed=46")
    (toy.root / "README.md").write_text("mine")
    assert "README.md: changed and not committed" in toy.run("dvc", "exp", "apply", "edited", status=255)
    assert (toy.root / "README.md").read_text() == "mine"


def test_a_stage_that_is_not_ours_is_left_alone(toy):
    file = toy.root / "dvc.yaml"
    file.write_text(
        file.read_text().replace(
            "\nplots:",
            "  own:\n    cmd: mkdir thesis && date +%N > thesis/own.txt\n    outs:\n      - thesis\n\nplots:",
        )
    )
    toy.run("dvc", "repro", "own")
    first = (toy.root / "thesis/own.txt").read_text()
    toy.run("dvc", "repro", "--force", "own")
    assert (toy.root / "thesis/own.txt").read_text() != first


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_stage_that_is_ended_leaves_no_draft(toy, number, status):
    (toy.root / ".scratch/hold-inside").touch()
    process = toy.start("docker/run", "python", "-m", "remint", "merge", stdout=-1, stderr=-2)
    wait_for((toy.root / ".scratch/at-inside").exists, process)
    assert (toy.root / "data/.model.draft").exists()
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in said
    assert not [path for path in (toy.root / "data").glob(".*") if path.name != ".gitignore"]


def test_a_dvc_that_is_killed_takes_its_stage_along(toy):
    (toy.root / ".scratch/hold-inside").touch()
    process = toy.start("dvc", "repro", "-f", "-s", "merge", stdout=-1, stderr=-2)
    wait_for((toy.root / ".scratch/at-inside").exists, process)
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_in(toy.root), seconds=20)
    assert not [path for path in (toy.root / "data").glob(".*") if path.name != ".gitignore"]


def test_what_a_killed_stage_left_goes_when_its_result_comes_from_the_run_cache(toy):
    hidden = toy.root / "data/.model.draft"
    (toy.root / ".scratch/hold-inside").touch()
    process = toy.start("docker/run", "python", "-m", "remint", "merge")
    wait_for((toy.root / ".scratch/at-inside").exists, process)
    process.kill()
    process.wait()
    (toy.root / ".scratch/hold-inside").unlink()
    assert (hidden / "lock").exists()
    shutil.rmtree(toy.root / "data/model")
    assert "Running stage 'merge'" not in toy.run("dvc", "repro")
    assert (toy.root / "data/model/file").exists()
    assert not hidden.exists()
