"""Load a base, quantize it as QLoRA does, put LoRA on it. The only module that knows transformers' and peft's calls."""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from remint.core import config
from remint.core.errors import ArtefactError, RemintError, SettingsError, got, no_room, one_line, out_of_memory
from remint.core.files import read_object
from remint.libraries import (
    Linear4bit,
    LoraConfig,
    Params4bit,
    PeftModel,
    dequantize_4bit,
    get_peft_model,
    quantize_4bit,
)
from remint.qlora import Lora, Quantization

# A bar for each load of a model hides the bars that matter.
transformers_logging.disable_progress_bar()
# Of peft's making: users can do nothing about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in config.DTYPES}
# Architectures whose code is in transformers and whose layers the stages were tried with. Others may well work:
# add the name and run `make recipe NAME=smoke && make repro` with such a model.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_MOST_LAYERS = 1000
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def device() -> torch.device:
    """Where to compute: $REMINT_DEVICE if set, else the first GPU, else the CPU. Never a declared setting."""
    choice = os.environ.get("REMINT_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if choice not in ("cpu", "cuda"):
        raise SettingsError(f"REMINT_DEVICE: must be cpu or cuda, {got(choice)}; unset it to take what there is")
    if choice == "cuda" and not torch.cuda.is_available():
        raise SettingsError("REMINT_DEVICE: no GPU that torch can use, got 'cuda'; unset it to compute on the CPU")
    return torch.device(choice)


def check_config(folder: Path) -> None:
    """Refuse a config.json that asks for foreign code or an architecture nobody tried. Raises ArtefactError."""
    path = folder / "config.json"
    check_content(read_object(path, "the folder must hold a Hugging Face model"), path)


def check_content(config: Mapping[str, Any], path: Path) -> None:
    """The same for what stands in the file at `path`."""
    faults = [f"{path}: asks for foreign code in {key!r}; remove the field" for key in _foreign_code(config)]
    kind, layers = config.get("model_type"), config.get("num_hidden_layers", 0)
    if kind not in ARCHITECTURES:
        faults.append(f"{path}: model_type must be one of {', '.join(ARCHITECTURES)}, {got(kind)}; choose another base")
    if config.get("quantization_config"):
        faults.append(
            f"{path}: must be of full precision, got a quantization_config; get the weights that it was made from"
        )
    # Each layer is made as an object before any size can be compared, so a wild number would never come to an end.
    if type(layers) is not int or layers > _MOST_LAYERS:
        faults.append(
            f"{path}: num_hidden_layers must be a number up to {_MOST_LAYERS}, {got(layers)}; get the file again"
        )
    if faults:
        raise ArtefactError(*faults)


@contextlib.contextmanager
def understood(where: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers and tokenizers raise about a file that they cannot read into an ArtefactError."""
    try:
        yield
    except Exception as error:  # they raise what comes to hand: KeyError, AssertionError, a bare Exception from Rust
        if isinstance(error, RemintError) or out_of_memory(error) or no_room(error):
            raise
        raise ArtefactError(f"{where}: {what} ({one_line(error)}); get it again from where it came from") from error


def load_tokenizer(folder: Path, gguf: str | None = None) -> Any:
    """The tokenizer of an artefact or, with `gguf`, of that file in the folder. Raises ArtefactError if it cannot be used."""
    for name in _TOKENIZER_FILES:
        if gguf is None and (folder / name).exists():
            read_object(folder / name, "get the file again")
    with understood(folder, "has no tokenizer that can be read; tokenizer.json must hold one"):
        found = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False, local_files_only=True)
        # Some of its settings are looked at only when it is used, one of them for a token that it does not know.
        found.decode(found.encode("a", add_special_tokens=False))
        found.convert_tokens_to_ids("no token of anybody's")
    return found


def load_model(folder: Path, dtype: torch.dtype, where: torch.device) -> Any:
    """A causal language model in `dtype`, every tensor found and none left over. Raises ArtefactError otherwise."""
    described = sum(parameter.numel() for parameter in empty_model(folder).parameters())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # A parameter takes a byte at the least. What is missing would be allocated before it is told.
    if described > stored:
        raise ArtefactError(
            f"{folder}: config.json describes {described} parameters, the weights have {stored} bytes; get them again"
        )
    with understood(folder, "holds no model that can be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    faults = [f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, names))}" for kind, names in info.items() if names]
    if faults:
        raise ArtefactError(*(f"{fault}; the weights do not fit config.json, get them again" for fault in faults))
    return model.to(where).eval()


def empty_model(folder: Path) -> Any:
    """The model that config.json describes, with shapes but without weights."""
    check_config(folder)
    with understood(folder / "config.json", "describes no model that can be built"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantized and may be adapted: all but the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def dequantized(weight: torch.Tensor, settings: Quantization) -> torch.Tensor:
    """The weight as QLoRA's forward pass sees it: rounded to 4 bits and back, same shape and dtype."""
    if settings.kind == "none":
        return weight
    packed, state = quantize_4bit(
        weight, blocksize=settings.block_size, compress_statistics=settings.double, quant_type=settings.kind
    )
    return dequantize_4bit(packed, state).to(weight.dtype)


@torch.no_grad()
def quantize(model: nn.Module, settings: Quantization) -> None:
    """Quantize every linear layer but the head, in place.

    `once` keeps the rounded weights at full precision: the very values that 4-bit layers compute with, without
    unpacking them for each product. `each_use` keeps 4 bits in memory.
    """
    if settings.kind == "none":
        return
    for name, layer in linears(model).items():
        if settings.dequantize == "once":
            layer.weight.copy_(dequantized(layer.weight, settings))
        else:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _linear_4bit(layer, settings))


def _linear_4bit(layer: nn.Linear, settings: Quantization) -> nn.Module:
    where, dtype = layer.weight.device, layer.weight.dtype
    packed = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        compress_statistics=settings.double,
        quant_type=settings.kind,
        device="meta",
    )
    packed.weight = Params4bit(
        layer.weight.detach().clone(),
        requires_grad=False,
        blocksize=settings.block_size,
        compress_statistics=settings.double,
        quant_type=settings.kind,
        module=packed,
    )._quantize(where)
    packed.bias = layer.bias
    # On CPUs with AVX512-BF16 an evaluation would repack the weights with a loss and training would go on with that.
    packed.support_avx512bf16_for_cpu = False
    return packed


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


def _foreign_code(config: Mapping[str, Any]) -> list[str]:
    flagged = [key for key in config if key in ("auto_map", "trust_remote_code", "custom_pipelines")]
    flagged += [key for key, value in config.items() if "attn_implementation" in key and "/" in str(value)]
    return flagged
