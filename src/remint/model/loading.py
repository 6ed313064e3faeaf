"""Load a model and its tokenizer from a folder, and refuse what cannot be used before memory is taken."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from remint.core import settings
from remint.core.errors import ArtefactError, RemintError, SettingsError, got, no_room, one_line, out_of_memory
from remint.core.files import read_object

# A bar for each load of a model hides the bars that matter.
transformers_logging.disable_progress_bar()

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in settings.DTYPES}
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


def _foreign_code(config: Mapping[str, Any]) -> list[str]:
    flagged = [key for key in config if key in ("auto_map", "trust_remote_code", "custom_pipelines")]
    flagged += [key for key, value in config.items() if "attn_implementation" in key and "/" in str(value)]
    return flagged
