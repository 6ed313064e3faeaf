"""Fetch, verify and store the base model in the layout that every later stage reads. Only this stage uses a network."""

import contextlib
import shutil
from pathlib import Path

from remint.core import manifest
from remint.core.declared import Declared
from remint.core.draft import artefact
from remint.core.errors import ArtefactError
from remint.core.lock import in_turn, is_awaited
from remint.core.log import Log
from remint.core.paths import SCRATCH, Paths
from remint.model import loading
from remint.model.template import Conversation
from remint.stages.stage_base import layout, sources, tokens
from remint.stages.stage_base.settings import Model


def run(model: Model, paths: Paths, declared: Declared, log: Log) -> None:
    """Make the artefact `base`: safetensors shards, config, fast tokenizer, chat template, manifest."""
    scratch = SCRATCH / "stage_base" / manifest.digest(sorted(model.files.items()))[:16]
    scratch.mkdir(parents=True, exist_ok=True)
    with in_turn(scratch / "lock", f"is fetching {model.name}"):
        writer = _stage(model, paths, declared, scratch / "files")
        if not is_awaited(scratch / "lock"):  # who waits uses the same files
            shutil.rmtree(scratch / "files", ignore_errors=True)
    with contextlib.suppress(OSError):
        scratch.rmdir()
    log({"base_parameters": writer.parameters})
    print(f"{paths.base}: {model.name}, {writer.parameters / 1e6:.0f} M parameters in {model.dtype}, verified")


def _stage(model: Model, paths: Paths, declared: Declared, files: Path) -> layout.Weights:
    """Fetch the source into `files` and write the artefact. Returns the writer, which has counted the parameters."""
    folder, gguf = sources.fetch(model, files)
    with artefact(paths.base, "base", before_publishing=declared.check_unchanged) as (draft, facts):
        config = layout.read_config(folder, gguf)
        tokenizer = layout.read_tokenizer(folder, gguf)
        unknown = tokens.missing_tokens(model.template, tokenizer)
        if unknown:
            raise ArtefactError(f"model.template: the tokenizer has no token {unknown}; correct conf/model/<name>.yaml")
        if spellable := tokens.spellable_tokens(model.template, tokenizer):
            raise ArtefactError(
                f"model.template: a text can spell the stop tokens {spellable}; mark them as special in tokenizer.json"
            )
        writer = layout.write_weights(
            folder, gguf, config, loading.TORCH_DTYPES[model.dtype], draft, model.shard_mb * 2**20
        )
        layout.write_config(config, model, draft)
        layout.write_tokenizer(tokenizer, folder, draft)
        Conversation(model.template, system="").save(draft)
        layout.check_staged(draft, tokenizer)
        facts.update(
            name=model.name,
            made_by={"stage_base": {"settings": declared.settings}},
            license=model.license,
            dtype=model.dtype,
            parameters=writer.parameters,
            source={"kind": model.source, "location": layout.public_name(model), "revision": model.revision},
            source_files=dict(model.files),
        )
    return writer
