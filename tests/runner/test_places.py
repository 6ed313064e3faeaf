"""Where an artefact may be written."""

import subprocess
from pathlib import Path

import pytest

from remint.core.errors import ArtefactError, SettingsError
from remint.core.paths import Paths
from remint.runner import places


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with files that git tracks, and a folder outside of it."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    for name in ("src/code.py", "notes/kept.txt", "data/.gitignore", "data/source/identity.json", "data/kept/a.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    monkeypatch.chdir(root)
    for command in (("init", "-q"), ("add", "-A")):
        subprocess.run(["git", *command], check=True)
    (root / "leading-out").symlink_to(outside)
    (root / "leading-in").symlink_to("src")
    return root


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("src", "must not be in a folder of the project"),
        ("src/model", "must not be in a folder of the project"),
        ("notes/model", "must not be in a folder of the project"),
        ("conf/model", "must not be in a folder of the project"),
        ("leading-in/model", "must not be in a folder of the project"),
        ("leading-out", "not behind a link that leads out of it"),
        ("leading-out/model", "not behind a link that leads out of it"),
        (".git", "must not be a hidden folder"),
        (".git/model", "must not be a hidden folder"),
        (".dvc/cache", "must not be a hidden folder"),
        (".scratch", "must not be a hidden folder"),
        ("data/kept", "must not hold files that git tracks"),
        ("data/model/sub", "must not be inside data/model"),
    ],
)
def test_a_place_that_is_not_for_artefacts_is_refused(repository, place, said):
    with pytest.raises(SettingsError, match=f"paths.model: .*{said}.*, got '{place}'; use data/model"):
        places.check("merge", Paths(model=Path(place)))


@pytest.mark.parametrize("place", ["data/model", "data/imported-model", ".scratch/test/model", "own/model"])
def test_any_other_free_place_is_accepted(repository, place):
    places.check("merge", Paths(model=Path(place)))
    Path(place).mkdir(parents=True)
    places.check("merge", Paths(model=Path(place)))
    (Path(place) / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="holds what no stage wrote"):
        places.check("merge", Paths(model=Path(place)))


def test_without_git_the_projects_own_folders_are_known(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SettingsError, match="must not be in a folder of the project"):
        places.check("merge", Paths(model=Path("src/model")))
    places.check("merge", Paths(model=Path("data/model")))
