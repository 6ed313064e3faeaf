"""Exports the merged model in the layout of its base, for tools that require it."""

import shutil
from pathlib import Path
from typing import Any

from remint.core import manifest
from remint.core.draft import artefact
from remint.core.files import read_object
from remint.model import loading, template
from remint.weights import internlm2, shards

_TOKENIZER = "tokenizer.model"
_SHARD_BYTES = 2000 * 2**20


def to_internlm2(model: Path, base: Path, target: Path) -> None:
    """Write `model` as the artefact `export`: fused safetensors, InternLM2's config and tokenizer files.

    tokenizer.model is copied from `base` if the model was made from that base and the base contains the file.
    """
    facts = manifest.verify(model, "model")
    config = read_object(model / "config.json")
    kept = _tokenizer_model(facts, base)
    made = internlm2.own_config(config)
    with artefact(target, "export") as (draft, about):
        writer = shards.Writer(draft, _SHARD_BYTES)
        parts = (part for path in shards.files(model) for part in shards.tensors(path))
        for name, tensor in internlm2.from_llama(parts, config):
            writer.add(name, tensor)
        writer.close()
        (draft / "config.json").write_text(manifest.dump_json(made), encoding="utf-8")
        shutil.copyfile(model / "generation_config.json", draft / "generation_config.json")
        _write_tokenizer(model, kept, draft)
        about.update(layout="internlm2", model=manifest.artefact_digest(model, "model"))
    print(
        f"{target}: {writer.total / 1e6:.0f} MB in InternLM2's layout, {'with' if kept else 'without'} {_TOKENIZER}; "
        "a tool that runs InternLM2's own code needs its .py files in the same folder"
    )


def _tokenizer_model(facts: dict[str, Any], base: Path) -> Path | None:
    """The base's SentencePiece model; None if it has none or if the model was made from another base."""
    path = base / _TOKENIZER
    if not path.is_file() or facts["origin"]["base"] != manifest.artefact_digest(base, "base"):
        return None
    manifest.verify(base, "base")
    return path


def _write_tokenizer(model: Path, kept: Path | None, draft: Path) -> None:
    """Write `kept`, the SentencePiece model, for InternLM2's own tokenizer. Without it, copy the fast tokenizer."""
    if kept is None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(model / name, draft / name)
    else:
        shutil.copyfile(kept, draft / _TOKENIZER)
        content = internlm2.tokenizer_config(loading.load_tokenizer(model))
        (draft / "tokenizer_config.json").write_text(manifest.dump_json(content), encoding="utf-8")
    template.load(model).save(draft)
