"""Merge the adapter into the base, prove that both give the same answers, and write a plain Hugging Face model."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from remint.compute import determinism
from remint.compute.packing import Document, cut, encode
from remint.core import manifest
from remint.core.declared import Declared
from remint.core.draft import artefact
from remint.core.errors import ArtefactError
from remint.core.files import read_object
from remint.core.log import Log
from remint.core.paths import Paths
from remint.core.settings import Runtime
from remint.model import loading, template
from remint.model.libraries import PeftModel
from remint.model.qlora import Quantization
from remint.model.quantization import quantize
from remint.stages.merge import provenance
from remint.stages.merge.card import card
from remint.stages.merge.proof import Closeness, closeness, logits_at_targets
from remint.stages.merge.settings import Merge
from remint.stages.merge.tensors import write_merged
from remint.weights import adapter, shards

_COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_PROOF_DOCUMENTS = 16


def run(runtime: Runtime, merge: Merge, paths: Paths, declared: Declared, log: Log) -> None:
    """Make the artefact `model`: safetensors, config, tokenizer, template, card, provenance, manifest with proof."""
    determinism.apply(runtime)
    base = manifest.verify(paths.base, "base")
    facts = manifest.verify(paths.adapter, "adapter")
    dataset = manifest.verify(paths.dataset, "dataset")
    if facts["origin"]["base"] != manifest.artefact_digest(paths.base, "base"):
        raise ArtefactError(f"{paths.adapter}: was made for another base than {paths.base}; run `dvc repro`")
    tensors, lora = adapter.read(paths.adapter)
    adapter.check_tensors(
        {name: tuple(t.shape) for name, t in tensors.items()}, shards.shapes(paths.base), lora, paths.adapter
    )
    adapter.check_finite(tensors, paths.adapter)
    dtype = None if merge.dtype == "base" else loading.TORCH_DTYPES[merge.dtype]
    quantization = Quantization(**facts["quantization"]) if merge.into == "dequantized" else None
    made_by = {**facts["made_by"], "merge": declared.record}
    with artefact(paths.model, "model", before_publishing=declared.check_unchanged) as (draft, made):
        size = write_merged(paths.base, tensors, lora, quantization, dtype, draft)
        _copy_config_and_tokenizer(paths, draft, merge.dtype)
        proof = _prove(paths, draft, quantization)
        _check_closeness(proof, merge, paths.model)
        (draft / "README.md").write_text(card(facts, base, asdict(merge), proof), encoding="utf-8")
        provenance.write(draft, base, dataset, made_by)
        made.update(
            origin=facts["origin"],
            made_by=made_by,
            license=base["license"],
            step=facts["step"],
            adapter=manifest.artefact_digest(paths.adapter, "adapter"),
            merge=asdict(merge),
            proof=asdict(proof),
            conditions=determinism.conditions(loading.device()),
        )
    log({f"merge_{name}": float(value) for name, value in asdict(proof).items()} | {"model_bytes": size})
    print(
        f"{paths.model}: {size / 1e6:.0f} MB; at {proof.agreement:.1%} of {proof.positions} positions "
        f"the same top token as base + adapter, mean divergence {proof.mean_divergence:.1e} nats"
    )


def _copy_config_and_tokenizer(paths: Paths, draft: Path, dtype: str) -> None:
    """Copy everything but the weights. The template comes from the adapter, which was trained with it."""
    for name in _COPIED:
        shutil.copyfile(paths.base / name, draft / name)
    template.load(paths.adapter).save(draft)
    if dtype != "base":
        config = read_object(draft / "config.json") | {"dtype": dtype}
        (draft / "config.json").write_text(manifest.dump_json(config), encoding="utf-8")


def _prove(paths: Paths, draft: Path, quantization: Quantization | None) -> Closeness:
    """Compare both models in fp32 on held-out conversations of both kinds. Only one model is in memory at a time."""
    documents = _documents(paths, draft)
    model = loading.load_model(paths.base, torch.float32, loading.device())
    if quantization is not None:
        quantize(model, Quantization(**{**asdict(quantization), "dequantize": "once"}))
    adapted: Any = PeftModel.from_pretrained(model, paths.adapter, local_files_only=True).eval()
    reference = logits_at_targets(adapted, documents)
    del model, adapted
    merged = loading.load_model(draft, torch.float32, loading.device())
    return closeness(reference, logits_at_targets(merged, documents))


def _documents(paths: Paths, draft: Path) -> list[Document]:
    """At most _PROOF_DOCUMENTS conversations, spread over the two held-out sets, cut to the model's positions."""
    rows: list[dict[str, Any]] = []
    for name in ("held_out", "control"):
        found = template.read_conversations(paths.dataset / f"{name}.jsonl")
        spread = max(1, len(found) // (_PROOF_DOCUMENTS // 2))
        rows += found[::spread][: _PROOF_DOCUMENTS // 2]
    documents = encode(loading.load_tokenizer(draft), template.load(draft), rows)
    return cut(documents, loading.positions(draft))


def _check_closeness(proof: Closeness, merge: Merge, target: Path) -> None:
    """Raise ArtefactError if the merged model differs more from base + adapter than the settings allow."""
    faults = []
    # `not <=` also refuses NaN, which compares false with everything.
    if not proof.mean_divergence <= merge.max_divergence:
        faults.append(
            f"{target}: mean divergence from base + adapter must be at most {merge.max_divergence}, "
            f"got {proof.mean_divergence:.3g}"
        )
    if not proof.agreement >= merge.min_agreement:
        faults.append(
            f"{target}: must rank the same token first as base + adapter at {merge.min_agreement:.1%} or more of the "
            f"positions, got {proof.agreement:.1%}"
        )
    if faults:
        raise ArtefactError(
            *(f"{fault}; try merge.dtype float32, or train longer if the top tokens are near-ties" for fault in faults)
        )
