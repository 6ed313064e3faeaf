"""Make the training, held-out and control sets from the source files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
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
from remint.stages.replicate_data import base_answers, formats, records, split
from remint.stages.replicate_data.base_answers import BaseAnswers
from remint.stages.replicate_data.overlap import near_duplicates
from remint.stages.replicate_data.records import Record
from remint.stages.replicate_data.settings import ReplicateData

# A progress bar for each small file would only be noise.
datasets.disable_progress_bars()

# The settings that name source files, each with the kind of its records.
_USES = {
    "identity": "identity",
    "identity_held_out": "identity",
    "control": "control",
    "control_base": "control",
    "control_held_out": "control",
}


def run(
    seed: int, identity: Identity, replicate_data: ReplicateData, paths: Paths, declared: Declared, log: Log
) -> None:
    """Make the artefact `dataset`: train.jsonl (replicated, shuffled), held_out.jsonl, control.jsonl, manifest."""
    settings = replicate_data
    loaded, answers = _read_sources(settings, identity, paths.source)
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
    near = near_duplicates([*train, *control], [*held_out, *control_held_out])
    copies = [(len(train), settings.identity_copies), (len(control), settings.control_copies)]
    order = split.replicated_order(copies, seed)
    with artefact(paths.dataset, "dataset", before_publishing=declared.check_unchanged) as (draft, facts):
        _write(_training_rows([*train, *control], answers), order, draft / "train.jsonl")
        _write([record.row() for record in held_out], range(len(held_out)), draft / "held_out.jsonl")
        _write([record.row() for record in control_held_out], range(len(control_held_out)), draft / "control.jsonl")
        facts.update(
            identity=asdict(identity),
            made_by={"replicate_data": {"settings": declared.settings}},
            sources={name: manifest.file_digest(Path(name)) for name in _sources(settings)},
            train={
                "rows": len(order),
                "identity": _counts(train, copies[0][1]),
                "control": _counts(control, copies[1][1]),
            },
            near_duplicates=[
                {
                    "held_out": found.held_out.origin,
                    "trained": found.trained.origin,
                    "similarity": round(found.similarity, 3),
                }
                for found in near
            ],
            held_out=_counts(held_out, 1),
            control=_counts(control_held_out, 1),
            **({"base_answers": {"base": answers.base}} if answers else {}),
        )
    if near:
        most = max(near, key=lambda found: found.similarity)
        print(
            f"warning: {len(near)} held-out questions are nearly the same as a question that is trained on, so they measure "
            f"memory: {most.held_out.origin} and {most.trained.origin}, …; reword them, or leave out the training records"
        )
    log({"train_rows": len(order), "held_out_records": len(held_out), "control_records": len(control_held_out)})
    print(
        f"{paths.dataset}: {len(order)} training rows ({len(train)} identity records × {copies[0][1]}, "
        f"{len(control)} control records × {copies[1][1]}), "
        f"{len(held_out)} held-out identity questions, {len(control_held_out)} held-out control prompts"
    )


def _read_sources(
    settings: ReplicateData, identity: Identity, source: Path
) -> tuple[dict[str, list[Record]], BaseAnswers | None]:
    """The records of each setting that names files, those of control_base as part of control, and the known answers.

    Raises DataError that lists the faults of all files.
    """
    faults: list[str] = []
    loaded: dict[str, list[Record]] = {use: [] for use in _USES}
    answers = None
    for use, kind in _USES.items():
        for name in getattr(settings, use):
            try:
                loaded[use] += load(name, kind, identity, source, answered=use != "control_base")
            except RemintError as error:
                faults += error.faults
    if settings.base_answers is not None:
        try:
            _check_source(settings.base_answers, source)
            answers = base_answers.read(Path(settings.base_answers))
        except RemintError as error:
            faults += error.faults
    if faults:
        raise DataError(*listed(faults))
    loaded["control"] += [replace(record, is_held=True) for record in loaded.pop("control_base")]
    base_answers.check(loaded["control"], answers)
    return loaded, answers


def load(name: str, kind: str, identity: Identity, source: Path, answered: bool = True) -> list[Record]:
    """The records of one file in the source folder. Raises DataError that lists its faults."""
    _check_source(name, source)
    return records.build(formats.read(Path(name), answered), kind, identity, name)


def _sources(settings: ReplicateData) -> list[str]:
    """All files that the settings name."""
    return [name for use in _USES for name in getattr(settings, use)] + [
        name for name in [settings.base_answers] if name is not None
    ]


def _check_source(name: str, source: Path) -> None:
    if source not in Path(name).parents or ".." in Path(name).parts or _leads_outside(Path(name), source):
        raise DataError(f"{name}: must be in {source}, where DVC tracks changes; move the file there")


def _leads_outside(path: Path, source: Path) -> bool:
    """Whether a link leads out of the source folder. A link that leads nowhere is reported when the file is read."""
    try:
        return not path.resolve().is_relative_to(source.resolve())
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a link that leads back to itself
        return False


def _training_rows(records: Sequence[Record], answers: BaseAnswers | None) -> list[dict[str, object]]:
    """The rows of the training set. If the model is held to the base in one, each has the fields that say where.

    `target` is "reference" or "base". `base_answer` is the base's answer if it is known.
    """
    rows = [record.row() for record in records]
    if any(record.is_held for record in records):
        for record, row in zip(records, rows, strict=True):
            found = answers.of(record) if answers and record.is_held else None
            row |= {"target": "base" if record.is_held else "reference", "base_answer": found and asdict(found)}
    return rows


def _write(unique: Sequence[dict[str, object]], order: Sequence[int] | np.ndarray, path: Path) -> None:
    """Write the rows in the given order. Each record is serialised once, and its line is written for each copy."""
    if not unique:
        path.touch()
        return
    datasets.Dataset.from_list(list(unique)).to_json(path, force_ascii=False)
    lines = path.read_bytes().split(b"\n")  # not splitlines: it also splits at characters that JSON does not escape
    with path.open("wb") as file:
        file.writelines(lines[index] + b"\n" for index in order)


def _counts(chosen: Sequence[Record], copies: int) -> dict[str, object]:
    return {
        "records": len(chosen),
        "copies": copies,
        "languages": dict(sorted(Counter(r.language for r in chosen).items())),
    }
