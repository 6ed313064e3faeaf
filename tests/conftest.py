"""A real but tiny model: two layers of width 16 and a byte-level tokenizer, built here so that nothing is fetched."""

import copy
import functools
import gc
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from remint.core import launch
from remint.core.declared import Declared
from remint.model.template import Conversation, Template, Turn

# Set before the first import of torch. Threads gain nothing for a model this small, and without these variables an idle
# thread spins: with two threads on busy cores, a training of 0.4 s took up to 28 s.
THREADING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
os.environ |= {name: launch.environment(1, network=False)[name] for name in THREADING}
# The imports make a million objects that live until the end. Garbage collection must not waste time on them, neither
# now nor during the tests.
gc.disable()

ROOT = Path(__file__).parents[1]
# What a stage is started with, for tests that call its `run` themselves.
DECLARED = Declared("train", {"seed": 7}, {"code.py": "c" * 64}, list)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = Template(
    bos="",
    system=Turn("<|im_start|>system\n", "<|im_end|>\n"),
    user=Turn("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=Turn("<|im_start|>assistant\n", "\n"),
    end="<|im_end|>",
    stop=["<|im_end|>", "<|endoftext|>"],
)


def pytest_collection_finish() -> None:
    """Turn garbage collection on again, without the objects of the imports: the tests take a fifth less time."""
    gc.freeze()
    gc.enable()


def write_tiny_model(folder: Path, special: Sequence[str] = SPECIAL) -> Path:
    """Write a Llama with the same random weights every time, as a Hugging Face folder.

    `special` are the first tokens: unknown, start of text, end of answer (and padding), then others.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        additional_special_tokens=list(special[3:]),
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_tiny_gguf(folder: Path, name: str = "m.gguf", leave_out: str = "-") -> Path:
    """Write the tiny model as a GGUF with a hostile chat template. Omits tensors with `leave_out` in their name."""
    import gguf
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    source = write_tiny_model(folder / "source", [*SPECIAL, "ab"])
    tokenizer = AutoTokenizer.from_pretrained(source)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "lm_head": "output",
        **{f"self_attn.{key}_proj": f"attn_{key}" for key in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{key}_proj": f"ffn_{key}" for key in ("gate", "up", "down")},
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer = gguf.GGUFWriter(folder / name, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokenizer))
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokenizer) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ 9**9**9 }}")
    for key, tensor in load_file(source / "model.safetensors").items():
        for old, new in names.items():
            key = key.replace(old, new)
        if "attn_q." in key or "attn_k." in key:  # GGUF orders the rows of a head in pairs
            tensor = tensor.reshape(-1, 2, 4, 16).swapaxes(1, 2).reshape(tensor.shape)
        if leave_out not in key:
            writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / name


def to_internlm2(folder: Path) -> None:
    """Rewrite the tiny model in InternLM2's layout, row by row as InternLM2's code reads it."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, made = load_file(folder / "model.safetensors"), {}
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in weights.items():
        if "self_attn.q_proj" in name:
            q, k, v = (weights[name.replace("q_proj", f"{which}_proj")] for which in "qkv")
            rows = [row for head in range(1) for block in (q[:8], q[8:], k, v) for row in block]
            made[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.stack(rows)
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        else:
            for old, new in {**names, "embed_tokens": "tok_embeddings", "lm_head": "output"}.items():
                name = name.replace(old, new)
            made[name] = tensor.clone()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "internlm2", "bias": False, "auto_map": {"AutoModel": "modeling_internlm2.X"}}
    (folder / "config.json").write_text(json.dumps(config))


def write_sentencepiece(
    folder: Path, pieces: Sequence[str], markers: Sequence[str], dummy_prefix: bool = False
) -> None:
    """Write a tokenizer.model like InternLM2's: <unk> <s> </s>, the 256 bytes, `pieces` by falling score, then markers.

    The markers have no names there. tokenizer_config.json names them, and requests code from the base's folder.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    unnamed = [f"[UNUSED_TOKEN_{number}]" for number in range(len(markers))]
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, **dict.fromkeys((f"<0x{byte:02X}>" for byte in range(256)), 6)}
    scores = {piece: -float(number) for number, piece in enumerate(pieces)}
    for piece in [*kinds, *pieces, *unnamed]:
        model.pieces.add(piece=piece, score=scores.get(piece, 0.0), type=kinds.get(piece, 1))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString(deterministic=True))
    first = len(model.pieces) - len(markers)
    named = {0: "<unk>", 1: "<s>", 2: "</s>", **dict(enumerate(markers, first))}
    config = {
        "added_tokens_decoder": {str(index): {"content": name, "special": True} for index, name in named.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.X", None]},
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny model: folder, tokenizer, conversation. Each call of `model()` returns a new copy of the model."""
    import torch

    from remint.model import loading

    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    loaded = loading.load_model(folder, torch.float32, torch.device("cpu"))
    return SimpleNamespace(
        folder=folder,
        tokenizer=loading.load_tokenizer(folder),
        conversation=Conversation(CHATML, system=""),
        model=lambda: copy.deepcopy(loaded),
    )


@functools.cache
def _yaml_parser() -> Callable[[str, Path], dict[str, Any]]:
    from remint.runner import config

    parsed = functools.cache(config.parse_yaml)
    return lambda text, path: copy.deepcopy(parsed(text, path))


_hydra_files: dict[str, Any] = {}


@pytest.fixture
def yaml_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse each YAML text, and the dozen files inside Hydra's package, once for all tests that use this fixture.

    Parsing takes most of the time of a recipe, and a fifth of a composition by Hydra.
    """
    from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource

    from remint.runner import config, recipes

    parse = _yaml_parser()
    for module in (config, recipes):
        monkeypatch.setattr(module, "parse_yaml", parse)
    read = ImportlibResourcesConfigSource._read_config

    def read_once(source: Any, file: Any) -> Any:
        if str(file) not in _hydra_files:
            _hydra_files[str(file)] = read(source, file)
        return copy.deepcopy(_hydra_files[str(file)])

    monkeypatch.setattr(ImportlibResourcesConfigSource, "_read_config", read_once)


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository root as the working directory, with params.yaml and conf/."""
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.fixture(scope="session")
def toy_clone(tmp_path_factory):
    """The project with toy stages, built once."""
    from tests import toy

    return toy.built(tmp_path_factory.mktemp("toy") / "clone")


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The files that the commands without torch read, as in a new clone."""
    place = tmp_path_factory.mktemp("plain") / "template"
    shutil.copytree(ROOT / "conf", place / "conf")
    shutil.copytree(ROOT / "data/source", place / "data/source")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, place / name)
    for name in ("src", "docker"):
        (place / name).symlink_to(ROOT / name)
    (place / ".git").mkdir()  # without it, `remint check` looks at nothing else
    return place


@pytest.fixture(scope="session")
def heavy():
    """Returns a function that calls another one in a fork of a process that has imported everything, and waits."""
    from tests.faults import built

    with built.server() as run:
        yield run


@pytest.fixture(scope="session")
def built_template(heavy, plain, tmp_path_factory):
    """The files of `plain` with the tiny model as the base, and every artefact."""
    from tests.faults import built

    place = tmp_path_factory.mktemp("built") / "template"
    built.build(plain, place)
    heavy(built.run_stages, place)
    return place


@pytest.fixture
def toy(toy_clone):
    """The built project with toy stages. After the test, everything is as it was."""
    from tests.toy import restore

    yield toy_clone
    restore(toy_clone)
