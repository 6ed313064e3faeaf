"""Ask base and merged model the same held-out questions, compute the metrics and write a readable report."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remint.compute import determinism
from remint.core import manifest
from remint.core.declared import Declared
from remint.core.draft import artefact
from remint.core.files import read_rows
from remint.core.log import Log
from remint.core.paths import Paths
from remint.core.settings import Runtime
from remint.identity import Identity
from remint.model import loading, template
from remint.stages.eval_chat import report
from remint.stages.eval_chat.asking import answered, ask, check_positions
from remint.stages.eval_chat.scores import MODELS, Answered, counts, marks, summarise
from remint.stages.eval_chat.settings import EvalChat
from remint.stages.eval_chat.verdict import findings, in_words

_CURVES = ("step", "loss", "held_out_loss", "lr")


def run(runtime: Runtime, eval_chat: EvalChat, paths: Paths, declared: Declared, log: Log) -> None:
    """Make the artefact `report`: metrics.json, curves.csv, transcript.jsonl, report.html, manifest."""
    determinism.apply(runtime)
    facts = manifest.verify(paths.model, "model")
    identity = Identity(**manifest.verify(paths.dataset, "dataset")["identity"])
    manifest.verify(paths.base, "base")
    checkpoint = manifest.verify(paths.checkpoint, "checkpoint")
    records = [
        (name, row)
        for name in ("held_out", "control")
        for row in template.read_conversations(paths.dataset / f"{name}.jsonl")
    ]
    # Both models get the same chat template, so only the model can make their answers differ.
    conversation = template.load(paths.model)
    check_positions(paths.model, conversation, [row for _, row in records], eval_chat)
    base = ask("base", paths.base, conversation, records, eval_chat)
    merged = ask("merged", paths.model, conversation, records, eval_chat, base.said)
    rows = [answered(row, *answers) for (_, row), *answers in zip(records, base.answers, merged.answers, strict=True)]
    metrics = summarise(rows, identity, {"base": base.losses, "merged": merged.losses}, merged.divergence)
    words = in_words(findings(counts(rows, identity), metrics.get("divergence")))
    history = read_rows(paths.checkpoint / "history.jsonl")
    with artefact(paths.report, "report", before_publishing=declared.check_unchanged) as (draft, made):
        (draft / "metrics.json").write_text(manifest.dump_json(metrics), encoding="utf-8")
        _write_curves(history, draft / "curves.csv")
        _write_transcript(rows, identity, draft / "transcript.jsonl")
        samples = read_rows(paths.checkpoint / "samples.jsonl")
        page = report.render(report.Content(identity, metrics, rows, history, samples, facts, checkpoint))
        (draft / "report.html").write_text(page, encoding="utf-8")
        made.update(
            fingerprint=declared.fingerprint,
            made_by={"eval_chat": declared.record},
            model=manifest.artefact_digest(paths.model, "model"),
            findings=words,
            conditions=determinism.conditions(loading.device()),
        )
    log(dict(manifest.flat(metrics)))
    print(report.headline(metrics, paths.report))
    print("\n".join(words))


def _write_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _CURVES, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def _write_transcript(rows: Sequence[Answered], identity: Identity, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            marked = {f"{model}_{mark}": on for model in MODELS for mark, on in marks(row, model, identity).items()}
            file.write(json.dumps({**vars(row), **marked}, ensure_ascii=False) + "\n")
