"""Turn one checkpoint into a standard PEFT adapter that plain peft loads."""

from typing import Any

from remint.core import manifest
from remint.core.declared import Declared
from remint.core.draft import artefact
from remint.core.errors import ArtefactError, SettingsError, got
from remint.core.log import Log
from remint.core.paths import Paths
from remint.model import checkpoint_layout, loading, template
from remint.model.qlora import Lora
from remint.stages.convert.card import card
from remint.stages.convert.settings import Convert
from remint.weights import adapter, shards


def run(convert: Convert, paths: Paths, declared: Declared, log: Log) -> None:
    """Make the artefact `adapter`: adapter_model.safetensors, its config, template, model card, manifest."""
    facts = manifest.verify(paths.checkpoint, "checkpoint")
    manifest.verify(paths.base, "base")
    if facts["origin"]["base"] != manifest.artefact_digest(paths.base, "base"):
        raise ArtefactError(f"{paths.checkpoint}: was trained on another base than {paths.base}; run `dvc repro`")
    step = chosen_step(str(convert.checkpoint), facts["steps"])
    lora = Lora(**facts["lora"])
    stored = adapter.load(paths.checkpoint / checkpoint_layout.folder_name(step) / checkpoint_layout.TENSORS)
    dtype = loading.TORCH_DTYPES[convert.dtype]
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint_layout.adapter_tensors(stored).items()}
    adapter.check_tensors(
        {name: tuple(t.shape) for name, t in tensors.items()}, shards.shapes(paths.base), lora, paths.checkpoint
    )
    adapter.check_finite(tensors, paths.checkpoint)
    with artefact(paths.adapter, "adapter", before_publishing=declared.check_unchanged) as (draft, made):
        adapter.write(tensors, lora, facts["origin"]["base_name"], draft)
        template.load(paths.checkpoint).save(draft)
        (draft / "README.md").write_text(card(facts, step), encoding="utf-8")
        made.update(
            origin=facts["origin"],
            made_by={**facts["made_by"], "convert": declared.record},
            step=step,
            lora=facts["lora"],
            quantization=facts["quantization"],
            dtype=convert.dtype,
        )
    parameters = sum(tensor.numel() for tensor in tensors.values())
    log({"adapter_parameters": parameters, "adapter_step": step})
    print(f"{paths.adapter}: step {step}, {parameters / 1e6:.1f} M parameters in {len(tensors)} tensors")


def chosen_step(choice: str, steps: dict[str, Any]) -> int:
    """The step of `choice`: last, best or a number. Raises SettingsError if that step was not kept."""
    step = int(steps[choice]) if choice in ("last", "best") else int(choice)
    if step not in steps["kept"]:
        raise SettingsError(
            f"params: convert.checkpoint: that step was not kept, {got(choice)}; choose last, best or one of "
            f"{', '.join(map(str, steps['kept']))}"
        )
    return step
