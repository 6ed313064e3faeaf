"""An artefact is whole or absent, and any change to it is told."""

import errno

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


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: (x / "a.txt").write_text("two"), "content differs"),
        (lambda x: (x / "a.txt").write_text("longer"), "6 bytes, recorded 3"),
        (lambda x: (x / "a.txt").unlink(), "missing"),
        (lambda x: (x / "b.txt").write_text(""), "not part"),
        (lambda x: (x / "manifest.json").unlink(), "no manifest.json"),
        (lambda x: (x / "manifest.json").write_text("{"), "unreadable"),
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
