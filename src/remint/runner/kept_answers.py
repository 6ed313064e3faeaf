"""The base's own answers as a file under version control: with it, every machine trains on the same answers."""

import json
import os
from pathlib import Path

from remint.core import manifest
from remint.core.errors import ArtefactError
from remint.core.files import read_object, read_rows
from remint.core.paths import Paths

_ROWS = "base_answers.jsonl"


def keep(paths: Paths, file: Path) -> None:
    """Write the answers in the artefact `checkpoint` to `file`, one per line, with the digest of their base.

    Raises ArtefactError if no record held the model to the base, or if the file is something else than such answers.
    """
    facts = manifest.verify(paths.checkpoint, "checkpoint")
    if "base_answers" not in facts:
        raise ArtefactError(
            f"{paths.checkpoint}: holds no answers of the base, because no record held the model to it; name files in "
            "replicate_data.control_base and train"
        )
    if os.path.lexists(file) and not {"base", "answers"} <= read_object(file, "name another file").keys():
        raise ArtefactError(f"{file}: is not a file of answers, and it would be lost; name another file")
    rows = read_rows(paths.checkpoint / _ROWS)
    head = {"base": facts["base_answers"]["base"], "base_name": facts["origin"]["base_name"]}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    draft = file.with_name(f".{file.name}.draft")
    file.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(f'{json.dumps(head, ensure_ascii=False)[:-1]}, "answers": [\n{lines}\n]}}\n', encoding="utf-8")
    draft.replace(file)
    print(f"{file}: {len(rows)} answers of {head['base_name']}; set replicate_data.base_answers to this file")
