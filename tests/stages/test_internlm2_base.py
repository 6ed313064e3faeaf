"""A staged InternLM2 checkpoint computes what InternLM2's own forward pass computes, from each storage format."""

from pathlib import Path

import pytest
import torch

from remint.core import manifest
from remint.core.errors import ArtefactError
from remint.model import loading
from tests.internlm2_reference import CONFIG, forward, stage, stage_paths, write_bins, write_checkpoint, write_config

paths = pytest.fixture(stage_paths)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("safetensors", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("bin", {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "bias": True}),
        ("safetensors", {"rope_scaling": {"type": "linear", "factor": 2}, "num_key_value_heads": 4, "bias": True}),
        ("bin", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
    ids=["dynamic", "dynamic, bias", "linear, bias, all heads", "tied, one head"],
)
def test_the_logits_are_internlm2s_within_and_beyond_the_trained_length(paths, kind, changes):
    config = {**CONFIG, **changes}
    weights = write_checkpoint(config, kind)
    stage(paths)
    model = loading.load_model(paths.base, torch.float32, torch.device("cpu"))
    for length in (9, 24, 25, 60):
        ids = torch.arange(length) * 7 % 261
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        torch.testing.assert_close(logits, forward(weights, config, ids), rtol=0, atol=1e-5)


def test_what_config_json_does_not_say_is_as_internlm2s_code_has_it(paths):
    config = {**CONFIG, "bias": True, "rope_theta": 10000.0, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    weights = write_checkpoint(config, "safetensors")
    said = set(config) - {"bias", "rope_theta", "rope_scaling", "max_position_embeddings", "rms_norm_eps"}
    write_config(Path("tiny"), {key: config[key] for key in said})
    stage(paths)
    ids = torch.arange(20)
    with torch.no_grad():
        logits = loading.load_model(paths.base, torch.float32, torch.device("cpu"))(ids[None]).logits[0]
    torch.testing.assert_close(logits, forward(weights, config, ids), rtol=0, atol=1e-5)


def test_another_kind_of_rope_scaling_is_refused(paths):
    write_checkpoint({**CONFIG, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "safetensors")
    with pytest.raises(ArtefactError, match="rope_scaling must be linear or dynamic"):
        stage(paths)


class Trap:
    """Creates a file when it is unpickled carelessly."""

    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def put(name, content, **how):
    path = Path("tiny") / name
    torch.save({**torch.load(path), **content}, path, **how)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda name: put(name, {"x": Trap()}),
            "cannot be read as plain tensors [(]Unsupported global: GLOBAL getattr was",
        ),
        (lambda name: put(name, {"x": {"y": 1}}), "'x': must be a plain tensor, got 'dict'"),
        (lambda name: put(name, {"x": torch.eye(2).to_sparse()}), "'x': must be a plain tensor"),
        (lambda name: put(name, {"x": torch.ones(1).expand(10**12)}), "'x': must be a plain tensor"),
        (lambda name: put(name, {7: torch.ones(1)}), "7: must be a plain tensor"),
        (lambda name: put(name, {}, _use_new_zipfile_serialization=False), "cannot be read as plain tensors"),
        (lambda name: torch.save([1], Path("tiny") / name), "must hold tensors by name, got 'list'"),
        (lambda name: (Path("tiny") / name).write_bytes(b"\x80\x02c"), "cannot be read as plain tensors"),
        (lambda name: (Path("tiny") / name).unlink(), "missing, though the index names it"),
        (lambda name: put(name, {"model.layers.0.attention.new.weight": torch.ones(1)}), "InternLM2 has no tensor"),
    ],
)
def test_a_pickled_file_that_holds_more_than_tensors_is_refused_and_not_run(paths, spoil, said):
    write_checkpoint(CONFIG, "bin")
    spoil("pytorch_model-00002-of-00002.bin")
    with pytest.raises(ArtefactError, match=said):
        stage(paths)
    assert not Path("sprung").exists()
    assert not paths.base.exists()


def test_pickled_weights_without_a_recorded_checksum_are_refused_and_not_opened(paths, monkeypatch):
    write_checkpoint(CONFIG, "bin")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ArtefactError, match=r"pytorch_model-00001-of-00002.bin: [0-9a-f]{64}"):
        stage(paths, files={})


def test_pickled_weights_beside_safetensors_are_left_alone(paths, monkeypatch):
    weights = write_checkpoint(CONFIG, "safetensors")
    write_bins(Path("tiny"), weights)
    monkeypatch.setattr(torch, "load", None)
    files = {path.name: manifest.file_digest(path) for path in Path("tiny").iterdir() if path.suffix != ".bin"}
    stage(paths, files)
    assert manifest.verify(paths.base, "base")["parameters"] == sum(tensor.numel() for tensor in weights.values())
