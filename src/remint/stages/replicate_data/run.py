"""Make the training, held-out and control sets from the source files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np

from remint.core import manifest
from remint.core.declared import Declared
from remint.core.draft import artefact
from remint.core.errors import DataError, RemintError, got, listed
from remint.core.log import Log
from remint.core.paths import Paths
from remint.identity import Identity
from remint.stages.replicate_data import formats, records, split
from remint.stages.replicate_data.records import Record
from remint.stages.replicate_data.settings import ReplicateData

# A progress bar for each small file would only be noise.
datasets.disable_progress_bars()

# The settings that name source files, each with the kind of its records.
_USES = {"identity": "identity", "identity_held_out": "identity", "control": "control", "control_held_out": "control"}


def run(
    seed: int, identity: Identity, replicate_data: ReplicateData, paths: Paths, declared: Declared, log: Log
) -> None:
    """Make the artefact `dataset`: train.jsonl (replicated, shuffled), held_out.jsonl, control.jsonl, manifest."""
    settings = replicate_data
    faults: list[str] = []
    loaded: dict[str, list[Record]] = {}
    for use, kind in _USES.items():
        try:
            loaded[use] = _load(getattr(settings, use), kind, identity, paths.source)
        except RemintError as error:
            faults += error.faults
    if faults:
        raise DataError(*listed(faults))
    train, held_out = split.held_out_by_share(loaded["identity"], settings.identity_held_out_share, seed)
    held_out += loaded["identity_held_out"]
    if not held_out:
        raise DataError(
            f"params: replicate_data.identity_held_out_share: holds out none of {len(train)} identity records, "
            f"{got(settings.identity_held_out_share)}; raise it or write more records"
        )
    control, control_held_out = split.held_out_by_share(loaded["control"], settings.control_held_out_share, seed)
    control_held_out += loaded["control_held_out"]
    split.check_disjoint([*train, *control], [*held_out, *control_held_out])
    copies = [(len(train), settings.identity_copies), (len(control), settings.control_copies)]
    order = split.replicated_order(copies, seed)
    with artefact(paths.dataset, "dataset", before_publishing=declared.check_unchanged) as (draft, facts):
        _write([*train, *control], order, draft / "train.jsonl")
        _write(held_out, range(len(held_out)), draft / "held_out.jsonl")
        _write(control_held_out, range(len(control_held_out)), draft / "control.jsonl")
        facts.update(
            identity=asdict(identity),
            made_by={"replicate_data": {"settings": declared.settings}},
            sources={name: manifest.file_digest(Path(name)) for use in loaded for name in getattr(settings, use)},
            train={
                "rows": len(order),
                "identity": _counts(train, copies[0][1]),
                "control": _counts(control, copies[1][1]),
            },
            held_out=_counts(held_out, 1),
            control=_counts(control_held_out, 1),
        )
    log({"train_rows": len(order), "held_out_records": len(held_out), "control_records": len(control_held_out)})
    print(
        f"{paths.dataset}: {len(order)} training rows ({len(train)} identity records × {copies[0][1]}, "
        f"{len(control)} control records × {copies[1][1]}), "
        f"{len(held_out)} held-out identity questions, {len(control_held_out)} held-out control prompts"
    )


def _load(names: Sequence[str], kind: str, identity: Identity, source: Path) -> list[Record]:
    found: list[Record] = []
    faults: list[str] = []
    for name in names:
        try:
            if source not in Path(name).parents or ".." in Path(name).parts or _leads_outside(Path(name), source):
                raise DataError(f"{name}: must be in {source}, where DVC tracks changes; move the file there")
            found += records.build(formats.read(Path(name)), kind, identity, name)
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError(*faults)
    return found


def _leads_outside(path: Path, source: Path) -> bool:
    """Whether a link leads out of the source folder. A link that leads nowhere is reported when the file is read."""
    try:
        return not path.resolve().is_relative_to(source.resolve())
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a link that leads back to itself
        return False


def _write(unique: Sequence[Record], order: Sequence[int] | np.ndarray, path: Path) -> None:
    """Write the rows in the given order. Each record is serialised once, and its line is written for each copy."""
    if not unique:
        path.touch()
        return
    datasets.Dataset.from_list([record.row() for record in unique]).to_json(path, force_ascii=False)
    lines = path.read_bytes().split(b"\n")  # not splitlines: it also splits at characters that JSON does not escape
    with path.open("wb") as file:
        file.writelines(lines[index] + b"\n" for index in order)


def _counts(chosen: Sequence[Record], copies: int) -> dict[str, object]:
    return {
        "records": len(chosen),
        "copies": copies,
        "languages": dict(sorted(Counter(r.language for r in chosen).items())),
    }
