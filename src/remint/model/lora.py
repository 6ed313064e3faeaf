"""Add a LoRA adapter to a model (Hu et al. 2021)."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from remint.core.errors import SettingsError, got
from remint.model.libraries import LoraConfig, PeftModel, get_peft_model
from remint.model.qlora import Lora


def add_lora(model: nn.Module, settings: Lora) -> PeftModel:
    """Freeze the model and add a new adapter in fp32. B starts at zero; A is drawn from the current random state.

    Raises SettingsError if a target is not a linear layer of the model.
    """
    check_targets(settings.targets, linears_by_suffix(model))
    return get_peft_model(model, peft_config(settings), autocast_adapter_dtype=True)


def peft_config(settings: Lora, **more: Any) -> LoraConfig:
    """PEFT's configuration for these settings, with `more` of its own fields."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(settings.targets),
        bias="none",
        task_type="CAUSAL_LM",
        **more,
    )


def linears_by_suffix(model: nn.Module) -> set[str]:
    """Last parts of the names of all linear layers, including quantized layers and the head."""
    return {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def check_targets(targets: Iterable[str], known: set[str]) -> None:
    """Raise SettingsError that lists the LoRA targets that the model does not have."""
    wrong = [target for target in targets if target not in known]
    if wrong:
        raise SettingsError(
            f"params: train.lora.targets: the base has no layer of that name, {got(wrong)}; "
            f"choose from {', '.join(sorted(known))}"
        )
