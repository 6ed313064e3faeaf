"""A model folder's config is compared with its weights before anything is built."""

import json
import shutil

import pytest
import torch

from remint.core.errors import ArtefactError
from remint.model import loading


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 1 << 20, "intermediate_size": 1 << 20}, "describes .* parameters, the weights have"),
        ({"head_dim": 1 << 24}, "describes .* parameters, the weights have"),
        ({"num_hidden_layers": 1}, "unexpected keys"),
        ({"intermediate_size": 63}, "can be loaded"),
        ({"hidden_act": "exec"}, "can be built"),
        ({"dtype": "load"}, "can be built"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_memory_is_taken(folder, change, said):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtefactError, match=said):
        loading.load_model(folder, torch.float32, torch.device("cpu"))


def test_weights_that_can_run_code_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ArtefactError):
        loading.load_model(folder, torch.float32, torch.device("cpu"))
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("value", ["gpu", "cuda:7", "\x1b[2J"])
def test_an_unknown_device_is_refused(value, monkeypatch):
    monkeypatch.setenv("REMINT_DEVICE", value)
    with pytest.raises(loading.SettingsError, match="REMINT_DEVICE: must be cpu or cuda"):
        loading.device()
