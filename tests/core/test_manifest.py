"""An artefact is complete or absent, and every change to it is reported."""

import json
import os

import pytest

from remint.core import manifest
from remint.core.draft import artefact
from remint.core.errors import ArtefactError


def make(target, text="one"):
    with artefact(target, "thing") as (draft, facts):
        (draft / "a.txt").write_text(text)
        (draft / "sub").mkdir()
        (draft / "sub/manifest.json").write_text("{}")
        facts["number"] = 1


def test_what_is_made_verifies(tmp_path):
    make(tmp_path / "x")
    assert manifest.verify(tmp_path / "x", "thing") == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_that_was_checked_where_it_comes_from_is_not_read_again(tmp_path, monkeypatch):
    make(tmp_path / "x")
    read = []
    monkeypatch.setattr(
        manifest, "file_digest", lambda path, real=manifest.file_digest: read.append(path) or real(path)
    )
    found = manifest.checked(tmp_path / "x", "thing")
    assert [path.name for path in read] == ["a.txt", "manifest.json"]
    read.clear()
    with artefact(tmp_path / "y", "thing", known := {}) as (draft, facts):
        for path, entry in found.items():
            linked = draft / path.relative_to(tmp_path / "x")
            linked.parent.mkdir(exist_ok=True)
            os.link(path, linked)
            known[path.relative_to(tmp_path / "x").as_posix()] = entry
        facts["number"] = 1
    assert read == []
    assert (tmp_path / "y/manifest.json").read_bytes() == (tmp_path / "x/manifest.json").read_bytes()


def edit(file, old, new):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda x: (x / "a.txt").write_text("two"),
            "x/a.txt: content differs, 3 bytes with sha256 3fc4ccfe7458… instead of",
        ),
        (
            lambda x: (x / "a.txt").write_text("longer"),
            "6 bytes with sha256 .*… instead of 3 bytes with sha256 7692c3ad3540…",
        ),
        (lambda x: (x / "a.txt").unlink(), "x/a.txt: missing, the record has 3 bytes with sha256 7692c3ad3540…"),
        (
            lambda x: (x / "b.txt").write_text("b"),
            "x/b.txt: is not part of the artefact, 1 bytes with sha256 3e23e8160039…",
        ),
        (lambda x: (x / "manifest.json").unlink(), "no manifest.json"),
        (lambda x: (x / "manifest.json").write_text("{"), "not valid JSON"),
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
def test_every_damage_is_reported(tmp_path, spoil, said):
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


def rewrite(folder, change):
    """Change a manifest and update its own checksum, as an attacker would."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(content | {"sha256": manifest.digest(content)}))


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/../../secret", "", ".", "a\n.txt", "\x1b[2J", "x" * 300, "x/" * 3000]
)
def test_a_manifest_cannot_name_what_lies_outside(tmp_path, name):
    (tmp_path / "secret").write_text("s")
    make(tmp_path / "x")
    recorded = {"bytes": 1, "sha256": manifest.digest(b"s")}
    rewrite(tmp_path / "x", lambda content: content["files"].update({name: recorded}))
    with pytest.raises(ArtefactError, match="must list the files of"):
        manifest.verify(tmp_path / "x", "thing")


@pytest.mark.parametrize(
    "entry", [None, 7, {}, {"bytes": "3", "sha256": "x"}, {"bytes": True, "sha256": "x"}, {"bytes": 3, "sha256": 4}]
)
@pytest.mark.parametrize("change", ["entry", "files", "facts"])
def test_a_manifest_of_another_shape_is_refused(tmp_path, entry, change):
    make(tmp_path / "x")
    rewrite(
        tmp_path / "x",
        lambda c: c["files"].update({"a.txt": entry}) if change == "entry" else c.update({change: [entry]}),
    )
    with pytest.raises(ArtefactError, match="must list the files of"):
        manifest.read(tmp_path / "x", "thing")


def test_a_link_to_elsewhere_is_no_file_of_an_artefact(tmp_path):
    make(tmp_path / "x")
    (tmp_path / "elsewhere").write_text("one")
    (tmp_path / "x/a.txt").unlink()
    (tmp_path / "x/a.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="is a symbolic link"):
        manifest.verify(tmp_path / "x", "thing")
