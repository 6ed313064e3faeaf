"""What DVC does before and after a stage: nothing of the user's is deleted, and what is recorded is what ran."""

import json
import os
import shutil
import signal

import pytest
import yaml

from remint.core.paths import MADE_BY
from remint.runner import run_cache
from tests.toy import toy
from tests.workplace import STAGES, processes_in, wait_for

pytestmark = pytest.mark.slow
KINDS = list(MADE_BY.values())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The toy project after its first `dvc repro`, committed."""
    place = toy(tmp_path_factory.mktemp("toy") / "clone")
    assert place.repro() == STAGES
    place.run("git", "add", "-A")
    place.run("git", "commit", "-q", "-m", "built")
    place.run("dvc", "remote", "add", "-q", "-d", "team", str(place.root.parent / "remote"))
    place.run("dvc", "push", "-q", "--run-cache")
    place.run("git", "commit", "-q", "-a", "-m", "remote")
    return place


@pytest.fixture
def place(built):
    """The built project. After the test, everything is as it was."""
    yield built
    for path in [*(built.root / ".scratch").glob("hold-*"), *(built.root / ".scratch").glob("at-*")]:
        path.unlink()
    for path in [*built.root.glob("data/*"), built.root / "thesis"]:
        if path.name not in ("source", ".gitignore"):
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
    built.run("git", "checkout", "-q", "--", ".")
    built.run("dvc", "checkout", "-q")
    assert built.run("dvc", "status").strip() == "Data and pipelines are up to date."


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


@pytest.mark.parametrize("own", [instead_of_the_artefact, beside_the_artefact, as_a_file, as_a_link])
def test_no_command_deletes_what_no_stage_wrote(place, own):
    for kind in KINDS:
        own(place.root / "data" / kind)
    before = own_files(place.root)
    lock = (place.root / "dvc.lock").read_bytes()
    place.edit("seed: 42", "seed: 43")
    for command in COMMANDS:
        done = place.start(*command, stdout=-1, stderr=-2)
        said, _ = done.communicate()
        assert done.returncode, command
        assert "Traceback" not in said
        assert "data/" in said
        assert own_files(place.root) == before, (command, said)
    assert (place.root / "dvc.lock").read_bytes() == lock


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("own", [instead_of_the_artefact, beside_the_artefact])
def test_a_single_stage_is_refused_by_the_name_of_the_file(place, stage, own):
    target = place.root / "data" / MADE_BY[stage]
    own(target)
    before = own_files(place.root)
    for command in (
        ("dvc", "repro", "--force", "--single-item", stage),
        ("docker/run", "python", "-m", "remint", stage),
        ("remint", "check"),
    ):
        said = place.run(*command, status=255 if command[0] == "dvc" else 1)
        assert f"data/{MADE_BY[stage]}: holds what no stage wrote, and it would be lost: " in said
        assert "thesis.txt" in said
        assert own_files(place.root) == before


def test_what_appears_while_another_stage_runs_is_kept(place):
    place.edit("seed: 42", "seed: 43")
    (place.root / ".scratch/hold-inside").touch()
    process = place.start("dvc", "repro", stdout=-1, stderr=-2)
    wait_for((place.root / ".scratch/at-inside").exists, process)
    instead_of_the_artefact(place.root / "data/model")
    kept = {p.name: p.read_bytes() for p in (place.root / "data/model").iterdir()}
    (place.root / ".scratch/hold-inside").unlink()
    said, _ = process.communicate()
    (place.root / ".scratch/at-inside").unlink()
    assert process.returncode
    assert "data/model: holds what no stage wrote" in said
    assert {p.name: p.read_bytes() for p in (place.root / "data/model").iterdir()} == kept


def test_a_queued_experiment_deletes_nothing_and_is_applied_to_no_place_of_the_user(place):
    place.run("dvc", "exp", "run", "--temp", "-n", "other", "-S", "seed=44")
    for kind in KINDS:
        beside_the_artefact(place.root / "data" / kind)
    before = own_files(place.root)
    place.run("dvc", "exp", "run", "--queue", "-n", "queued", "-S", "seed=45")
    place.run("dvc", "queue", "start")
    wait_for(lambda: "Success" in place.run("dvc", "queue", "status"), pause=0.5)
    place.run("dvc", "queue", "stop")
    assert own_files(place.root) == before
    assert "holds what no stage wrote" in place.run("dvc", "exp", "apply", "other", status=255)
    assert own_files(place.root) == before


@pytest.mark.parametrize("where", ["thesis", "src", "conf/model", ".git", "data", "data/source", "data/model/sub"])
def test_a_place_is_no_setting(place, where):
    (place.root / "thesis").mkdir()
    (place.root / "thesis/chapter.txt").write_text("mine")
    before = own_files(place.root)
    params = (place.root / "params.yaml").read_text()
    (place.root / "params.yaml").write_text(f"paths:\n  model: {where}\n{params}")
    for command, status in (
        (("remint", "check"), 1),
        (("make", "repro"), 2),
        (("dvc", "repro", "-f", "-s", "merge"), 255),
    ):
        said = place.run(*command, status=status)
        assert "paths: the folders of the pipeline are fixed and no setting" in said
    assert own_files(place.root).items() >= {k: v for k, v in before.items() if "data/model/" not in k}.items()
    (place.root / "params.yaml").write_text(params)
    said = place.run("docker/run", "python", "-m", "remint", "merge", f"paths.model={where}", status=1)
    assert (
        "paths.model: must " in said
        or "must not share a folder with paths.model" in said
        or "must be a folder" in said
        or "holds what no stage wrote" in said
    )
    place.run("git", "diff", "--quiet", "--", "src", "conf", "data")


def test_an_output_in_another_place_is_refused_before_dvc_removes_it(place):
    (place.root / "thesis").mkdir()
    (place.root / "thesis/chapter.txt").write_text("mine")
    file = place.root / "dvc.yaml"
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
        said = place.run(*command, status=status)
        assert "thesis" in said
        assert (place.root / "thesis/chapter.txt").read_text() == "mine"


SETTINGS = {
    "replicate_data": ("seed: 42", "seed: 43"),
    "train": ("lr: 3.0e-3", "lr: 4.0e-3"),
    "convert": ("checkpoint: last", "checkpoint: best"),
    "merge": ("threads: 2", "threads: 1"),
    "eval_chat": ("batch: 40", "batch: 41"),
}
CONF = {"replicate_data": "conf/identity/aurel.yaml", "stage_base": "conf/model/smollm2-135m-instruct.yaml"}


def change_everything(place, stage):
    """Change one of each kind of thing that a stage declares. Returns the names of the changed files."""
    changed = []
    if stage in SETTINGS:
        place.edit(*SETTINGS[stage])
        changed.append("params.yaml")
    if stage in CONF:
        path = place.root / CONF[stage]
        path.write_text(path.read_text().replace("Aurel", "Other").replace("shard_mb: 1", "shard_mb: 2"))
        changed.append(CONF[stage])
    deps = yaml.safe_load((place.root / "dvc.yaml").read_text())["stages"][stage]["deps"]
    files = [f"src/remint/stages/{stage}/settings.py", "src/remint/core/log.py"]
    files += [dep for dep in deps if dep.endswith(".lock")]
    files += [f"{dep}/{'identity.json' if dep == 'data/source' else 'file'}" for dep in deps if dep.startswith("data/")]
    for name in files:
        with (place.root / name).open("a", encoding="utf-8") as file:
            file.write("\n# changed\n")
    (place.root / f"src/remint/stages/{stage}/more.py").write_text("# more\n")
    return [*changed, *files, f"src/remint/stages/{stage}/more.py"]


def undo(place, stage):
    (place.root / f"src/remint/stages/{stage}/more.py").unlink()
    place.run("git", "checkout", "-q", "--", "params.yaml", "conf", "src", "docker", "data")
    place.run("dvc", "checkout", "-q", "--force")
    for path in (place.root / "docker").glob("*.lock"):
        os.utime(path, (0, 0))  # make would set up the environment again for a newer one


def recorded(place):
    """All that DVC has recorded: dvc.lock and the entries of the run cache."""
    runs = place.root / ".dvc/cache/runs"
    return (place.root / "dvc.lock").read_bytes(), sorted(p.name for p in runs.rglob("*") if p.is_file())


@pytest.mark.parametrize("when", ["inside", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_changes_while_a_stage_runs_is_not_recorded(place, when, stage):
    """`inside`: the stage sees it when it ends. `after`: its artefact is in place, but DVC has not recorded it yet."""
    hold, at = place.root / f".scratch/hold-{when}", place.root / f".scratch/at-{when}"
    hold.touch()
    before = recorded(place)
    process = place.start("dvc", "repro", "--force", "--single-item", stage, stdout=-1, stderr=-2)
    wait_for(at.exists, process)
    names = change_everything(place, stage)
    hold.unlink()
    said, _ = process.communicate()
    at.unlink()
    assert process.returncode
    assert recorded(place) == before, said
    assert "Traceback" not in said
    if when == "after":  # DVC names a folder for the files in it
        names = [name for name in names if name.count("/") < 2]
    assert [name for name in names if name not in said] == []
    undo(place, stage)
    place.run("dvc", "repro", "--force", "--single-item", stage)
    assert recorded(place) == before


def test_the_same_command_finishes_once_the_change_is_undone(place):
    (place.root / ".scratch/hold-inside").touch()
    place.edit("seed: 42", "seed: 43")
    process = place.start("dvc", "repro", "train", stdout=-1, stderr=-2)
    wait_for((place.root / ".scratch/at-inside").exists, process)
    place.edit("seed: 43", "seed: 44")
    (place.root / ".scratch/hold-inside").unlink()
    said, _ = process.communicate()
    (place.root / ".scratch/at-inside").unlink()
    assert "params.yaml: seed was 43 and is 44, changed since the stage started" in said
    place.edit("seed: 44", "seed: 43")
    place.run("dvc", "repro", "train")
    assert (
        yaml.safe_load((place.root / "dvc.lock").read_text())["stages"]["train"]["params"]["params.yaml"]["seed"] == 43
    )


def test_a_result_made_by_hand_is_not_recorded_under_other_settings(place):
    before = recorded(place)
    place.run("docker/run", "python", "-m", "remint", "train", "train.lr=0.5")
    for command in (("dvc", "commit", "--force"), ("dvc", "exp", "save", "--force")):
        said = place.run(*command, status=255)
        assert "data/checkpoint: was made with train.lr 0.5, params.yaml has 0.003" in said
        assert recorded(place) == before


def test_a_run_cache_that_does_not_verify_is_not_shared(place):
    cache = place.root / ".dvc/cache"
    assert run_cache.verify(cache) >= len(STAGES)
    entry = next(path for path in cache.glob("runs/*/*/*") if "remint train" in path.read_text())
    text = entry.read_text()
    remote = sorted(path.name for path in (place.root.parent / "remote").rglob("*"))
    entry.write_text(text.replace("lr: 0.003", "lr: 0.5"))
    for command, status in ((("make", "share"), 2), (("dvc", "push", "--run-cache"), 255)):
        said = place.run(*command, status=status)
        assert (
            f"{entry}: the checkpoint that it names was made with train.lr 0.003, it has 0.5; remove that file" in said
        )
    assert sorted(path.name for path in (place.root.parent / "remote").rglob("*")) == remote
    entry.write_text(text)
    place.run("make", "share")


def test_a_damaged_object_of_the_cache_is_not_shared(place):
    cache = place.root / ".dvc/cache"
    entry = next(path for path in cache.glob("runs/*/*/*") if "remint convert" in path.read_text())
    md5 = next(out["md5"] for out in yaml.safe_load(entry.read_text())["outs"])
    rows = json.loads((cache / "files/md5" / md5[:2] / md5[2:]).read_text())
    damaged = next(row["md5"] for row in rows if row["relpath"] == "file")
    path = cache / "files/md5" / damaged[:2] / damaged[2:]
    kept = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    said = place.run("make", "share", status=2)
    assert "names data/adapter/file, whose cached content is damaged" in said
    path.write_bytes(kept)


def test_a_stage_that_is_not_ours_is_left_alone(place):
    file = place.root / "dvc.yaml"
    file.write_text(
        file.read_text().replace(
            "\nplots:",
            "  own:\n    cmd: mkdir thesis && date +%N > thesis/own.txt\n    outs:\n      - thesis\n\nplots:",
        )
    )
    place.run("dvc", "repro", "own")
    first = (place.root / "thesis/own.txt").read_text()
    place.run("dvc", "repro", "--force", "own")
    assert (place.root / "thesis/own.txt").read_text() != first


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_stage_that_is_ended_leaves_no_draft(place, number, status):
    (place.root / ".scratch/hold-inside").touch()
    process = place.start("docker/run", "python", "-m", "remint", "merge", stdout=-1, stderr=-2)
    wait_for((place.root / ".scratch/at-inside").exists, process)
    assert (place.root / "data/.model.draft").exists()
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in said
    assert not [path for path in (place.root / "data").glob(".*") if path.name != ".gitignore"]


def test_a_dvc_that_is_killed_takes_its_stage_along(place):
    (place.root / ".scratch/hold-inside").touch()
    process = place.start("dvc", "repro", "-f", "-s", "merge", stdout=-1, stderr=-2)
    wait_for((place.root / ".scratch/at-inside").exists, process)
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_in(place.root), seconds=20)
    assert not [path for path in (place.root / "data").glob(".*") if path.name != ".gitignore"]
