"""Generates the faults. Each function returns the faults of one kind; nothing here depends on chance but by a seed."""

import functools
import json
import os
import random
import resource
import shutil
import signal

import yaml

from tests.conftest import ROOT
from tests.faults.bench import Fault

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
STAGES = ("replicate_data", "stage_base", "train", "convert", "merge", "eval_chat")
SOURCES = ("identity.json", "identity_held_out.json", "control.json", "control_held_out.json", "facts_held_out.json")
# Of each stage: an artefact that it reads, and the files of it that are damaged.
READ = {
    "train": ("dataset", "train.jsonl"),
    "convert": ("checkpoint", "history.jsonl"),
    "merge": ("adapter", "adapter_model.safetensors"),
    "eval_chat": ("model", "model.safetensors"),
}


def put(name, data):
    """A change that replaces a file; the hard link of the template stays as it is."""

    def change(place):
        path = place / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return change


def edited(name, edit):
    """A change that replaces a file by `edit(its bytes)`."""
    return lambda place: put(name, edit((place / name).read_bytes()))(place)


def without(name):
    """A change that removes a file or a folder."""
    return lambda place: shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()


def folder(name):
    """A change that puts a folder in the place of a file."""
    return lambda place: ((place / name).unlink(missing_ok=True), (place / name).mkdir(parents=True))


def pipe(name):
    """A change that puts a named pipe in the place of a file."""
    return lambda place: ((place / name).unlink(missing_ok=True), os.mkfifo(place / name))


def linked(name):
    """A change that puts a symbolic link to a file outside in the place of a file."""

    def change(place):
        shutil.copy(place / name, outside := place.with_suffix(".outside"))
        (place / name).unlink()
        (place / name).symlink_to(outside)

    return change


def flip(data):
    """One bit in the middle of the bytes, the other way round."""
    spoilt = bytearray(data)
    spoilt[len(spoilt) // 2] ^= 1
    return bytes(spoilt)


def cut(data):
    """The first half."""
    return data[: len(data) // 2]


def _leaves(content, prefix=""):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with(setting, value):
    def change(place):
        content = yaml.safe_load((place / "params.yaml").read_text(encoding="utf-8"))
        node = content
        *parents, last = setting.split(".")
        for name in parents:
            node = node[name]
        node[last] = value
        put("params.yaml", json.dumps(content))(place)

    return change


def settings():
    """Every setting of params.yaml with values of a wrong type, out of range, or that refer to the environment."""
    faults = []
    for name, value in _leaves(PARAMS):
        wrong = [{"a": 1}, "${oc.env:HOME}", [[]] if isinstance(value, list) else ["x"], "\x1b[2J${x}"]
        if isinstance(value, bool):
            wrong += ["maybe", 7]
        elif isinstance(value, int | float):
            wrong += ["many", float("nan"), -(10**30), ""]
        elif isinstance(value, str) and name != "train.system":
            wrong += [7, "../outside", None]
        faults += [Fault(f"{name} = {bad!r}", ("check",), _with(name, bad)) for bad in wrong]
    for name in PARAMS:
        faults += [Fault(f"{name} is {bad!r}", ("check",), _with(name, bad)) for bad in ([], None, {"x": 1})]
    return faults


def overrides():
    """Settings on the command line, of each stage."""
    wrong = ["train.lr", "=1", "=", "x=1", "+seed=1", "++seed=1", "~seed", "seed=-1", "seed=x", "seed={", "seed=[", "a.b.c=1",
             "seed=1,2", "paths.base=/etc", "paths.base=..", "paths=", "model=nothing", "identity=../x", "hydra.run.dir=x",
             "seed=${oc.env:HOME}", "seed=\udcff", "seed=\x1b[2J", "seed=" + "9" * 5000, "seed=" + "[" * 3000, "\u202eseed=1",
             "hydra=1", "seed=null", "@=1", "seed=1e400", "--multirun", "'seed=1", "seed='"]  # fmt: skip
    return [Fault(f"{stage} {entry[:40]!a}", (stage, entry)) for stage in STAGES for entry in wrong]


def arguments():
    """Commands, options and their values."""
    wrong = [
        ("fly",), ("\x1b[2J",), ("\udcff",), ("",), ("train2",), ("--fly",), ("Train",), ("check", "x"), ("check", "--x"),
        ("chat", "--once"), ("chat", "--seed", "-1"), ("chat", "--seed", "x"), ("chat", "--seed", str(2**63)),
        ("chat", "--max-new-tokens", "0"), ("chat", "--max-new-tokens", "1e3"), 
        ("chat", "--temperature", "hot"), ("chat", "extra"), ("serve", "--port", "0"), ("serve", "--port", "65536"),
        ("serve", "--port", "x"), ("serve", "--max-new-tokens", "-1"),  ("serve", "x"),
        ("ui", "--port", "x"), ("ui", "--port", "99999999"), ("ui", "--port", "-1"), ("recipe",), ("recipe", "nothing"), ("recipe", "../cpu"),
        ("recipe", "\x1b[2J"), ("recipe", "cpu", "smoke"), ("recipe", "/etc/passwd"), ("recipes", "a", "b"), ("export",),
        ("export", "gguf"), ("export", "internlm2", "x", "y"), ("sign",), ("sign", "nokey"), ("sign", "data"),
        ("import-adapter",), ("import-adapter", "data", "--alpha", "x"),
        ("reproduce", "--times", "0"), ("reproduce", "--times", "x"), ("verify", "x"), ("verify", "--fly"), ("sync", "x"), ("summary", "x"),
        ("train", "--fly"), ("train", "--cfg", "x"), ("verify",), ("recipe", "a" * 5000), ("sign", "x" * 5000),
        
    ]  # fmt: skip
    return [Fault(" ".join(map(ascii, argv))[:60], argv) for argv in wrong]


def arguments_of_models():
    """Arguments that a command looks at after it has imported torch."""
    wrong = [
        ("chat", "--model", "nowhere", "--once", "x"), ("chat", "--temperature", "-1"), ("chat", "--temperature", "nan"), ("chat", "--top-p", "0"),
        ("chat", "--top-k", "-1"), ("chat", "--model", "params.yaml", "--once", "x"), ("chat", "--once", " "), ("chat", "--once", "\udcff"),
        ("serve", "--model", "nowhere"), ("serve", "--model", "x" * 5000), ("serve", "--host", "256.1.1.1"), ("serve", "--host", "no such host"), ("serve", "--host", "x" * 500),
        ("export", "internlm2", "--model", "nowhere"), ("import-adapter", "nowhere"), ("import-adapter", "params.yaml"),
        ("import-adapter", "data"), ("import-adapter", "a\udcff"), ("import-adapter", "x" * 5000), ("import-adapter", "data/adapter", "--alpha", "x"),
        ("import-adapter", "data/adapter", "--to", "params.yaml"), ("export", "internlm2", "params.yaml"), ("convert", "convert.checkpoint=99999"),
    ]  # fmt: skip
    return [Fault(" ".join(map(ascii, argv))[:60], argv) for argv in wrong]


YAML = {
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 3] + b"\n  - [",
    "not UTF-8": lambda data: data[:100] + b"\xff\xfe" + data[100:],
    "a tab": lambda data: b"\tx: 1\n" + data,
    "an alias": lambda data: b"a: &a [1]\nb: [*a, *a]\n" + data,
    "deep": lambda _: b"a: " + b"[" * 2000,
    "code": lambda data: b"a: !!python/object/apply:os.system ['true']\n" + data,
    "a list": lambda _: b"- 1\n- 2\n",
    "a text": lambda _: b"hello\n",
    "twice": lambda data: data + b"\n---\n" + data,
    "zero bytes": lambda data: b"\0" * 10 + data,
    "large": lambda _: b"a: " + b"x" * (2 << 20),
}


def yaml_files():
    """params.yaml, dvc.yaml and the files of conf/: damaged, missing, not a file."""
    faults = []
    for name in ("params.yaml", "conf/identity/aurel.yaml", "conf/model/smollm2-135m-instruct.yaml", "dvc.yaml"):
        command = ("replicate_data", "--cfg") if name == "dvc.yaml" else ("check",)
        faults += [Fault(f"{name}: {kind}", command, edited(name, edit)) for kind, edit in YAML.items()]
        faults += [Fault(f"{name}: {kind.__name__}", command, kind(name)) for kind in (without, folder, pipe)]
    command = ("recipe", "smoke", "--force")
    faults += [
        Fault(f"conf/params.yaml: {kind}", command, edited("conf/params.yaml", edit)) for kind, edit in YAML.items()
    ]
    faults += [Fault("conf/recipe/smoke.yaml: cut", command, put("conf/recipe/smoke.yaml", b"a: ["))]
    faults += [Fault(f"{name}: no conf", (name, *rest), without("conf")) for name, *rest in (("recipes",), command)]
    return faults


def data():
    """The source files of the dataset."""
    row = {"instruction": "Who?", "input": "", "output": "I am {{name}}."}
    rows = [
        b"", b"[", b"{}", b"[]", b"7", b"null", b'"x"', b"[7]", b"[null]", b"[[]]", b"[{}]", b"\xff\xfe\x00", b"[" * 100_000,
        json.dumps([{**row, "output": 7}]).encode(), json.dumps([{**row, "output": ""}]).encode(), json.dumps([{"instruction": "x"}]).encode(),
        json.dumps([{**row, "output": "\ud800"}]).encode(), json.dumps([{**row, "output": "{{nam}} {{name"}]).encode(),
        json.dumps([{"messages": []}]).encode(), json.dumps([{"messages": [{"role": "user", "content": "x"}]}]).encode(),
        json.dumps([{"messages": "x"}]).encode(), json.dumps([{"conversations": [{"from": "x", "value": "y"}]}]).encode(), b"[1" * 3, b'[{"a": NaN}]',
        b'[{"a": 1' + b"0" * 5000 + b"}]",
    ]  # fmt: skip
    faults = [Fault(f"{name}: {text[:40]!r}", ("replicate_data",), put(f"data/source/{name}", text))
              for name in SOURCES[:2] for text in rows]  # fmt: skip
    for name in SOURCES:
        faults += [Fault(f"{name}: {kind.__name__}", ("replicate_data",), kind(f"data/source/{name}")) for kind in (without, folder, pipe)]  # fmt: skip
        faults += [Fault(f"{name}: cut", ("replicate_data",), edited(f"data/source/{name}", cut))]
    return [*faults, Fault("no source folder", ("replicate_data",), without("data/source"))]


def environment():
    """Environment variables, for commands that need no torch."""
    faults = []
    for variables in (
        {"LOCAL_RANK": "0", "WORLD_SIZE": "x", "RANK": "0"}, {"LOCAL_RANK": "x", "WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "x"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "-1", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "7", "LOCAL_RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "9" * 5000, "RANK": "0", "LOCAL_RANK": "0"},
    ):  # fmt: skip
        faults += [Fault(f"train {str(variables)[:90]}", ("train",), variables=variables)]
    return faults


def limits():
    """Limits of the process: the size of a file, open files."""
    faults = [Fault(f"replicate_data: files of {size} bytes", ("replicate_data",), limits={resource.RLIMIT_FSIZE: size})
              for size in (0, 1, 100, 1000, 5000)]  # fmt: skip
    faults += [Fault("recipe: files of 100 bytes", ("recipe", "smoke", "--force"), limits={resource.RLIMIT_FSIZE: 100})]
    for command in (("replicate_data",), ("check",), ("recipe", "smoke", "--force"), ("recipes",), ("verify",), ("sign", "x"), ("summary",)):  # fmt: skip
        faults += [Fault(f"{command[0]}: {number} open files", command, limits={resource.RLIMIT_NOFILE: number}, statuses=(0, 1))
                   for number in (4, 5, 6)]  # fmt: skip
    return faults


# With a complete pipeline of the tiny model, and torch.


def artefacts():
    """Damaged artefacts, as the next stage, `verify` and `chat` meet them."""
    kinds = {"flipped": flip, "cut": cut, "empty": lambda _: b"", "longer": lambda data: data + b"x"}
    faults = []
    for name, file in READ.values():
        for target in (file, "manifest.json"):
            path = f"data/{name}/{target}"
            faults += [Fault(f"verify: {path} {kind}", ("verify",), edited(path, edit)) for kind, edit in kinds.items()]
            faults += [Fault(f"verify: {path} {change.__name__}", ("verify",), change(path)) for change in (without, folder, linked)]  # fmt: skip
        faults += [Fault(f"verify: data/{name} gone", ("verify",), without(f"data/{name}"))]
        faults += [Fault(f"verify: data/{name} has more", ("verify",), put(f"data/{name}/more", b"x"))]
    for stage, (name, file) in READ.items():
        for target in (file, "manifest.json"):
            path = f"data/{name}/{target}"
            faults += [Fault(f"{stage}: {path} {kind}", (stage,), edited(path, edit)) for kind, edit in kinds.items()]
            faults += [Fault(f"{stage}: {path} {change.__name__}", (stage,), change(path)) for change in (without, folder, pipe)]  # fmt: skip
        faults += [Fault(f"{stage}: data/{name} gone", (stage,), without(f"data/{name}"))]
        faults += [Fault(f"{stage}: data/{name} is a file", (stage,), lambda place, name=name: (without(f"data/{name}")(place), put(f"data/{name}", b"x")(place)))]  # fmt: skip
    return faults


def models():
    """A model that cannot be answered from, as `chat`, `serve` and `export` meet it."""
    faults = []
    for command in (("chat", "--once", "x", "--max-new-tokens", "2"), ("serve",), ("export", "internlm2")):
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "template.json"):
            path = f"data/model/{file}"
            edits = {"cut": cut, "empty": lambda _: b"", "a list": lambda _: b"[]", "not UTF-8": lambda _: b"\xff{}"}
            if command[0] == "export":
                edits = {"cut": cut}
            faults += [
                Fault(f"{command[0]}: {path} {kind}", command, edited(path, edit)) for kind, edit in edits.items()
            ]
            faults += [
                Fault(f"{command[0]}: {path} {change.__name__}", command, change(path))
                for change in (without, folder)
                if command[0] == "export" or (file, change) != ("tokenizer_config.json", without)
            ]  # fmt: skip  (it is not needed for an answer)
    return faults


def bases():
    """Files of a base: damaged, with checksums that do not match."""
    faults = []
    for file in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        path = f"tiny-base/{file}"
        faults += [
            Fault(f"stage_base: {path} {edit.__name__}", ("stage_base",), edited(path, edit)) for edit in (flip, cut)
        ]
        faults += [Fault(f"stage_base: {path} {change.__name__}", ("stage_base",), change(path)) for change in (without, folder, pipe)]  # fmt: skip
    return [*faults, Fault("stage_base: no folder", ("stage_base",), without("tiny-base"))]


def stores():
    """MLflow stores that do not work: `sync` needs one, a stage goes on without it."""
    faults = []
    wrong = ["http://127.0.0.1:9", "http://[::1", "foo://bar", "sqlite:////proc/nothing/y.db", "sqlite:///data", "http://", "https://127.0.0.1:9/x",
             "sqlite:///params.yaml", "postgresql://u:p@127.0.0.1:9/x", "/proc/nothing", "file:///proc/x", "http://\x1b[2J", "databricks", "sqlite://"]  # fmt: skip
    for store in wrong:
        variables = {"MLFLOW_TRACKING_URI": store, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        faults += [Fault(f"sync: {store}", ("sync",), variables=variables)]
    for name in ("data/dataset/manifest.json", "data/report/metrics.json", "data/checkpoint/history.jsonl"):
        faults += [Fault(f"sync: {name} cut", ("sync",), edited(name, cut))]
    faults += [Fault("sync: mlflow.db is no database", ("sync",), put("mlflow.db", b"x" * 5000))]
    return faults


def machine():
    """Limits and variables for the stages that compute."""
    faults = []
    for stage in STAGES[1:]:
        faults += [Fault(f"{stage}: files of {size} bytes", (stage,), limits={resource.RLIMIT_FSIZE: size}) for size in (0, 500)]  # fmt: skip
        faults += [Fault(f"{stage}: {number} open files", (stage,), limits={resource.RLIMIT_NOFILE: number}, statuses=(0, 1)) for number in (4, 8)]  # fmt: skip
    for value in ("gpu", "cuda", "\x1b[2J", "tpu", "cpu:9999", "-1"):
        for command in (("train",), ("chat", "--once", "x")):
            faults += [Fault(f"{command[0]}: REMINT_DEVICE={value!r}", command, variables={"REMINT_DEVICE": value})]
    for value in ("x", "-1", "1e3", "9" * 5000, "²"):
        faults += [Fault(f"train: REMINT_WORKERS={value[:9]!r}", ("train",), variables={"REMINT_WORKERS": value})]
    return faults


def signals():
    """Signals at random moments of a stage and of a chat. The status is the documented one."""
    chance, faults = random.Random(8), []
    for stage in STAGES:
        for number in (signal.SIGTERM, signal.SIGINT):
            statuses = (0, 128 + number, -number)
            faults += [Fault(f"{stage}: signal {number:d}", (stage,), signal=(number, chance.uniform(0.02, 0.5)), statuses=statuses, form=False)
                       for _ in range(3)]  # fmt: skip
    return faults


def commands():
    """A sample of the faults above as real commands, from the start of the interpreter on."""
    made = [
        Fault("no such command", ("fly",)), Fault("no params.yaml", ("check",), without("params.yaml")),
        Fault("no dvc.yaml", ("train",), without("dvc.yaml")),
        Fault("a rank that is no number", ("train",), variables={"LOCAL_RANK": "0", "WORLD_SIZE": "x"}),
        Fault("data that is cut", ("replicate_data",), edited("data/source/identity.json", cut)),
        Fault("no room", ("replicate_data",), limits={resource.RLIMIT_FSIZE: 1000}),
        Fault("a setting that is wrong", ("train", "train.lr=-1")),
    ]  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        for delay in (0.05, 0.2, 0.5, 1.0):
            made += [Fault(f"signal {number:d} after {delay} s", ("replicate_data",), signal=(number, delay), statuses=(0, 128 + number, -number), form=False)]  # fmt: skip
    return [Fault(**{**vars(fault), "real": True}) for fault in made]


LIGHT = {f.__name__: f for f in (settings, overrides, arguments, yaml_files, data, environment, limits)}
HEAVY = {f.__name__: f for f in (arguments_of_models, artefacts, models, bases, stores, machine, signals)}


@functools.cache
def every(kind):
    """The faults of one kind."""
    return {**LIGHT, **HEAVY, "commands": commands}[kind]()
