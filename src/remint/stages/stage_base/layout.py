"""Turn the files of any source into plain safetensors, a plain config and a fast tokenizer."""

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
from remint.stages.stage_base import gguf_header, sentencepiece_model, soundness, sources
from remint.stages.stage_base.settings import Model
from remint.weights import internlm2, shards, torch_files

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Fields of config.json that record a path or how the source was packed. They do not describe the model.
_NO_PART_OF_THE_MODEL = ("_name_or_path", "_model_name_or_path", "quantization_config", "transformers_version")


class Weights(shards.Writer):
    """A shard writer that counts parameters."""

    parameters = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor and count its parameters."""
        self.parameters += tensor.numel()
        super().add(name, tensor)


def public_name(model: Model) -> str:
    """The base model's public name: never a path of this machine."""
    return Path(model.location).name if model.source == "local_folder" else model.location


def read_config(folder: Path, gguf: str | None) -> Any:
    """The model's configuration. A folder's config must first pass the check for foreign code.

    InternLM2's config names custom code. That code is never loaded, because the model becomes a Llama. Raises
    ArtefactError if the config is refused or not valid.
    """
    path = folder / (gguf or "config.json")
    if gguf is not None:
        gguf_header.check_header(path)
    elif not _is_internlm2(folder):
        loading.check_config(folder)
    config = _built_config(folder, gguf, path)
    if gguf is None:
        soundness.check_generation_config(folder, config.vocab_size)
    return config


def _built_config(folder: Path, gguf: str | None, path: Path) -> Any:
    with loading.explaining_errors(path, "describes no model that can be built"):
        if gguf is None and _is_internlm2(folder):
            content = internlm2.llama_config(read_object(path))
            loading.check_content({**content, "model_type": "llama"}, path)
            return LlamaConfig(**content)
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False, local_files_only=True)
        loading.check_content({key: v for key, v in config.to_dict().items() if key not in _NO_PART_OF_THE_MODEL}, path)
    return config


def read_tokenizer(folder: Path, gguf: str | None) -> Any:
    """The tokenizer. It must be a fast one: only those return offsets with the ids and are stored as one JSON file.

    InternLM2 has a SentencePiece model and custom code that reads it. The SentencePiece model becomes a fast tokenizer.
    Raises ArtefactError if there is no usable tokenizer.
    """
    if gguf is None and _has_sentencepiece(folder):
        with loading.explaining_errors(folder, "has no tokenizer that can be read; tokenizer.model must hold one"):
            return sentencepiece_model.read(folder)
    tokenizer = loading.load_tokenizer(folder, gguf)
    if not tokenizer.is_fast:
        raise ArtefactError(f"{folder}: must have a fast tokenizer, got {type(tokenizer).__name__}; add tokenizer.json")
    return tokenizer


def write_weights(folder: Path, gguf: str | None, config: Any, dtype: torch.dtype, draft: Path, limit: int) -> Weights:
    """Write every tensor once, in `dtype`, in shards of at most `limit` bytes. A tied output head is omitted.

    Returns the writer, which has counted the parameters. Raises ArtefactError if the weights cannot be read, are not
    finite numbers in `dtype`, or contradict the config.
    """
    writer = Weights(draft, limit)
    tied = _HEAD if config.tie_word_embeddings else None
    faults = soundness.WeightFaults(dtype)

    def add(name: str, tensor: torch.Tensor) -> None:
        cast = tensor.to(dtype)
        faults.look_at_name(name)
        if tied and name in (_HEAD, _EMBEDDING):
            faults.look_at_tied(name, cast)
        if name != tied:
            faults.look(name, tensor, cast)
            writer.add(name, cast)

    if gguf is None:
        converted = _is_internlm2(folder)
        for name, tensor in _source_tensors(folder):
            for new_name, part in _as_llama(folder, name, tensor, config) if converted else [(name, tensor)]:
                add(new_name, part)
    else:
        # GGUF defines its values in fp32, so they are loaded in fp32. The cast below is the only rounding.
        model = _model_of_gguf(folder, gguf, config)
        for name, tensor in sorted(model.state_dict().items()):
            add(name, tensor)
    faults.check()
    writer.close()
    return writer


def _source_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder, one shard at a time. PyTorch's .bin files are read only if there are no safetensors."""
    if not sources.only_pickled(folder):
        for path in shards.files(folder):
            yield from shards.tensors(path)
        return
    for path in shards.files(folder, "pytorch_model.bin"):
        for name, tensor in sorted(torch_files.tensors(path).items()):
            yield name, tensor.clone()  # tied tensors share memory in .bin files, which safetensors forbids


def _has_sentencepiece(folder: Path) -> bool:
    return (folder / sentencepiece_model.NAME).is_file() and _is_internlm2(folder)


def _as_llama(folder: Path, name: str, tensor: torch.Tensor, config: Any) -> list[tuple[str, torch.Tensor]]:
    with loading.explaining_errors(folder, f"the tensor {name!r} does not fit InternLM2's layout"):
        return list(internlm2.to_llama(name, tensor, config))


def _model_of_gguf(folder: Path, gguf: str, config: Any) -> Any:
    """The model of a GGUF. Refuses missing tensors, which transformers would fill with random numbers."""
    path = folder / gguf
    with torch.device("meta"):
        described = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    # One byte holds at most eight parameters, at one bit per weight.
    if described > 8 * path.stat().st_size:
        raise ArtefactError(f"{path}: describes {described} parameters, more than fit into it; get the file again")
    with loading.explaining_errors(path, "holds no model that can be read"), _one_name_map():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    faults = [f"{path}: {kind.replace('_', ' ')}: {sorted(map(str, names))}" for kind, names in info.items() if names]
    if faults:
        raise ArtefactError(*(f"{fault}; get the file again" for fault in faults))
    return model


@contextlib.contextmanager
def _one_name_map() -> Iterator[None]:
    """Cache gguf's table of tensor names, which transformers otherwise builds again for every module of the model.

    The table and the number of modules both grow with the layers. For 30 layers, building the tables took four times as
    long as everything else.
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
    """Write config.json and generation_config.json without the fields that concern only the source."""
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
    """Write tokenizer.json and its config without the source's chat template, because the stage writes its own.

    A SentencePiece model is copied as well, for tools that need InternLM2's own layout.
    """
    tokenizer.chat_template = None
    tokenizer.save_pretrained(draft)
    path = draft / "tokenizer_config.json"
    content = read_object(path)
    for key in ("is_local", "local_files_only", "name_or_path", "auto_map"):
        content.pop(key, None)
    path.write_text(dump_json(content), encoding="utf-8")
    if _has_sentencepiece(folder):
        shutil.copyfile(folder / sentencepiece_model.NAME, draft / sentencepiece_model.NAME)


def check_staged(draft: Path, tokenizer: Any) -> None:
    """Raise ArtefactError if the weights do not fit the config or the tokenizer, before a later stage uses them."""
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
    if faults:
        raise ArtefactError(*(f"{fault}; get the base model again" for fault in faults[:20]))
    soundness.check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
