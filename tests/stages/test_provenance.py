"""provenance.json names the model's inputs and describes its files; a signature proves who signed it."""

import json
import subprocess

import pytest

from remint.core import manifest
from remint.core.draft import artefact
from remint.core.errors import ArtefactError, RemintError
from remint.core.paths import Paths
from remint.runner import pipeline, signature
from remint.stages.merge import provenance

A, B, C = (letter * 64 for letter in "abc")
BASE = {
    "source": {"kind": "package_index", "location": "llm==1.2", "revision": None},
    "source_files": {"llm.whl": A},
}
DATASET = {"identity": {"name": "Aurel"}, "sources": {"data/source/identity.json": B}}
MADE_BY = {
    "train": {"settings": {"seed": 1}, "dependencies": {"src/remint/chat.py": C, "docker/requirements.lock": A}},
    "merge": {"settings": {"merge": {}}, "dependencies": {"docker/requirements.lock": A}},
}


def make(folder, base=BASE):
    with artefact(folder, "model") as (draft, _):
        (draft / "model.safetensors").write_bytes(b"weights")
        (draft / "config.json").write_text("{}")
        provenance.write(draft, base, DATASET, MADE_BY)
    return json.loads((folder / provenance.NAME).read_text())


def test_it_describes_every_file_of_the_model(tmp_path):
    statement = make(tmp_path / "model")
    recorded = json.loads((tmp_path / "model/manifest.json").read_text())["files"]
    expected = {name: facts["sha256"] for name, facts in recorded.items() if name != provenance.NAME}
    assert {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]} == expected
    provenance.verify(tmp_path / "model")


def test_it_names_every_input_and_who_used_it(tmp_path):
    build = make(tmp_path / "model")["predicate"]["buildDefinition"]
    assert build["externalParameters"] == {"identity": {"name": "Aurel"}, "train": {"seed": 1}, "merge": {"merge": {}}}
    found = {
        entry["name"]: (entry["digest"]["sha256"], entry["annotations"]) for entry in build["resolvedDependencies"]
    }
    assert found == {
        "llm.whl": (A, {"role": "base"}),
        "data/source/identity.json": (B, {"role": "dataset"}),
        "src/remint/chat.py": (C, {"role": "build", "stages": ["train"]}),
        "docker/requirements.lock": (A, {"role": "build", "stages": ["merge", "train"]}),
    }


@pytest.mark.parametrize(
    ("source", "url"),
    [
        (BASE["source"], "pkg:pypi/llm@1.2"),
        ({"kind": "hub", "location": "org/model", "revision": "d" * 40}, f"pkg:huggingface/org/model@{'d' * 40}"),
        ({"kind": "local_folder", "location": "folder", "revision": None}, None),
    ],
)
def test_a_published_base_has_its_package_url(tmp_path, source, url):
    build = make(tmp_path / "model", {**BASE, "source": source})["predicate"]["buildDefinition"]
    assert build["resolvedDependencies"][0].get("uri") == url


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: (model / "config.json").write_text("[]"), "config.json is not the file"),
        (lambda model: (model / "config.json").unlink(), "config.json is not the file"),
        (lambda model: (model / "more.bin").touch(), "more.bin is not the file"),
        (lambda model: (model / provenance.NAME).unlink(), "not found"),
        (lambda model: (model / provenance.NAME).write_text("{"), "is not valid JSON"),
        (lambda model: (model / provenance.NAME).write_text("{}"), "is not an in-toto statement"),
    ],
)
def test_a_model_that_it_does_not_describe_is_refused_even_with_a_new_manifest(tmp_path, spoil, said):
    model = tmp_path / "model"
    make(model)
    spoil(model)
    manifest.write(model, "model", {})
    manifest.verify(model, "model")
    with pytest.raises(ArtefactError, match=said):
        provenance.verify(model)


def test_a_stage_gets_each_file_that_it_may_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {fly: {deps: ['data/model', code, lock]}}\n")
    make(tmp_path / "data/model")
    for name in ("lock", "code/run.py", "code/__pycache__/run.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    read = ("data/model/manifest.json", "code/run.py", "lock")
    assert pipeline.checksums("fly") == {name: manifest.file_digest(tmp_path / name) for name in read}


@pytest.fixture
def signed(tmp_path, monkeypatch):
    """A workplace with a model that `key` has signed; conf/allowed_signers trusts that key as `ada`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(
        json.dumps({"paths": {name: f"data/{name}" for name in Paths.__annotations__}})
    )
    (tmp_path / "conf").mkdir()
    make(tmp_path / "data/model")
    for name in ("key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", name], check=True)
    signature.SIGNERS.write_text(f"ada {(tmp_path / 'key.pub').read_text()}")
    before = (tmp_path / "data/model/manifest.json").read_bytes()
    signature.sign(tmp_path / "key")
    assert (tmp_path / "data/model/manifest.json").read_bytes() == before
    return tmp_path


def test_signing_again_replaces_a_signature_and_nothing_else(signed):
    signature.sign(signed / "other")
    place = signed / "data/model.sig"
    place.write_text("my notes")
    with pytest.raises(RemintError, match=r"data/model\.sig: is not a signature; move it away"):
        signature.sign(signed / "key")
    assert place.read_text() == "my notes"


def test_a_signature_says_who(signed, capsys):
    manifest.verify(signed / "data/model", "model")
    capsys.readouterr()
    signature.verify(signed / "data/model")
    assert "signed by ada" in capsys.readouterr().out


def test_an_unsigned_model_is_no_fault(signed, capsys):
    (signed / "data/model.sig").unlink()
    capsys.readouterr()
    signature.verify(signed / "data/model")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda place: (place / "data/model/manifest.json").write_text("{}"), "is not a signature of .* by ada"),
        (lambda place: signature.sign(place / "other"), "matches no key in"),
        (lambda place: (place / "data/model.sig").write_text("x"), "matches no key in"),
        (lambda place: signature.SIGNERS.unlink(), "write a line `NAME PUBLIC-KEY`"),
    ],
    ids=["other model", "other key", "no signature", "nobody trusted"],
)
def test_a_signature_that_proves_nothing_is_refused(signed, spoil, said):
    spoil(signed)
    with pytest.raises(ArtefactError, match=said):
        signature.verify(signed / "data/model")


def test_a_signature_for_another_purpose_is_refused(signed):
    text = (signed / "data/model/manifest.json").read_bytes()
    command = ["ssh-keygen", "-Y", "sign", "-n", "git", "-f", "key"]
    (signed / "data/model.sig").write_bytes(subprocess.run(command, input=text, capture_output=True, check=True).stdout)
    with pytest.raises(ArtefactError, match="is not a signature"):
        signature.verify(signed / "data/model")


def test_a_key_that_cannot_sign_is_refused(signed):
    (signed / "no key").write_text("no key")
    with pytest.raises(RemintError, match="no key: cannot sign"):
        signature.sign(signed / "no key")
    with pytest.raises(RemintError, match="nowhere: not found; give a private SSH key"):
        signature.sign(signed / "nowhere")
