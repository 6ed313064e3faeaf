"""Ask base and merged model the same held-out questions, compute the metrics and write a readable report."""

import csv
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from remint.compute import determinism
from remint.compute.generation import answer_all
from remint.compute.loss import SupervisedLoss, mean_loss
from remint.compute.packing import cut, encode
from remint.core import manifest
from remint.core.declared import Declared
from remint.core.draft import artefact
from remint.core.errors import SettingsError, brief, got
from remint.core.files import read_rows
from remint.core.log import Log
from remint.core.paths import Paths
from remint.core.settings import Runtime
from remint.identity import Identity
from remint.model import loading, template
from remint.model.template import Conversation
from remint.stages.eval_chat import report
from remint.stages.eval_chat.scores import MODELS, Answered, marks, summarise
from remint.stages.eval_chat.settings import EvalChat

# The held-out loss must not depend on how training was packed, so its rows have their own fixed length.
_LOSS_LENGTH = 2048
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
    _check_positions(paths.model, conversation, [row for _, row in records], eval_chat)
    answers, losses = {}, {}
    for name, folder in (("base", paths.base), ("merged", paths.model)):
        answers[name], losses[name] = _ask(name, folder, conversation, records, eval_chat)
    rows = [_answered(row, base, merged) for (_, row), base, merged in zip(records, *answers.values(), strict=True)]
    metrics = summarise(rows, identity, losses)
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
            conditions=determinism.conditions(loading.device()),
        )
    log(dict(manifest.flat(metrics)))
    print(report.headline(metrics, paths.report))


def _check_positions(
    folder: Path, conversation: Conversation, rows: Sequence[dict[str, Any]], settings: EvalChat
) -> None:
    """Raise SettingsError if a prompt and its answer are longer than the positions that the model was made for."""
    tokenizer, positions = loading.load_tokenizer(folder), loading.positions(folder)
    lengths = [len(conversation.prompt(tokenizer, row["messages"][:-1])) for row in rows]
    longest = max(lengths, default=0)
    if longest + settings.max_new_tokens <= positions:
        return
    question = rows[lengths.index(longest)]["messages"][-2]["content"]
    cure = f"lower it to {positions - longest}" if longest < positions else "shorten that question"
    raise SettingsError(
        f"params: eval_chat.max_new_tokens: a question and its answer must fit into the {positions} positions of the "
        f"model, {got(settings.max_new_tokens)} for the question of {longest} tokens {brief(question)}; {cure}"
    )


def _ask(
    name: str,
    folder: Path,
    conversation: Conversation,
    records: Sequence[tuple[str, dict[str, Any]]],
    settings: EvalChat,
) -> tuple[list[str], dict[str, float]]:
    """One model's answers to all records, and its loss on the reference answers of each set. Computed in fp32."""
    tokenizer = loading.load_tokenizer(folder)
    model = loading.load_model(folder, torch.float32, loading.device())
    histories = [row["messages"][:-1] for _, row in records]
    with tqdm(total=len(records), unit="answer", desc=f"eval_chat: {name}", dynamic_ncols=True) as bar:
        answers = answer_all(
            model,
            tokenizer,
            conversation,
            histories,
            settings.max_new_tokens,
            settings.batch,
            lambda n: bar.update(n),
            unfinished="…",
        )
    longest = min(_LOSS_LENGTH, model.config.max_position_embeddings)
    losses = {
        kind: mean_loss(
            SupervisedLoss(model),
            cut(encode(tokenizer, conversation, [row for use, row in records if use == kind]), longest),
            _LOSS_LENGTH,
        )
        for kind in ("held_out", "control")
    }
    del model
    gc.collect()
    return answers, losses


def _answered(row: dict[str, Any], base: str, merged: str) -> Answered:
    *history, answer = row["messages"]
    prompt = "\n".join(message["content"] for message in history if message["role"] == "user")
    return Answered(
        prompt=prompt,
        kind=row["kind"],
        language=row["language"],
        expects=tuple(row["expects"]),
        accept=tuple(row["accept"]),
        reference=answer["content"],
        base=base,
        merged=merged,
    )


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
