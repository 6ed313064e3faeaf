"""A rebuild elsewhere is compared byte by byte, and every difference is reported."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from remint.__main__ import call
from remint.commands import reproduce
from remint.core.errors import RemintError
from tests.conftest import ROOT
from tests.workplace import wait_for

pytestmark = pytest.mark.slow

# Two stages of a second each stand for the pipeline; `{made}` is what the first one writes.
PIPELINE = """
stages:
  one:
    cmd: mkdir -p data/one && {made} > data/one/a.txt && echo b > data/one/b.txt
    deps: [source.txt]
    params: [seed]
    outs: [data/one]
  two:
    cmd: mkdir -p data/two && cat data/one/a.txt source.txt > data/two/metrics.json
    deps: [data/one]
    outs: [data/two/metrics.json]
"""
PARAMS = "model: toy\nseed: 1\n"


def run(place, *command):
    done = subprocess.run(command, cwd=place, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commit(place):
    run(place, "git", "add", "-A")
    run(place, "git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-q", "-m", "x")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Returns a function that makes a repository whose pipeline was run and committed."""
    for name in ("DVC_NO_ANALYTICS", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "1" if name.startswith("DVC") else "default")
    monkeypatch.setattr(reproduce.tempfile, "tempdir", str(tmp_path))

    def make(made="echo a"):
        place = tmp_path / "toy"
        (place / "conf/model").mkdir(parents=True)
        (place / "conf/model/toy.yaml").write_text("source: hub\nlocation: a/b\n")
        (place / "dvc.yaml").write_text(PIPELINE.format(made=made))
        (place / "params.yaml").write_text(PARAMS)
        (place / "source.txt").write_text("s\n")
        (place / ".gitignore").write_text("data\n.venv\n")
        run(place, "git", "init", "-q", "-b", "main")
        run(place, sys.executable, "-m", "dvc", "init", "-q")
        run(place, sys.executable, "-m", "dvc", "repro", "-q")
        commit(place)
        monkeypatch.chdir(place)
        return place

    return make


def left(tmp_path):
    return list(tmp_path.glob("remint-reproduce-*"))


def test_the_same_bytes_are_reported_and_nothing_is_left(toy, tmp_path, capsys):
    toy()
    assert call(["reproduce", "--times", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("identical") == 3
    assert "reproduced: every byte" in said
    assert "not committed" not in said
    assert "out of date" not in said
    assert not left(tmp_path)


def test_a_file_that_comes_out_otherwise_is_named_and_the_rebuilds_are_kept(toy, tmp_path, capsys):
    toy(made="date +%N")
    with pytest.raises(RemintError, match=r"not identical: data/one, data/two/metrics\.json, dvc\.lock"):
        call(["reproduce", "--times", "2"])
    said = capsys.readouterr().out
    assert "rebuild 1 against data/one here" in said
    assert "rebuild 2 against rebuild 1" in said
    assert "a.txt: content differs" in said
    assert "b.txt" not in said
    (kept,) = left(tmp_path)
    assert (kept / "rebuild-2/data/one/a.txt").is_file()


def test_a_changed_artefact_here_is_reported_though_the_rebuild_equals_the_lock(toy, capsys):
    place = toy()
    (place / "data/one/a.txt").write_text("other\n")
    (place / "data/one/more.txt").touch()
    with pytest.raises(RemintError, match="not identical: data/one;"):
        call(["reproduce"])
    said = capsys.readouterr().out
    assert "a.txt: content differs, 2 bytes" in said
    assert "more.txt: missing" in said


def test_what_is_no_part_of_the_commit_is_said_first(toy, capsys):
    place = toy()
    (place / "source.txt").write_text("t\n")
    commit(place)
    (place / "source.txt").write_text("u\n")
    (place / "new.txt").touch()
    with pytest.raises(RemintError, match=r"not identical: data/two/metrics\.json, dvc\.lock"):
        call(["reproduce"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "not committed, so not part of the rebuild: source.txt, new.txt"
    assert said[2] == "the committed dvc.lock is out of date: one has other source.txt"


def test_a_stage_that_fails_is_reported_with_the_end_of_its_output(toy):
    place = toy()
    (place / "dvc.yaml").write_text(PIPELINE.format(made="echo broken >&2; false"))
    commit(place)
    with pytest.raises(RemintError, match=r"rebuild 1 failed with status 255[\s\S]*broken"):
        call(["reproduce"])


def test_elsewhere_is_really_elsewhere(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    seen = "(umask; date +%Z; nproc; id -u; pwd; echo $LC_ALL $PYTHONHASHSEED $OMP_NUM_THREADS $HOME)"
    toy(made=seen)
    with pytest.raises(RemintError, match="not identical"):
        call(["reproduce", "--vary"])
    (kept,) = left(tmp_path)
    umask, zone, cores, user, folder, *others = (kept / "a folder with spaces/data/one/a.txt").read_text().splitlines()
    assert (umask, zone, cores) == ("0077", "+14", "1")
    assert user == (str(os.geteuid()) if "skipped: another user" in capsys.readouterr().out else "65534")
    assert folder == str(kept / "a folder with spaces")
    assert others == [f"C 97 1 {kept / 'home'}"]


@pytest.mark.parametrize(
    ("prepare", "arguments", "said"),
    [
        (lambda place: None, ["--times", "0"], "must be 1 or more, got 0"),
        (lambda place: run(place, "git", "rm", "-q", "--cached", "dvc.lock") or commit(place), [], "git show: "),
        (lambda place: run(place, "rm", "-rf", ".git"), [], "git rev-parse: .*not a git repository"),
    ],
)
def test_without_a_commit_to_rebuild_it_says_so(toy, prepare, arguments, said):
    place = toy()
    (place / ".gitignore").write_text("data\n.venv\ndvc.lock\n")
    prepare(place)
    with pytest.raises(RemintError, match=said):
        call(["reproduce", *arguments])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_rebuild_and_leaves_neither_a_process_nor_a_folder(toy, tmp_path, number):
    toy(made="(test ! -e .venv || sleep 300; echo a)")  # only a rebuild has an environment linked in
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "remint", "reproduce"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for(lambda: any(b"sleep" in arguments for arguments in commands_in(tmp_path)), process)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert "reproduce: stopped in rebuild 1; nothing was compared" in output
    assert left(tmp_path) == []
    assert commands_in(tmp_path) == []


def commands_in(tmp_path):
    """Command lines of the processes that work in a rebuild's folder."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if (process.info["cwd"] or "").startswith(str(tmp_path / "remint-reproduce-")):
            found.append([word.encode() for word in process.info["cmdline"]])
    return found
