"""An artefact is whole or absent, and any change to it is told."""

import errno
import os

import pytest

from remint import manifest
from remint.core.errors import ArtefactError


def make(target, text="one"):
    with manifest.artefact(target, "thing") as (draft, facts):
        (draft / "a.txt").write_text(text)
        (draft / "sub").mkdir()
        (draft / "sub/manifest.json").write_text("{}")
        facts["number"] = 1


def test_what_is_made_verifies(tmp_path):
    make(tmp_path / "x")
    assert manifest.verify(tmp_path / "x", "thing") == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failure_leaves_the_old_one(tmp_path):
    make(tmp_path / "x", "old")
    with pytest.raises(RuntimeError), manifest.artefact(tmp_path / "x", "thing") as (draft, _):
        (draft / "a.txt").write_text("new")
        raise RuntimeError
    assert (tmp_path / "x/a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_told(tmp_path):
    with pytest.raises(ArtefactError, match="disk is full"), manifest.artefact(tmp_path / "x", "thing"):
        raise OSError(errno.ENOSPC, "No space left on device")


def edit(file, old, new):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda x: (x / "a.txt").write_text("two"),
            "x/a.txt: content differs, 3 bytes of sha256 3fc4ccfe7458… instead of",
        ),
        (
            lambda x: (x / "a.txt").write_text("longer"),
            "6 bytes of sha256 .*… instead of 3 bytes of sha256 7692c3ad3540…",
        ),
        (lambda x: (x / "a.txt").unlink(), "x/a.txt: missing, recorded are 3 bytes of sha256 7692c3ad3540…"),
        (
            lambda x: (x / "b.txt").write_text("b"),
            "x/b.txt: is not part of the artefact, 1 bytes of sha256 3e23e8160039…",
        ),
        (lambda x: (x / "manifest.json").unlink(), "no manifest.json"),
        (lambda x: (x / "manifest.json").write_text("{"), "unreadable"),
        (
            lambda x: edit(x / "manifest.json", '"number": 1', '"number": 3'),
            "x/manifest.json: content differs, sha256 ",
        ),
        (
            lambda x: edit(x / "manifest.json", '"format": 2', '"format": 1'),
            "must be a thing of format 2, got 'thing of",
        ),
    ],
)
def test_every_damage_is_told(tmp_path, spoil, said):
    make(tmp_path / "x")
    spoil(tmp_path / "x")
    with pytest.raises(ArtefactError, match=said):
        manifest.verify(tmp_path / "x", "thing")


def test_another_kind_is_refused(tmp_path):
    make(tmp_path / "x")
    with pytest.raises(ArtefactError, match="must be a base"):
        manifest.verify(tmp_path / "x", "base")


def test_the_same_content_gives_the_same_bytes(tmp_path):
    make(tmp_path / "x")
    make(tmp_path / "y")
    assert (tmp_path / "x/manifest.json").read_bytes() == (tmp_path / "y/manifest.json").read_bytes()


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
