"""Turn whatever a source delivered into plain safetensors, a plain config and a fast tokenizer."""

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as gguf_library
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from remint.core.errors import ArtefactError, got
from remint.core.files import read_object
from remint.core.manifest import dump_json
from remint.model import loading
from remint.stages.stage_base import gguf_header, sentencepiece_model, sources
from remint.stages.stage_base.settings import Model
from remint.weights import internlm2, shards, torch_files

# Fields of config.json that name where a file lay or how the source was packed, and say nothing about the model.
_NO_PART_OF_THE_MODEL = ("_name_or_path", "_model_name_or_path", "quantization_config", "transformers_version")


class Weights(shards.Writer):
    """A shard writer that counts parameters."""

    parameters = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""
        self.parameters += tensor.numel()
        super().add(name, tensor)


def public_name(model: Model) -> str:
    """The base's name as others know it: never a path of this machine."""
    return Path(model.location).name if model.source == "local_folder" else model.location


def read_config(folder: Path, gguf: str | None) -> Any:
    """The model's configuration; a folder's must pass the check for foreign code first.

    InternLM2 names code of its own, which is dropped unread: the model becomes a Llama.
    """
    path = folder / (gguf or "config.json")
    if gguf is not None:
        gguf_header.check_header(path)
    elif not _is_internlm2(folder):
        loading.check_config(folder)
    with loading.understood(path, "describes no model that can be built"):
        if gguf is None and _is_internlm2(folder):
            content = internlm2.llama_config(read_object(path))
            loading.check_content({**content, "model_type": "llama"}, path)
            return LlamaConfig(**content)
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False, local_files_only=True)
        loading.check_content({key: v for key, v in config.to_dict().items() if key not in _NO_PART_OF_THE_MODEL}, path)
    return config


def read_tokenizer(folder: Path, gguf: str | None) -> Any:
    """The tokenizer, which must be a fast one: only those give ids with offsets and travel as one JSON file.

    InternLM2 brings a SentencePiece model and code of its own that reads it: the model is turned into a fast tokenizer.
    """
    if gguf is None and _brings_sentencepiece(folder):
        with loading.understood(folder, "has no tokenizer that can be read; tokenizer.model must hold one"):
            return sentencepiece_model.read(folder)
    tokenizer = loading.load_tokenizer(folder, gguf)
    if not tokenizer.is_fast:
        raise ArtefactError(
            f"{folder}: must bring a fast tokenizer, got {type(tokenizer).__name__}; add tokenizer.json"
        )
    return tokenizer


def write_weights(folder: Path, gguf: str | None, config: Any, dtype: torch.dtype, draft: Path, limit: int) -> Weights:
    """Write every tensor once, in `dtype`, in shards of at most `limit` bytes; a tied head is left out."""
    writer = Weights(draft, limit)
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    if gguf is None:
        converted = _is_internlm2(folder)
        for name, tensor in _source_tensors(folder):
            for new_name, part in _as_llama(folder, name, tensor, config) if converted else [(name, tensor)]:
                if new_name != tied:
                    writer.add(new_name, part.to(dtype))
    else:
        # In fp32, the precision that GGUF defines its values in; rounded once, by the cast below.
        model = _model_of_gguf(folder, gguf, config)
        for name, tensor in sorted(model.state_dict().items()):
            if name != tied:
                writer.add(name, tensor.to(dtype))
    writer.close()
    return writer


def _source_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder, one shard at a time; PyTorch's own files are read where there are no safetensors."""
    if not sources.only_pickled(folder):
        for path in shards.files(folder):
            yield from shards.tensors(path)
        return
    for path in shards.files(folder, "pytorch_model.bin"):
        for name, tensor in sorted(torch_files.tensors(path).items()):
            yield name, tensor.clone()  # tied tensors share memory in such a file, which safetensors do not allow


def _brings_sentencepiece(folder: Path) -> bool:
    return (folder / sentencepiece_model.NAME).is_file() and _is_internlm2(folder)


def _as_llama(folder: Path, name: str, tensor: torch.Tensor, config: Any) -> list[tuple[str, torch.Tensor]]:
    with loading.understood(folder, f"the tensor {name!r} has no place in InternLM2's layout"):
        return list(internlm2.to_llama(name, tensor, config))


def _model_of_gguf(folder: Path, gguf: str, config: Any) -> Any:
    """The model in the GGUF; transformers would fill what is missing with random numbers."""
    path = folder / gguf
    with torch.device("meta"):
        described = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    # The most that a byte of GGUF holds is one-bit weights.
    if described > 8 * path.stat().st_size:
        raise ArtefactError(f"{path}: describes {described} parameters, more than it can hold; get the file again")
    with loading.understood(path, "holds no model that can be read"), _one_name_map():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    faults = [f"{path}: {kind.replace('_', ' ')}: {sorted(map(str, names))}" for kind, names in info.items() if names]
    if faults:
        raise ArtefactError(*(f"{fault}; get the file again" for fault in faults))
    return model


@contextlib.contextmanager
def _one_name_map() -> Iterator[None]:
    """Let transformers have gguf's table of tensor names at once, for which it asks anew for every module of the model.

    The table grows with the layers as the modules do: for 30 layers that took four times as long as all the rest.
    """
    made = gguf_library.get_tensor_name_map
    gguf_library.get_tensor_name_map = functools.cache(made)
    try:
        yield
    finally:
        gguf_library.get_tensor_name_map = made


def _is_internlm2(folder: Path) -> bool:
    content = read_object(folder / "config.json", "the folder must hold a Hugging Face model")
    return content.get("model_type") == internlm2.MODEL_TYPE


def write_config(config: Any, model: Model, draft: Path) -> None:
    """Write config.json and generation_config.json without what belongs to the source alone."""
    architecture = AutoModelForCausalLM._model_mapping[type(config)].__name__
    content = {key: value for key, value in config.to_diff_dict().items() if key not in _NO_PART_OF_THE_MODEL}
    content |= {"model_type": config.model_type, "dtype": model.dtype, "architectures": [architecture]}
    (draft / "config.json").write_text(dump_json(content), encoding="utf-8")
    ends = {
        key: content.get(key)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if content.get(key) is not None
    }
    (draft / "generation_config.json").write_text(dump_json(ends), encoding="utf-8")


def write_tokenizer(tokenizer: Any, folder: Path, draft: Path) -> None:
    """Write tokenizer.json and its config; the template is written by who knows it, not taken from the source.

    A SentencePiece model is kept beside them for tools that want InternLM2's own layout back.
    """
    tokenizer.chat_template = None
    tokenizer.save_pretrained(draft)
    path = draft / "tokenizer_config.json"
    content = read_object(path)
    for key in ("is_local", "local_files_only", "name_or_path", "auto_map"):
        content.pop(key, None)
    path.write_text(dump_json(content), encoding="utf-8")
    if _brings_sentencepiece(folder):
        shutil.copyfile(folder / sentencepiece_model.NAME, draft / sentencepiece_model.NAME)


def check_staged(draft: Path, vocabulary: int) -> None:
    """Refuse weights that do not fit the config or the tokenizer, before anything is built on them."""
    model = loading.empty_model(draft)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    found = shards.shapes(draft)
    faults = [
        f"base: tensor {name}: must have shape {shape}, {got(found.get(name))}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    faults += [
        f"base: tensor {name}: the configuration has no place for it" for name in sorted(set(found) - set(expected))
    ]
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary > rows:
        faults.append(
            f"base: the tokenizer has {vocabulary} tokens, the embedding {rows} rows; they do not belong together"
        )
    if faults:
        raise ArtefactError(*(f"{fault}; get the base model again" for fault in faults[:20]))
