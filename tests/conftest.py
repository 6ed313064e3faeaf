"""A real but tiny model: two layers of width 16 and a byte-level tokenizer, made here, so that nothing is fetched."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from remint.chat import Conversation, Template, Turn

ROOT = Path(__file__).parents[1]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = Template(
    bos="",
    system=Turn("<|im_start|>system\n", "<|im_end|>\n"),
    user=Turn("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=Turn("<|im_start|>assistant\n", "\n"),
    end="<|im_end|>",
    stop=["<|im_end|>", "<|endoftext|>"],
)


def write_tiny_model(folder: Path) -> Path:
    """A Llama with random weights that are the same every time, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """folder, tokenizer, conversation of the tiny model; `model()` loads it anew."""
    import torch

    from remint import modeling

    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return SimpleNamespace(
        folder=folder,
        tokenizer=modeling.load_tokenizer(folder),
        conversation=Conversation(CHATML, system=""),
        model=lambda: modeling.load_model(folder, torch.float32, torch.device("cpu")),
    )


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as the working directory, where params.yaml and conf/ are found."""
    monkeypatch.chdir(ROOT)
    return ROOT
