"""A merged model is written in InternLM2's own layout, and every tensor and setting stays the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from remint.__main__ import call
from remint.core import manifest
from remint.core.errors import ArtefactError
from remint.weights import shards
from tests.internlm2_reference import CONFIG, stage, stage_paths, write_checkpoint

paths = pytest.fixture(stage_paths)


def as_model(paths, **changes):
    """The staged base as if it were the result of a merge, with some settings changed."""
    shutil.copytree(paths.base, paths.model, ignore=shutil.ignore_patterns("tokenizer.model"))
    config = json.loads((paths.model / "config.json").read_text())
    (paths.model / "config.json").write_text(json.dumps({**config, **changes}))
    manifest.write(paths.model, "model", {"origin": {"base": manifest.artefact_digest(paths.base, "base")}})


def tensors(folder):
    return {name: tensor for path in shards.files(Path(folder)) for name, tensor in shards.tensors(path)}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "bias": True, "num_key_value_heads": 1},
        {"tie_word_embeddings": True},
    ],
    ids=["dynamic", "linear, bias, one head", "tied"],
)
def test_there_and_back_leaves_every_tensor_and_setting(paths, changes):
    config = {**CONFIG, **changes}
    weights = write_checkpoint(config, "safetensors")
    stage(paths)
    as_model(paths)
    assert call(["export", "internlm2", "out"]) == 0
    found = tensors("out")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    written = json.loads(Path("out/config.json").read_text())
    assert {key: written[key] for key in config if key != "auto_map"} == {
        k: config[k] for k in config if k != "auto_map"
    }
    assert Path("out/tokenizer.model").read_bytes() == Path("tiny/tokenizer.model").read_bytes()
    before = {path.name: path.read_bytes() for path in paths.base.iterdir() if path.name != "manifest.json"}
    shutil.rmtree("tiny")
    shutil.copytree("out", "tiny")
    stage(paths)
    assert {path.name: path.read_bytes() for path in paths.base.iterdir() if path.name != "manifest.json"} == before


def test_without_its_base_the_fast_tokenizer_goes_along(paths):
    write_checkpoint(CONFIG, "safetensors")
    stage(paths)
    as_model(paths)
    facts = {"origin": {"base": "another"}}
    manifest.write(paths.model, "model", facts)
    call(["export", "internlm2", "out"])
    assert not Path("out/tokenizer.model").exists()
    assert Path("out/tokenizer.json").read_bytes() == (paths.model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen2"}, "model_type must be llama"),
        ({"mlp_bias": True}, "mlp_bias must be False"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type must be default"),
        ({"head_dim": 64}, "head_dim must be hidden_size"),
    ],
)
def test_a_model_that_internlm2_has_no_form_for_is_refused(paths, changes, said):
    write_checkpoint(CONFIG, "safetensors")
    stage(paths)
    as_model(paths, **changes)
    with pytest.raises(ArtefactError, match=said):
        call(["export", "internlm2", "out"])
    assert not Path("out").exists()
