"""Put a LoRA adapter on a model (Hu et al. 2021)."""

from collections.abc import Iterable

from torch import nn

from remint.core.errors import SettingsError, got
from remint.model.libraries import LoraConfig, PeftModel, get_peft_model
from remint.model.qlora import Lora


def add_lora(model: nn.Module, settings: Lora) -> PeftModel:
    """Freeze the model and put a fresh adapter on it; B starts at zero, A from the current random state (fp32)."""
    check_targets(settings.targets, linears_by_suffix(model))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(settings.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def linears_by_suffix(model: nn.Module) -> set[str]:
    """Last parts of the names of all linear layers, quantized ones and the head included."""
    return {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def check_targets(targets: Iterable[str], known: set[str]) -> None:
    """Raise SettingsError for a LoRA target that the model does not have."""
    wrong = [target for target in targets if target not in known]
    if wrong:
        raise SettingsError(
            f"params: train.lora.targets: the base has no layer of that name, {got(wrong)}; choose from {', '.join(sorted(known))}"
        )
