"""Recipes: one is put in place, and a family's name stands for the one that the GPU here allows."""

import shutil
from pathlib import Path

import pytest
import torch

from remint import recipes
from remint.core.errors import RemintError
from remint.stages.train import footprint

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gpu(monkeypatch, free):
    """Let there be a GPU with so many GiB free, of twice as many; what looks for one as it is imported has been by now."""
    assert footprint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: free is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), int(2 * free * 2**30)))


@pytest.mark.parametrize(
    ("free", "taken"),
    [(7.5, "8gb"), (13, "8gb"), (15.2, "16gb"), (16.5, "24gb"), (23.2, "24gb"), (40, "24gb"), (78, "80gb")],
)
def test_a_familys_name_takes_the_recipe_that_makes_the_most_of_the_free_memory(
    place, monkeypatch, capsys, free, taken
):
    gpu(monkeypatch, free)
    assert recipes.main("recipe", ["internlm2"]) == 0
    assert (place / "params.yaml").read_bytes() == (ROOT / f"conf/recipe/internlm2-{taken}.yaml").read_bytes()
    assert f"now the recipe internlm2-{taken}, which makes the most of the {free:.1f} GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (None, "torch sees none here; take one by its name, like `make recipe NAME=internlm2-8gb`, of "),
        (3, "fits the 3.0 GiB"),
    ],
)
def test_without_a_gpu_that_holds_one_they_are_named_and_nothing_changes(place, monkeypatch, free, said):
    gpu(monkeypatch, free)
    before = (place / "params.yaml").read_bytes()
    with pytest.raises(RemintError, match=said):
        recipes.main("recipe", ["internlm2"])
    assert (place / "params.yaml").read_bytes() == before
