"""Load a model and its tokenizer from a folder, and refuse unusable files before memory is allocated."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from remint.core import settings
from remint.core.errors import ArtefactError, RemintError, SettingsError, got, lacks_space, one_line, out_of_memory
from remint.core.files import read_object
from remint.model import description

# A progress bar for each model load would hide the bars that matter.
transformers_logging.disable_progress_bar()

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in settings.DTYPES}
# Architectures that transformers implements and that the stages were tested with. Others may work, too: add the name
# and run `make recipe NAME=smoke && make repro` with such a model.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",  # with merges.txt, read if there is no tokenizer.json
)


def device() -> torch.device:
    """Where to compute: $REMINT_DEVICE if set, else the first GPU, else the CPU. It is never a setting in params.yaml.

    Raises SettingsError if $REMINT_DEVICE is unknown or torch cannot use a GPU.
    """
    choice = os.environ.get("REMINT_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if choice not in ("cpu", "cuda"):
        raise SettingsError(f"REMINT_DEVICE: must be cpu or cuda, {got(choice)}; unset it to use a GPU if there is one")
    if choice == "cuda" and not torch.cuda.is_available():
        raise SettingsError("REMINT_DEVICE: no GPU that torch can use, got 'cuda'; unset it to compute on the CPU")
    return torch.device(choice)


def check_config(folder: Path) -> None:
    """Refuse a config.json that requests custom code or an untested architecture. Raises ArtefactError."""
    path = folder / "config.json"
    check_content(read_object(path, "the folder must hold a Hugging Face model"), path)


def check_content(config: Mapping[str, Any], path: Path) -> None:
    """Like `check_config`, for the content of the file at `path`."""
    faults = [f"{path}: requests custom code in {key!r}; remove the field" for key in _foreign_code(config)]
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        faults.append(f"{path}: model_type must be one of {', '.join(ARCHITECTURES)}, {got(kind)}; choose another base")
    if config.get("quantization_config"):
        faults.append(
            f"{path}: must not be quantized, got a quantization_config; get the original full-precision weights"
        )
    # Each layer becomes an object before any size can be compared, so a huge number would run without end.
    faults += [f"{path}: {fault}; get the file again" for fault in description.faults(config)]
    if faults:
        raise ArtefactError(*faults)


def positions(folder: Path) -> int:
    """The longest sequence of tokens that the model in `folder` was made for. Raises ArtefactError."""
    path = folder / "config.json"
    content = read_object(path)
    check_content(content, path)
    return int(content["max_position_embeddings"])


@contextlib.contextmanager
def explaining_errors(where: Path, what: str) -> Iterator[None]:
    """Turn any exception of transformers or tokenizers about an unreadable file into an ArtefactError.

    Its message starts with `where` and `what`. Our own errors, a lack of memory and a full disk pass through unchanged.
    """
    try:
        yield
    except Exception as error:  # they raise many kinds: KeyError, AssertionError, a bare Exception from Rust
        if isinstance(error, RemintError) or out_of_memory(error) or lacks_space(error):
            raise
        raise ArtefactError(f"{where}: {what} ({one_line(error)}); get it again from its source") from error


def load_tokenizer(folder: Path, gguf: str | None = None) -> Any:
    """The tokenizer of an artefact or, with `gguf`, of that GGUF file in the folder.

    Raises ArtefactError if it cannot be used.
    """
    for name in _TOKENIZER_FILES:
        if gguf is None and os.path.lexists(folder / name):
            read_object(folder / name, "get the file again")
    with explaining_errors(folder, "has no tokenizer that can be read, tokenizer.json must hold one"):
        found = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False, local_files_only=True)
        # Some settings are checked only on use, one of them only for an unknown token.
        found.decode(found.encode("a", add_special_tokens=False))
        found.convert_tokens_to_ids("a token of no vocabulary")
    return found


def load_model(folder: Path, dtype: torch.dtype, where: torch.device) -> Any:
    """A causal language model in `dtype` on `where`, in evaluation mode.

    Raises ArtefactError if a tensor of config.json is missing from the weights, or the weights have any other tensor.
    """
    described = sum(parameter.numel() for parameter in empty_model(folder).parameters())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # A parameter takes at least one byte. transformers would allocate missing tensors before it reports them.
    if described > stored:
        raise ArtefactError(
            f"{folder}: config.json describes {described} parameters, the weights have {stored} bytes; get them again"
        )
    with explaining_errors(folder, "holds no model that can be loaded"):
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
    """The model that config.json describes, with shapes but without weights (on torch's meta device).

    Raises ArtefactError if config.json is refused or describes no model.
    """
    check_config(folder)
    with explaining_errors(folder / "config.json", "describes no model that can be built"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _foreign_code(config: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json with which transformers could load code from the base's folder or from the Hub."""
    flagged = [key for key in config if key in ("auto_map", "trust_remote_code", "custom_pipelines")]
    flagged += [key for key, value in config.items() if "attn_implementation" in key and "/" in str(value)]
    return flagged
