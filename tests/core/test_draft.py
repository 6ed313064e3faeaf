"""An artefact is complete or absent, and what no stage wrote is not replaced."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from remint.core import draft, manifest
from remint.core.draft import artefact
from remint.core.errors import ArtefactError
from tests.core.test_manifest import make


def test_a_failure_leaves_the_old_one(tmp_path):
    make(tmp_path / "x", "old")
    with pytest.raises(RuntimeError), artefact(tmp_path / "x", "thing") as (draft, _):
        (draft / "a.txt").write_text("new")
        raise RuntimeError
    assert (tmp_path / "x/a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_reported(tmp_path):
    with pytest.raises(ArtefactError, match="disk is full"), artefact(tmp_path / "x", "thing"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_it_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        make(tmp_path / "x")
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes.pop("x") == modes.pop("x/sub") == 0o755
    assert set(modes.values()) == {0o644}


def own_folder(x):
    x.mkdir()
    (x / "thesis.txt").write_text("mine")


def beside_an_artefact(x):
    make(x)
    (x / "sub/thesis.txt").write_text("mine")


def another_kind(x):
    with artefact(x, "else") as (draft, _):
        (draft / "a.txt").write_text("other")


def a_forged_list(x):
    make(x)
    (x / "manifest.json").write_text("not JSON")


def a_link(x):
    own_folder(x.with_name("mine"))
    x.symlink_to("mine")


def a_link_to_nothing(x):
    x.symlink_to("nothing")


def a_link_inside(x):
    make(x)
    own_folder(x.with_name("mine"))
    (x / "link").symlink_to("../mine")


def own_draft(x):
    own_folder(x.with_name(".x.draft"))


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (own_folder, "x: holds what no stage wrote, and it would be lost: thesis.txt;"),
        (beside_an_artefact, "lost: sub/thesis.txt;"),
        (another_kind, "lost: a.txt, manifest.json;"),
        (a_forged_list, "lost: a.txt, manifest.json, sub/manifest.json;"),
        (lambda x: x.write_text("mine"), "x: must be a folder or absent, got a file;"),
        (a_link, "got a symbolic link"),
        (a_link_to_nothing, "got a symbolic link"),
        (a_link_inside, "lost: link;"),
        (own_draft, ".x.draft: must be absent, got what no stage wrote"),
        (lambda x: x.with_name(".x.draft").write_text("mine"), ".x.draft: must be absent"),
    ],
)
def test_what_no_stage_wrote_is_not_replaced(tmp_path, place, named):
    place(tmp_path / "x")
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    with pytest.raises(ArtefactError, match=named):
        make(tmp_path / "x", "new")
    assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before


def test_what_appears_while_it_is_made_is_not_replaced(tmp_path):
    with pytest.raises(ArtefactError, match=r"lost: thesis\.txt"), artefact(tmp_path / "x", "thing"):
        own_folder(tmp_path / "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "thesis.txt"]


def test_a_damaged_artefact_is_made_again(tmp_path):
    make(tmp_path / "x")
    (tmp_path / "x/a.txt").write_text("damaged")
    make(tmp_path / "x", "new")
    assert manifest.verify(tmp_path / "x", "thing")


def test_two_at_once_do_not_mix(tmp_path):
    with artefact(tmp_path / "x", "thing") as (draft, _):
        (draft / "a.txt").write_text("first")
        with pytest.raises(ArtefactError, match="another process is making"):
            make(tmp_path / "x", "second")
    assert (tmp_path / "x/a.txt").read_text() == "first"


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / ".x.draft/new").mkdir(parents=True)
    (tmp_path / ".x.draft/new/half").write_text("")
    (tmp_path / ".x.draft/lock").touch()
    make(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    manifest.verify(tmp_path / "x", "thing")


def test_an_exchange_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    make(tmp_path / "x", "old")
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtefactError, match="disk is full"):
        make(tmp_path / "x", "new")
    assert (tmp_path / "x/a.txt").read_text() == "old"


def test_a_signal_while_the_old_one_is_removed_leaves_no_doubt_whose_it_is(tmp_path, monkeypatch):
    make(tmp_path / "x", "old")

    def interrupted(folder, ignore_errors):
        if Path(folder).exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "x", "new")
    assert (tmp_path / "x/a.txt").read_text() == "new"
    assert draft.hidden(tmp_path / "x").exists()
    make(tmp_path / "x", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_that_appears_at_the_last_moment_is_not_lost(tmp_path, monkeypatch):
    make(tmp_path / "x", "old")
    checked = draft.check_place
    calls = []

    def late(place, kind):
        checked(place, kind)
        calls.append(place)
        if len(calls) == 2:  # after the last check
            (place / "thesis.txt").write_text("mine")

    monkeypatch.setattr(draft, "check_place", late)
    with pytest.raises(ArtefactError, match=r"x: thesis\.txt appeared meanwhile"):
        make(tmp_path / "x", "new")
    assert (tmp_path / "x/thesis.txt").read_text() == "mine"
    assert (tmp_path / "x/a.txt").read_text() == "old"


def test_a_folder_that_cannot_be_read_may_hold_anything(tmp_path, monkeypatch):
    make(tmp_path / "x", "old")
    scan = os.scandir

    def refusing(place):  # root may read everything, so permissions would prove nothing here
        if Path(place).name == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ArtefactError, match=r"x/sub: cannot be read \(Permission denied\), so it may hold what"):
        draft.check_place(tmp_path / "x", "thing")
