"""Recipes: one is put in place, and a family's name selects the one that fits the GPU."""

import shutil
from pathlib import Path

import pytest
import torch

from remint.__main__ import call
from remint.core.errors import RemintError
from remint.core.manifest import flat
from remint.runner import recipes
from remint.runner.config import parse_yaml
from remint.stages.train import footprint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch, yaml_parsed_once):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gpu(monkeypatch, free):
    """Simulate a GPU with `free` GiB free of twice that. Modules that look for a GPU on import are imported already."""
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
    assert call(["recipe", "internlm2"]) == 0
    assert (place / "params.yaml").read_text(encoding="utf-8") == recipes.text(f"internlm2-{taken}")
    assert f"now the recipe internlm2-{taken}, which uses the most of the {free:.1f} GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (None, "torch finds no GPU; choose one by name, like `make recipe NAME=internlm2-8gb`, from "),
        (3, "fits the 3.0 GiB"),
    ],
)
def test_without_a_gpu_that_holds_one_they_are_named_and_nothing_changes(place, monkeypatch, free, said):
    gpu(monkeypatch, free)
    before = (place / "params.yaml").read_bytes()
    with pytest.raises(RemintError, match=said):
        call(["recipe", "internlm2"])
    assert (place / "params.yaml").read_bytes() == before


def test_a_recipe_holds_only_what_differs_and_keeps_the_comments(place):
    (place / "conf/recipe/own.yaml").write_text("# Mine.\ntrain:\n  lr: 5.0e-4\n  lora:\n    rank: 128\n")
    default = (place / "conf/params.yaml").read_text(encoding="utf-8").splitlines()
    own = recipes.text("own").splitlines()
    changed = [(old, new) for old, new in zip(default, own, strict=True) if old != new]
    assert changed[0][1] == "# Mine."
    assert changed[1:] == [
        (
            "  lr: 3.0e-3                    # peak learning rate of AdamW",
            "  lr: 5.0e-4                    # peak learning rate of AdamW",
        ),
        ("    rank: 32", "    rank: 128"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  lrr: 1", "train.lrr: no such setting"),
        ("  betas:\n    - 0.9\n    - 0.99", "must be on one line"),
        ("  lr: [", "not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_and_params_yaml_stays(place, line, said):
    (place / "conf/recipe/own.yaml").write_text(f"# Mine.\ntrain:\n{line}\n")
    before = (place / "params.yaml").read_bytes()
    with pytest.raises(RemintError, match=said):
        call(["recipe", "own"])
    assert (place / "params.yaml").read_bytes() == before


def test_no_recipe_repeats_a_value_of_the_default(in_root):
    default = dict(flat(parse_yaml((ROOT / "conf/params.yaml").read_text(encoding="utf-8"), ROOT)))
    for name in recipes.names():
        own = parse_yaml((ROOT / f"conf/recipe/{name}.yaml").read_text(encoding="utf-8"), ROOT)
        assert not [key for key, value in flat(own) if default[key] == value], name
