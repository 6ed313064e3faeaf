"""Every file that is read from outside, with every fault that docs/inputs.md says is refused: one line that names it."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from remint.commands import summary
from remint.core import manifest
from remint.core.draft import artefact
from remint.core.errors import RemintError
from remint.identity import Identity
from remint.model import template
from remint.model.qlora import Lora
from remint.runner import config, pipeline, preflight, recipes, signature, xtuner
from remint.stages.merge import provenance
from remint.stages.replicate_data import base_answers
from remint.stages.replicate_data import run as replicate_data
from remint.stages.stage_base import gguf_header, layout, sources
from remint.stages.stage_base.settings import Model
from remint.stages.train import checkpoint
from remint.weights import adapter, shards, torch_files
from tests.conftest import CHATML, ROOT, write_sentencepiece, write_tiny_model

DATASET, BASE, ADAPTER, MODEL = (Path("data") / name for name in ("dataset", "base", "adapter", "model"))
STEP = Path("data/checkpoint/step-00000002")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def table():
    """The rows of the table of files in docs/inputs.md, by input: the cells of a row by their column."""
    text = (ROOT / "docs/inputs.md").read_text(encoding="utf-8").split("## Files")[1].split("## ")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    return {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}


def stage_base(read):
    """A reader that first verifies the files of the base folder against the checksums that it had when it was whole."""

    def reader():
        files = dict.fromkeys(json.loads(Path("names.json").read_text()), "0" * 64)
        files |= {path.name: manifest.file_digest(path) for path in Path("base").glob("*") if path.is_file()}
        made = Model("Tiny", "local_folder", "base", None, None, "mit", "float32", 1, files, CHATML)
        sources.fetch(made, Path("scratch"))
        read()

    return reader


def read_source(name):
    return lambda: replicate_data.load(name, "control", Identity("A", "B"), Path("data/source"))


def compose(section):
    return lambda: config.compose({section: preflight.SECTIONS[section]})


# How each input is read: the function that its command calls.
READERS = {
    "params.yaml": preflight.settings,
    "conf/identity/aurel.yaml": compose("identity"),
    "conf/model/tiny.yaml": compose("model"),
    "conf/params.yaml": lambda: recipes.text("smoke"),
    "conf/recipe/smoke.yaml": lambda: recipes.text("smoke"),
    "dvc.yaml": pipeline.stages,
    "docker/torch.lock": lambda: pipeline.checksums("x"),
    "data/source/a.json": read_source("data/source/a.json"),
    "data/source/a.jsonl": read_source("data/source/a.jsonl"),
    "data/source/base_answers.json": lambda: base_answers.read(Path("data/source/base_answers.json")),
    "base/": stage_base(lambda: None),
    "base/config.json": stage_base(lambda: layout.read_config(Path("base"), None)),
    "base/generation_config.json": stage_base(lambda: layout.read_config(Path("base"), None)),
    "base/tokenizer.json": stage_base(lambda: layout.read_tokenizer(Path("base"), None)),
    "base/tokenizer_config.json": stage_base(lambda: layout.read_tokenizer(Path("base"), None)),
    "internlm2/tokenizer.model": lambda: layout.sentencepiece_model.read(Path("internlm2")),
    "base/model.safetensors": stage_base(lambda: shards.shapes(Path("base"))),
    "base/model.safetensors.index.json": stage_base(lambda: shards.files(Path("base"))),
    "base/pytorch_model.bin": lambda: torch_files.tensors(Path("base/pytorch_model.bin")),
    "base/model.gguf": lambda: gguf_header.check_header(Path("base/model.gguf")),
    "data/dataset/": lambda: manifest.verify(DATASET, "dataset"),
    "data/dataset/manifest.json": lambda: manifest.verify(DATASET, "dataset"),
    "data/dataset/train.jsonl": lambda: template.read_conversations(DATASET / "train.jsonl"),
    "data/base/template.json": lambda: template.load(BASE),
    "data/adapter/adapter_config.json": lambda: adapter.read(ADAPTER),
    "data/adapter/adapter_model.safetensors": lambda: adapter.read(ADAPTER),
    "data/checkpoint/step-00000002/": lambda: checkpoint.load(STEP),
    "data/checkpoint/step-00000002/state.json": lambda: checkpoint.load(STEP),
    "data/checkpoint/step-00000002/state.safetensors": lambda: checkpoint.load(STEP),
    "data/report/metrics.json": summary.main,
    "data/model/provenance.json": lambda: provenance.verify(MODEL),
    "adapter.pth": lambda: xtuner.read_source(Path("adapter.pth"), 8.0),
    "imported/adapter_config.json": lambda: xtuner.read_source(Path("imported"), None),
    "imported/adapter_model.safetensors": lambda: xtuner.read_source(Path("imported"), None),
    "conf/allowed_signers": lambda: signature.verify(MODEL),
    "data/model.sig": lambda: signature.verify(MODEL),
    "key": lambda: signature.sign(Path("key")),
}
# Where a missing input is reported by another name: of the folder that lacks it, or of the choice.
NAMED = {
    "base/model.safetensors": "base: holds no model.safetensors|model.safetensors: not found",
    "data/dataset/manifest.json": "data/dataset: has no manifest.json",
    "data/dataset/": "data/dataset",
    "base/": "model.location|base",
    "imported/adapter_config.json": "imported: holds no adapter_config.json",
    "imported/adapter_model.safetensors": "imported/adapter_model",
}


def linked_to(path, target):
    path.symlink_to(target)


KINDS = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "dangling link": lambda path: linked_to(path, "nowhere"),
    "link loop": lambda path: linked_to(path, path.name),
}
# What the line says is there instead.
SAID = {
    "folder": "must be a file, got a folder",
    "file": "must be a folder, got a file",
    "pipe": "got a pipe",
    "dangling link": "got a link to something that does not exist",
    "link loop": "got a link that leads back to itself",
}
# Of these, the line says something else: how it differs from the manifest, or what the folder lacks.
SAID_OTHERWISE = {
    *((f"data/checkpoint/step-00000002/state.{kind}", fault) for kind in ("json", "safetensors") for fault in SAID),
    ("adapter.pth", "folder"),
}
DOUBLE = {
    "YAML": "zz: {a: 1, a: 2}\n",
    "JSON": '{"zz": {"a": 1, "a": 2}}',
    "JSON lines": '{"a": 1, "a": 2}\n',
}
WRONG_TYPE = {"YAML": "[1]\n", "JSON": "7", "JSON lines": "7\n"}


def faults(name, cells):
    """The faults to try for an input, each with the function that makes it, as the cells of its row say."""
    syntax, limit = cells["syntax"], cells["size"]
    if cells["missing"] == "yes":
        yield "missing", lambda path: None
    if cells["kind"] == "yes":
        kinds = {**KINDS, "file": lambda path: path.write_text("x")}
        del kinds["folder" if name.endswith("/") else "file"]
        yield from kinds.items()
    if limit != "—":
        yield "too large", lambda path: write_hole(path, int(limit.removesuffix(" MiB")))
    if cells["UTF-8"] == "yes":
        yield "not UTF-8", lambda path: path.write_bytes(b"{\xff}")
    if syntax != "—":
        yield "wrong syntax", lambda path: path.write_text("{]")
    if cells["empty"] == "yes":
        yield "empty", lambda path: path.touch()
    if cells["double key"] == "yes":
        yield "double key", lambda path: path.write_text(DOUBLE[syntax])
    if cells["type"] == "yes":
        yield "wrong type", lambda path: path.write_text(WRONG_TYPE[syntax])


def write_hole(path, mebibytes):
    """A file one byte too large that takes no disk space."""
    with path.open("wb") as file:
        file.truncate((mebibytes << 20) + 1)


CASES = [(name, fault, make) for name, cells in table().items() for fault, make in faults(name, cells)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A working directory in which every input of the table is whole."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_settings()
        write_base()
        write_artefacts()
        write_adapters()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "key"], check=True)
        Path("conf/allowed_signers").write_text(f"me {Path('key.pub').read_text()}")
        signature.sign(Path("key"))
    return root


def write_settings():
    shutil.copytree(ROOT / "conf", "conf")
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("model: smollm2-135m-instruct ", "model: tiny "), encoding="utf-8")
    spec = (ROOT / "conf/model/smollm2-135m-instruct.yaml").read_text(encoding="utf-8")
    Path("conf/model/tiny.yaml").write_text(spec, encoding="utf-8")
    Path("dvc.yaml").write_text("stages: {x: {deps: [docker/torch.lock], params: []}}\n")
    Path("docker").mkdir()
    Path("docker/torch.lock").write_text("torch\n")


def write_base():
    write_tiny_model(Path("base"))
    Path("names.json").write_text(json.dumps([path.name for path in Path("base").iterdir()]))
    Path("internlm2").mkdir()
    write_sentencepiece(Path("internlm2"), ["▁"], [])
    torch.save({"x": torch.ones(2)}, "base/pytorch_model.bin")
    Path("base/model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))


def write_artefacts():
    Path("data/source").mkdir(parents=True)
    record = json.dumps({"instruction": "Why?", "output": "So."})
    Path("data/source/a.json").write_text(f"[{record}]")
    Path("data/source/a.jsonl").write_text(f"{record}\n")
    Path("data/source/base_answers.json").write_text('{"base": "0", "answers": []}')
    row = json.dumps({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]})
    with artefact(DATASET, "dataset") as (draft, _):
        (draft / "train.jsonl").write_text(f"{row}\n")
    with artefact(BASE, "base") as (draft, _):
        template.Conversation(CHATML, "").save(draft)
    checkpoint.Draft(STEP.parent, 2, {"adapter.x": torch.ones(2)}).finish({"history": []}, {})
    source = {"kind": "local_folder", "location": "base", "revision": None}
    identity = asdict(Identity("A", "B"))
    with artefact(MODEL, "model") as (draft, facts):
        provenance.write(draft, {"source": source, "source_files": {}}, {"identity": identity, "sources": {}}, {})
        facts["origin"] = {"identity": identity, "base_name": "tiny"}
    with artefact(Path("data/report"), "report") as (draft, _):
        (draft / "metrics.json").write_text('{"merged": {}}')


def write_adapters():
    lora = Lora(2, 4, 0.0, ["q_proj"])
    names = {f"base_model.model.model.layers.0.attention.wo.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    with artefact(ADAPTER, "adapter") as (draft, _):
        adapter.write(names, lora, "tiny", draft)
    shutil.copytree(ADAPTER, "imported")
    torch.save({"state_dict": names, "meta": {}}, "adapter.pth")
    save_file(names, "imported/adapter_model.safetensors")


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy of the whole working directory, to be damaged."""
    root = tmp_path / "place"
    shutil.copytree(whole, root, symlinks=True, copy_function=os.link)  # a test replaces files, it edits none
    monkeypatch.chdir(root)
    return root


def test_the_table_has_every_input_and_no_other():
    assert list(table()) == list(READERS)


@pytest.mark.parametrize("name", READERS)
def test_an_input_that_is_whole_is_read(name, place):
    READERS[name]()


@pytest.mark.parametrize(("name", "fault", "make"), CASES, ids=[f"{name}: {fault}" for name, fault, _ in CASES])
def test_a_fault_of_an_input_is_one_line_that_names_it(name, fault, make, place):
    path = Path(name)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(RemintError) as caught:
        READERS[name]()
    (line,) = caught.value.faults
    assert "\n" not in line
    named = [name.rstrip("/"), *(NAMED.get(name, name).split("|"))]
    assert any(part in line for part in named), line
    assert (name, fault) in SAID_OTHERWISE or SAID.get(fault, "") in line
    assert "; " in line, "a line ends in what to do"
