"""The parts of `peers.py` that all contestants share: preparing the job, and judging the adapters afterwards.

python peers_referee.py prepare JOB OPTIONS
python peers_referee.py judge JOB FOLDERS
"""

import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_job import IGNORED, Job, load
from safetensors.torch import load_file
from train_speed import SHAPES, roof

from remint.compute import determinism
from remint.compute.kernels.layers import LINEARS
from remint.compute.loss import SupervisedLoss, mean_loss
from remint.compute.packing import Document, document, encode
from remint.core.errors import one_line
from remint.core.paths import Paths
from remint.core.settings import Runtime
from remint.model import loading, lora, quantization, template
from remint.model.qlora import Lora, Quantization

ROOT = Path(__file__).parents[1]
# Total tokens of the held-out documents.
HELD_OUT = 2500
# Special tokens of the tokenizer below. Random documents do not contain their ids.
WORDS = ("<unk>", "<s>", "</s>", "<pad>")


def prepare(path: Path, options: dict[str, Any]) -> None:
    """Write the job. It uses the staged base and dataset; if one is missing or a shape is given, random ones."""
    where = loading.device()
    on_gpu = where.type == "cuda"
    length = options["length"] or (2048 if on_gpu else 256)
    rows = options["rows"] or (8 if on_gpu else 1)
    tokens = options["steps"] * rows * length
    folder = path.parent / "base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    staged = Paths()
    if (
        options["shape"] is None
        and (staged.base / "config.json").exists()
        and (staged.dataset / "train.jsonl").exists()
    ):
        training, held_out, pad = _staged(staged, folder, length, tokens)
    else:
        training, held_out, pad = _random(options["shape"] or "smollm2-135m", folder, where, length, tokens)
    Job(
        base=str(folder.resolve()),
        pad=pad,
        length=length,
        rows=rows,
        rank=64 if on_gpu else 32,
        alpha=16 if on_gpu else 32,
        dropout=0.1,
        targets=list(LINEARS),
        lr=1e-3,
        precision="bfloat16" if on_gpu else "float32",
        device=where.type,
        seed=options["seed"],
        documents=[row(d) for d in training],
        held_out=[row(d) for d in held_out],
    ).save(path)


def row(given: Document) -> list[list[int]]:
    """A document as peers take it: ids and labels. A label is at its token's position; ours is one position earlier."""
    return [given.ids.tolist(), [IGNORED, *given.targets[:-1].tolist()]]


def _staged(staged: Any, folder: Path, length: int, tokens: int) -> tuple[list[Document], list[Document], int]:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        if (staged.base / name).exists():
            (folder / name).symlink_to((staged.base / name).resolve())
    tokenizer = loading.load_tokenizer(staged.base)
    conversation = template.load(staged.base)

    def documents(part: str) -> list[Document]:
        found = encode(tokenizer, conversation, template.read_conversations(staged.dataset / f"{part}.jsonl"))
        order = np.random.default_rng(0).permutation(len(found))
        return [found[i] for i in order if len(found[i].ids) <= length]

    training = _first(documents("train"), tokens)
    held_out = _first(documents("held_out"), HELD_OUT // 2) + _first(documents("control"), HELD_OUT // 2)
    used = {int(i) for d in training + held_out for i in d.ids} | {tokenizer.eos_token_id, tokenizer.bos_token_id}
    pad = next(i for i in tokenizer.added_tokens_decoder if i not in used)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(folder)
    return training, held_out, pad


def _random(
    shape: str, folder: Path, where: torch.device, length: int, tokens: int
) -> tuple[list[Document], list[Document], int]:
    """Freshly initialized weights, and random documents whose token frequencies follow Zipf's law."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    described = LlamaConfig(**SHAPES[shape], max_position_embeddings=32768, attention_bias=False, **ids)
    with torch.device(where):
        AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), WORDS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    random = np.random.default_rng(0)
    share = 1 / np.arange(1, described.vocab_size - len(WORDS) + 1)
    known = random.permutation(np.arange(len(WORDS), described.vocab_size))

    def documents(tokens: int) -> list[Document]:
        sizes = random.integers(length // 8 if length < 512 else 60, min(256, length // 3) + 1, size=tokens // 30 + 1)
        drawn = (random.choice(known, size=size, p=share / share.sum()) for size in sizes)
        return _first([document(ids, np.arange(len(ids)) >= len(ids) // 2) for ids in drawn], tokens)

    return documents(tokens), documents(HELD_OUT), 3


def _first(documents: list[Document], tokens: int) -> list[Document]:
    """The first documents, up to `tokens` tokens in total but at least one."""
    ends = np.cumsum([len(d.ids) for d in documents])
    return documents[: max(1, int((ends <= tokens).sum()))]


def judge(path: Path, folders: dict[str, tuple[str, bool]]) -> dict[str, Any]:
    """Compute the held-out loss of every adapter with the same code, each on the weights that it was trained on."""
    job = load(path)
    where, dtype = loading.device(), loading.TORCH_DTYPES[job.precision]
    determinism.apply(Runtime(torch.get_num_threads(), deterministic=False))
    held_out = [document(ids, [label != IGNORED for label in labels]) for ids, labels in job.held_out]
    losses: dict[str, float] = {}
    failed: dict[str, str] = {}
    untrained = float("nan")
    sizes: dict[str, int] = {}
    for is_quantized in (False, True):
        model = loading.load_model(Path(job.base), dtype, where)
        head = model.get_output_embeddings().weight.numel()
        sizes = {"linear": sum(layer.weight.numel() for layer in quantization.linears(model).values()), "head": head}
        quantization.quantize(model, Quantization("nf4" if is_quantized else "none", True, 64, "once"))
        adapted = SupervisedLoss(lora.add_lora(model, Lora(job.rank, job.alpha, job.dropout, job.targets)))
        # Without autocast's weight cache: the adapters are replaced while it is active.
        with torch.autocast(where.type, dtype=dtype, cache_enabled=False, enabled=where.type == "cuda"):
            if is_quantized:
                untrained = mean_loss(adapted, held_out, job.length)
            for name, (folder, trained_so) in folders.items():
                if trained_so != is_quantized:
                    continue
                try:
                    _take(adapted.model, Path(folder))
                    losses[name] = mean_loss(adapted, held_out, job.length)
                except (OSError, ValueError) as error:
                    failed[name] = f"left no adapter for this model: {one_line(error)}"
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    return {
        "losses": losses,
        "failed": failed,
        "untrained": untrained,
        "roof": roof(torch, where, dtype),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else _processor(),
        "model": f"{sizes['linear'] / 1e6:.0f} M weights in {layers} layers {hidden} wide",
        **sizes,
    }


def _take(adapted: Any, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    found = set_peft_model_state_dict(adapted, load_file(folder / "adapter_model.safetensors"))
    if found.unexpected_keys or any("lora" in name for name in found.missing_keys):
        raise ValueError(f"its tensors have other names, like {[*found.unexpected_keys, *found.missing_keys][0]}")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        print(json.dumps(judge(Path(sys.argv[2]), json.loads(sys.argv[3]))))
