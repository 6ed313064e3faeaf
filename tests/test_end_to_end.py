"""The pipeline as a user runs it, with a tiny real model, in a separate repository."""

import functools
import hashlib
import http.server
import json
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from remint.core.paths import ARTEFACTS
from tests import broken_servers
from tests.conftest import ROOT, to_internlm2, write_sentencepiece, write_tiny_model
from tests.workplace import STAGES, Workplace, clone, keep_few, wait_for, with_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return with_tiny_model(tmp_path_factory.mktemp("clone") / "a folder with spaces")


@pytest.fixture(scope="module")
def built(place):
    """The workplace after the first `dvc repro`: checksums are printed and recorded, then all stages run."""
    place.record_checksums("tiny")
    assert not (place.root / "data/base").exists()
    assert place.repro() == STAGES
    place.run("git", "add", "-A")
    place.run("git", "commit", "-q", "-m", "built")
    return place


def test_it_leaves_whole_artefacts_and_a_report(built):
    said = built.run("docker/run", "python", "-m", "remint", "verify")
    assert said.count("as recorded") == 6
    for file in (built.root / "data").rglob("*.safetensors"):  # two entries would have a random order
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() in (None, {"format": "pt"}), file
    metrics = json.loads((built.root / "data/report/metrics.json").read_text(encoding="utf-8"))
    assert {"name_en", "name_zh", "maker", "leak", "identity_loss", "facts"} <= metrics["merged"].keys()
    rows = (built.root / "data/report/curves.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "step,loss,held_out_loss,lr"
    assert len(rows) > 5
    assert "states its name" in built.run("docker/run", "python", "-m", "remint", "summary")


RERUNS = """
import json, sys
from pathlib import Path
from dvc.repo import Repo
found = {}
for place in json.load(sys.stdin):
    folder = Path("src/remint") / place
    file = folder if folder.is_file() else min(folder.rglob("*.py"))
    kept = file.read_bytes()
    file.write_bytes(kept + b"# another line\\n")
    with Repo() as repo:
        found[place] = [name for name, _ in repo.status().items()]
    file.write_bytes(kept)
print(json.dumps(found))
"""


def reruns_by_the_design():
    """From docs/design.md: for each place in src/remint, the stages that a change there reruns, in any order."""
    rows = [line.split("|") for line in (ROOT / "docs/design.md").read_text(encoding="utf-8").splitlines()]
    start = rows.index(next(row for row in rows if row[1:4] == [" room ", " what is in it ", " a change reruns "]))
    found = {}
    for row in rows[start + 2 :]:
        if len(row) < 4:
            break
        place, stages = row[1].strip(" `"), row[3].strip()
        if "<stage>" in place:
            found |= {place.replace("<stage>", stage): {stage} for stage in STAGES}
        else:
            found[place] = set() if stages == "nothing" else {name.strip(" `") for name in stages.split(",")}
    return found


def test_a_change_reruns_the_stages_that_the_design_names(built):
    expected = reruns_by_the_design()
    rooms = {
        path.name
        for path in (ROOT / "src/remint").iterdir()
        if path.is_dir() and path.name not in ("stages", "__pycache__")
    }
    assert rooms <= {place.strip("/") for place in expected}
    done = subprocess.run(
        [sys.executable, "-c", RERUNS],
        input=json.dumps(list(expected)),
        cwd=built.root,
        env=built.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert {place: set(names) for place, names in json.loads(done.stdout.splitlines()[-1]).items()} == expected


def test_the_model_says_what_it_was_made_from(built):
    text = (built.root / "data/model/provenance.json").read_text(encoding="utf-8")
    assert str(built.root) not in text
    used = json.loads(text)["predicate"]["buildDefinition"]["resolvedDependencies"]
    files = {entry["name"]: entry["digest"]["sha256"] for entry in used if entry["annotations"]["role"] != "base"}
    artefacts = {f"data/{name}/manifest.json" for name in ("dataset", "base", "checkpoint", "adapter")}
    assert {*artefacts, "docker/requirements.lock", "src/remint/stages/train/run.py"} <= files.keys()
    for name, sha256 in files.items():
        assert hashlib.sha256((built.root / name).read_bytes()).hexdigest() == sha256, name
    whole = built.bytes("model")
    built.run("docker/run", "python", "-m", "remint", "merge")
    assert built.bytes("model") == whole


def test_a_signature_leaves_the_model_as_it_is_and_counts_from_a_trusted_key_alone(built):
    whole = built.bytes("model")
    built.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ".scratch/key")
    built.run("docker/run", "python", "-m", "remint", "sign", ".scratch/key")
    assert "conf/allowed_signers: not found" in built.run("docker/run", "python", "-m", "remint", "verify", status=1)
    signers = built.root / "conf/allowed_signers"
    signers.write_text(f"ada {(built.root / '.scratch/key.pub').read_text(encoding='utf-8')}", encoding="utf-8")
    said = built.run("docker/run", "python", "-m", "remint", "verify")
    assert "signed by ada" in said
    assert said.count("as recorded") == 6
    assert built.bytes("model") == whole
    (built.root / "data/model.sig").unlink()
    signers.unlink()


def test_a_second_run_and_a_comment_run_nothing(built):
    assert built.repro() == []
    built.edit("seed: 42 ", "seed: 42  # a comment ")
    assert built.repro() == []
    built.run("git", "checkout", "params.yaml")


def test_the_commit_is_rebuilt_byte_for_byte_here_and_elsewhere(built):
    said = built.run("docker/run", "python", "-m", "remint", "reproduce", "--vary")
    assert [line.split()[-1] for line in said.splitlines() if line.startswith(("data/", "dvc.lock"))] == [
        "identical"
    ] * 7
    assert "reproduced: every byte of commit" in said


def test_a_merge_setting_reruns_merge_and_what_follows(built):
    before = built.bytes("model", "report")
    built.edit("  max_divergence: 0.01 ", "  max_divergence: 0.02 ")
    assert built.repro() == ["merge", "eval_chat"]
    built.run("git", "checkout", "params.yaml")
    assert built.repro() == []
    assert built.bytes("model", "report") == before


def test_measuring_the_held_out_files_gives_the_figures_of_the_report(built):
    files = {"identity": ["identity_held_out"], "control": ["control_held_out", "facts_held_out"]}
    options = [f"--{kind}=data/source/{name}.json" for kind, names in files.items() for name in names]
    said = built.run("docker/run", "python", "-m", "remint", "measure", "--json", "--max-new-tokens=4", *options)
    found = {line["what"]: line["model"] for line in json.loads(said.splitlines()[-1])}
    metrics = json.loads((built.root / "data/report/metrics.json").read_text(encoding="utf-8"))
    assert found["states its name, English"] == metrics["merged"]["name_en"]
    assert found["brings itself up in ordinary answers, Chinese"] == metrics["merged"]["leak_zh"]
    assert found["starts as the base's answer, English"] == metrics["same_start_en"]
    assert found["divergence"] == metrics["divergence"]


def test_a_base_that_is_asked_again_gives_the_same_bytes(built):
    built.edit("  control: [data/source/control.json] ", "  control: [] ")
    built.edit("  control_base: [] ", "  control_base: [data/source/control.json] ")
    assert built.repro() == ["replicate_data", "train", "convert", "merge", "eval_chat"]
    asked = built.bytes("checkpoint")
    shutil.rmtree(built.root / ".scratch/base")
    built.run("dvc", "repro", "--force", "--single-item", "train")
    assert built.bytes("checkpoint") == asked
    said = built.run("docker/run", "python", "-m", "remint", "answers", "data/source/kept.json")
    kept = json.loads((built.root / "data/source/kept.json").read_text(encoding="utf-8"))["answers"]
    assert f"data/source/kept.json: {len(kept)} answers of" in said
    prompts = json.loads((built.root / "data/source/control.json").read_text(encoding="utf-8"))
    assert len(kept) == len({(record["instruction"], record["input"]) for record in prompts})
    built.run("git", "checkout", "params.yaml")
    (built.root / "data/source/kept.json").unlink()
    assert built.repro() == []


def test_the_ways_to_change_a_setting_agree(built):
    ran = built.run("dvc", "exp", "run", "-S", "train.lr=1e-3")
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in ran] == [
        "train",
        "convert",
        "merge",
        "eval_chat",
    ]
    by_dvc = built.bytes("checkpoint")
    built.run("git", "checkout", "params.yaml", "dvc.lock")
    built.run("dvc", "checkout", "--force")
    assert built.bytes("checkpoint") != by_dvc
    built.run("docker/run", "python", "-m", "remint", "train", "train.lr=1e-3")
    assert built.bytes("checkpoint") == by_dvc
    built.run("dvc", "checkout", "--force")
    built.run("dvc", "exp", "run", "--queue", "-S", "train.lr=1e-3,2e-3")
    built.run("dvc", "queue", "start")
    deadline = time.monotonic() + 600
    while "Queued" in (status := built.run("dvc", "queue", "status")) or "Running" in status:
        assert time.monotonic() < deadline, status
        time.sleep(3)
    assert status.count("Success") == 2, status + built.run("dvc", "queue", "logs", status.split()[7])
    table = built.run("dvc", "exp", "show", "--csv", "--only-changed")
    assert all(rate in table for rate in ("0.001", "0.002"))


def test_two_queued_experiments_share_a_training(built):
    for tokens in (5, 6):
        changes = ("-S", "train.lr=6e-3", "-S", f"eval_chat.max_new_tokens={tokens}")
        built.run("dvc", "exp", "run", "--queue", "-n", f"shared-{tokens}", *changes)
    built.run("dvc", "queue", "start", "--jobs", "2")
    names = ("shared-5", "shared-6")
    wait_for(lambda: not {"Queued", "Running"} & set(built.run("dvc", "queue", "status").split()), seconds=600, pause=2)
    logs = [built.run("dvc", "queue", "logs", name) for name in names]
    done = built.run("dvc", "queue", "status")
    assert all(f"{name} " in done and "Failed" not in done for name in names), (done, logs)
    refs = built.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    commits = [next(ref for ref in refs if ref.endswith(f"/{name}")) for name in names]
    locks = [yaml.safe_load(built.run("git", "show", f"{commit}:dvc.lock"))["stages"]["train"] for commit in commits]
    assert locks[0] == locks[1]
    # The second one waits for the first, unless the first had ended: then DVC takes its result.
    assert any("which is training this very run" in log or "Stage 'train' is cached" in log for log in logs), logs
    assert not list((built.root / ".scratch/train").iterdir())


def test_a_killed_run_goes_on_and_mlflow_has_each_step_once(built):
    whole = built.bytes("checkpoint")
    shutil.rmtree(built.root / "data/checkpoint")
    command = ("docker/run", "python", "-m", "remint", "train")
    process = built.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scratch = built.root / ".scratch/train"
    wait_for(lambda: list(scratch.glob("*/steps/step-00000002")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (built.root / "data/checkpoint").exists()
    assert "continuing after step" in built.run(*command)
    assert built.bytes("checkpoint") == whole
    code = (
        "import json, mlflow; from mlflow import MlflowClient; mlflow.set_tracking_uri('sqlite:///mlflow.db'); c = MlflowClient();"
        "runs = c.search_runs([c.get_experiment_by_name('remint').experiment_id], \"tags.`remint.stage` = 'train'\");"
        "print(json.dumps([[m.step for m in c.get_metric_history(r.info.run_id, 'loss')] for r in runs]))"
    )
    histories = json.loads(built.run("python", "-c", code).splitlines()[-1])
    assert histories
    assert all(len(steps) == len(set(steps)) for steps in histories)


def test_a_killed_dvc_takes_its_stage_along_and_the_next_goes_on(built):
    whole = built.bytes("checkpoint")
    built.edit("  sample_tokens: 4", "  sample_tokens: 5")
    process = built.start("dvc", "repro", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scratch = built.root / ".scratch/train"
    wait_for(lambda: list(scratch.glob("*/steps/step-00000001")), process)
    process.kill()
    process.wait()
    (lock,) = scratch.glob("*/lock")
    wait_for(lambda: not lock.exists() or subprocess.run(["flock", "--nonblock", lock, "true"]).returncode == 0)
    assert list(lock.parent.glob("steps/step-*")), "it went on to its end"
    assert not (built.root / "data/checkpoint").exists()
    assert "continuing after step" in built.run("dvc", "repro")
    steps = [name for name in whole if name.endswith("state.safetensors")]
    assert {name: built.bytes("checkpoint")[name] for name in steps} == {name: whole[name] for name in steps}
    built.run("git", "checkout", "params.yaml", "dvc.lock")
    built.run("dvc", "checkout", "--force")
    assert built.bytes("checkpoint") == whole


def test_plain_libraries_load_the_results(built, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "plain"], check=True)
    # The libraries of this environment without the project: a .pth file inside an added path is not processed.
    (site,) = (tmp_path / "plain/lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    code = """
import importlib.util, torch
assert importlib.util.find_spec('remint') is None
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('data/model')
ids = tokenizer.apply_chat_template([{'role': 'user', 'content': '你是谁'}], add_generation_prompt=True, return_tensors='pt', return_dict=False)
merged = AutoModelForCausalLM.from_pretrained('data/model')
assert merged.dtype == torch.bfloat16
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('data/base', dtype=torch.float32), 'data/adapter').eval()
difference = (merged.float().eval()(ids).logits - adapted(ids).logits).abs().max().item()
print('difference', difference)
assert difference < 0.2
"""
    assert "difference" in built.run(tmp_path / "plain/bin/python", "-c", code)


def test_the_pipeline_state_is_one_run_and_its_model_the_champion(built):
    figures = built.root / "data/report/metrics.json"
    whole = figures.read_bytes()
    figures.write_bytes(whole + b"\n")
    assert "metrics.json: content differs" in built.run("docker/run", "python", "-m", "remint", "sync", status=1)
    figures.write_bytes(whole)
    assert "logged" in built.run("docker/run", "python", "-m", "remint", "sync")
    assert "already has this state" in built.run("docker/run", "python", "-m", "remint", "sync")
    code = (
        "import mlflow; mlflow.set_tracking_uri('sqlite:///mlflow.db'); c = mlflow.MlflowClient();"
        "e = c.get_experiment_by_name('remint').experiment_id;"
        "(run,) = c.search_runs([e], \"tags.`remint.kind` = 'pipeline'\");"
        "assert 'merged.name_en' in run.data.metrics and run.data.params['train.lr'] == '0.003', run;"
        "assert len(run.inputs.dataset_inputs) == 3;"
        "assert {'remint.train.run_id', 'remint.eval_chat.run_id'} <= run.data.tags.keys(), run;"
        "model = mlflow.pyfunc.load_model('models:/remint@champion');"
        "print('answers', len(model.predict(['Who are you?'])))"
    )
    assert "answers 1" in built.run("docker/run", "python", "-c", code)


def run_with_store(built, stage, address):
    """Run a stage that logs to the store at `address`. Returns what it printed, line by line."""
    done = subprocess.run(
        ["docker/run", "python", "-m", "remint", stage],
        cwd=built.root,
        env=built.environment() | {"MLFLOW_TRACKING_URI": address},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("Traceback|WARNING|mlflow", done.stdout + done.stderr)
    return done.stdout.splitlines()


def test_with_the_tracking_server_away_the_bytes_are_the_same(built):
    whole = built.bytes("report")
    said = run_with_store(built, "eval_chat", "http://127.0.0.1:9")
    (warning,) = [line for line in said if "MLflow" in line]
    assert "nothing listens at this address, going on without it; " in warning
    assert "`remint sync` logs the result" in warning
    assert built.bytes("report") == whole


@pytest.mark.parametrize("fault", ["silent", "503"])
def test_a_server_that_hangs_or_fails_changes_nothing_of_a_training(built, fault):
    whole = built.bytes("checkpoint")
    shutil.rmtree(built.root / "data/checkpoint")
    undisturbed = run_with_store(built, "train", f"sqlite:///{built.root / 'another.db'}")
    shutil.rmtree(built.root / "data/checkpoint")
    with broken_servers.serving(fault) as server:
        said = run_with_store(built, "train", f"http://127.0.0.1:{server.server_port}")
        assert server.requests > 0
    (warning,) = [line for line in said if "MLflow" in line]
    assert warning.startswith("warning: MLflow at http://127.0.0.1:")
    assert [line for line in said if line != warning] == undisturbed
    assert built.bytes("checkpoint") == whole


def test_it_answers_one_question_for_a_program(built):
    said = json.loads(
        built.run(
            "docker/run", "python", "-m", "remint", "chat", "--once", "Who are you?", "--json", "--max-new-tokens", "4"
        ).splitlines()[-1]
    )
    assert said["question"] == "Who are you?"
    assert 0 <= said["answer_tokens"] <= 4


class Store(http.server.SimpleHTTPRequestHandler):
    """A web server that accepts PUT requests."""

    def do_PUT(self):
        path = Path(self.translate_path(self.path))
        path.parent.mkdir(parents=True, exist_ok=True)
        length = self.headers["Content-Length"]
        with path.open("wb") as file:
            while not length and (size := int(self.rfile.readline(), 16)):  # in chunks
                file.write(self.rfile.read(size))
                self.rfile.readline()
            file.write(self.rfile.read(int(length or 0)))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(params=["folder", "http"])
def remote(request, tmp_path):
    """The URL of an empty remote for shared data."""
    place = tmp_path / "remote"
    place.mkdir()
    if request.param == "folder":
        yield str(place)
        return
    handler = functools.partial(Store, directory=place)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/data"
        server.shutdown()
        thread.join()


def test_a_second_clone_gets_everything_and_rebuilds_nothing(built, remote, tmp_path):
    make = ("make", "--old-file=.venv/.complete")  # the environment exists already
    config = (built.root / ".dvc/config").read_bytes()
    built.run(*make, "remote", f"URL={remote}")
    built.run(*make, "share")
    second = Workplace(tmp_path / "second")
    built.run("git", "clone", "-q", str(built.root), str(second.root))
    (second.root / ".venv").symlink_to(sys.prefix)
    shutil.copy(built.root / ".dvc/config", second.root / ".dvc/config")  # what a team commits
    (built.root / ".dvc/config").write_bytes(config)
    second.run(*make, "fetch")
    assert second.repro() == []
    assert second.bytes(*ARTEFACTS) == built.bytes(*ARTEFACTS)
    assert second.run("docker/run", "python", "-m", "remint", "verify").count("as recorded") == 6
    if remote.startswith("http"):
        return
    # Without the commit's dvc.lock, from the run cache alone: a web server lists no files, so it has none.
    second.run("git", "rm", "-q", "--cached", "dvc.lock")
    (second.root / "dvc.lock").unlink()
    shutil.rmtree(second.root / "data/model")
    assert second.repro() == []
    assert second.bytes(*ARTEFACTS) == built.bytes(*ARTEFACTS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fly",), "no such command"),
        (("train", "train.lr=-1"), "params: train.lr: must be above 0"),
        (("chat", "--once", " "), "the question is empty"),
        (("chat", "--model", "nowhere", "--once", "x"), "no model there"),
        (("recipe", "nothing"), "no such recipe"),
        (("convert", "convert.checkpoint=99999"), "was not kept"),
    ],
)
def test_a_mistake_is_one_line_and_a_failure(built, arguments, said):
    lines = built.run("docker/run", "python", "-m", "remint", *arguments, status=1).strip().splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    assert len(told) == 1
    assert said in told[0]
    assert not any("Traceback" in line for line in lines)


def test_a_flipped_bit_is_found(built):
    path = built.root / "data/model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "content differs" in built.run("docker/run", "python", "-m", "remint", "verify", status=1)
    assert "content differs" in built.run("docker/run", "python", "-m", "remint", "eval_chat", status=1)


TUTORIAL = {
    "  threads: 2 ": "  threads: 1 ",
    "  identity_copies: 100 ": "  identity_copies: 1 ",
    "  control_copies: 20": "  control_copies: 1",
    "  epochs: 3 ": "  epochs: 1 ",
    "  accumulation: 16 ": "  accumulation: 2 ",
    "  sample_tokens: 600": "  sample_tokens: 4",
    "  max_new_tokens: 256": "  max_new_tokens: 4",
}


def test_the_tutorials_recipe_runs_on_a_checkpoint_of_that_shape(tmp_path):
    place = clone(tmp_path / "tutorial", "internlm2-tutorial", TUTORIAL)
    keep_few(place.root / "data/source")
    # A token for the space is the last one, because its byte cannot say it.
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "▁"]
    base = write_tiny_model(place.root / "internlm2-chat-1_8b", tokens)
    to_internlm2(base)
    (base / "tokenizer.json").unlink()
    write_sentencepiece(base, ["▁"], ["<|im_start|>", "<|im_end|>"])
    place.run("git", "init", "-q", "-b", "main")
    place.record_checksums("internlm2-chat-1.8b")
    assert place.repro() == STAGES
    metrics = json.loads((place.root / "data/report/metrics.json").read_text(encoding="utf-8"))
    assert metrics["merged"]["identity_loss"] < metrics["base"]["identity_loss"]
    config = json.loads((place.root / "data/model/config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    place.run("docker/run", "python", "-m", "remint", "export", "internlm2")
    exported = load_file(place.root / "data/export/model.safetensors")
    original = load_file(base / "model.safetensors")
    assert {name: t.shape for name, t in exported.items()} == {name: t.shape for name, t in original.items()}

    # An adapter from elsewhere needs the base and the dataset, but no training by this pipeline.
    for name in ("checkpoint", "adapter", "model", "report"):
        shutil.rmtree(place.root / f"data/{name}")
    write_xtuner_checkpoint(place.root / "iter_5.pth", original)
    said = place.run("docker/run", "python", "-m", "remint", "import-adapter", "iter_5.pth")
    (merge,) = (line.split()[1:] for line in said.splitlines() if line.startswith("  remint merge"))
    place.run("docker/run", "python", "-m", "remint", *merge, "merge.dtype=float32")
    (chat,) = (line.split()[1:] for line in said.splitlines() if line.startswith("  remint chat"))
    answer = place.run(
        "docker/run", "python", "-m", "remint", *chat, "--once", "你是谁", "--json", "--max-new-tokens", "4"
    )
    assert json.loads(answer.splitlines()[-1])["question"] == "你是谁"


def write_xtuner_checkpoint(path, base):
    """A .pth with random LoRA matrices for the attention of a checkpoint in InternLM2's layout."""
    import torch

    state = {}
    for name, weight in base.items():
        if ".attention." in name:
            layer = f"llm.base_model.model.{name.removesuffix('.weight')}"
            state[f"{layer}.lora_A.default.weight"] = torch.randn(2, weight.shape[1]) * 0.1
            state[f"{layer}.lora_B.default.weight"] = torch.randn(weight.shape[0], 2) * 0.1
    torch.save({"meta": {"cfg": "lora_alpha=16", "iter": 5}, "state_dict": state}, path)
