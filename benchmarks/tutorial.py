"""Times the tutorial's complete job: every stage by its command, on random weights in InternLM2-chat-1.8B's own layout.

    python benchmarks/tutorial.py --recipe internlm2-80gb --again 2

The job is that of the tutorial: 80 identity records × 100 and no others, 3 epochs. The answers of random weights cannot
be judged, but the times do not depend on the weights' values. Each stage is timed from the start of its process to its
end. `train` runs once with empty compile caches, then `--again` times with full ones, and must leave the same adapter
each time.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train_speed import SHAPES

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
PLACE = ROOT / ".scratch" / "bench" / "tutorial"
MODEL = "internlm2-chat-1.8b"
RECORDS = 80
CONFIG = {
    **SHAPES["internlm2-1.8b"],
    "model_type": "internlm2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "hidden_act": "silu",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MARKERS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
# Random weights lose more by rounding to bfloat16 than trained ones, so merge's check would refuse a bfloat16 model.
SETTINGS = {"merge": ["merge.dtype=float32"], "eval_chat": ["eval_chat.max_new_tokens=16"]}
STAGES = ("replicate_data", "stage_base", "train", "convert", "merge", "eval_chat")


def main() -> None:
    """Make the base, run the stages, print a table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=f"{RECORDS} of the project's records replace the tutorial's; also set, unless you set them: "
        + " ".join(setting for settings in SETTINGS.values() for setting in settings),
    )
    parser.add_argument(
        "--recipe",
        default="internlm2-80gb",
        help="a recipe for InternLM2-chat-1.8B; training needs a GPU; default: %(default)s",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        help="stages to run; default: all; the base takes 4 GB of disk",
    )
    parser.add_argument(
        "--again", type=int, default=1, help="how many times `train` runs with full caches; default: %(default)s"
    )
    parser.add_argument(
        "--layers", type=int, default=24, help="layers of the base; fewer make it smaller, to try this script"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="other settings, like train.micro_batch=8")
    options = parser.parse_args()
    from remint.runner import recipes

    os.chdir(ROOT)
    if options.recipe not in recipes.names() or recipes.settings(options.recipe)["model"] != MODEL:
        parser.error(
            f"--recipe: must be a recipe for {MODEL}, got {options.recipe!r}; see `make recipes PATTERN=internlm2`"
        )
    for setting in options.settings:
        if not setting.startswith(tuple(f"{stage}." for stage in STAGES)):
            parser.error(f"{setting}: must begin with a stage, like train.micro_batch=8")
    prepare(recipes.text(options.recipe), options.layers)
    print("| stage | seconds | |\n|---|---|---|", flush=True)
    for stage in options.stages:
        given = [*SETTINGS.get(stage, []), *(s for s in options.settings if s.startswith(f"{stage}."))]
        if stage != "train":
            row(f"`{stage}`", run(stage, given), facts(stage))
            continue
        shutil.rmtree(PLACE / "triton", ignore_errors=True)
        row("`train`, Triton's cache empty", run(stage, given), first := adapter())
        for _ in range(options.again):
            shutil.rmtree(PLACE / "data" / "checkpoint")
            row("`train`, Triton's cache full", run(stage, given), again := adapter())
            if again != first:
                sys.exit(f"train: the adapter differs, got {again} instead of {first}")


def row(name: str, seconds: float, note: str) -> None:
    """Print a line of the table."""
    print(f"| {name} | {seconds:.1f} | {note} |", flush=True)


def prepare(params: str, layers: int) -> None:
    """Make a folder with everything that the stages declare: settings, sources, code, the base in its own layout."""
    from remint.core import manifest

    shutil.rmtree(PLACE, ignore_errors=True)
    (PLACE / "data").mkdir(parents=True)
    for name in ("src", "docker", "dvc.yaml"):
        (PLACE / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "conf", PLACE / "conf")
    shutil.copytree(ROOT / "data" / "source", PLACE / "data" / "source")
    identity = json.loads((PLACE / "data/source/identity.json").read_text(encoding="utf-8"))[:RECORDS]
    (PLACE / "data/source/identity.json").write_text(json.dumps(identity, ensure_ascii=False), encoding="utf-8")
    base = PLACE / "internlm2-chat-1_8b"
    write_base(base, {**CONFIG, "num_hidden_layers": layers})
    text = params.replace("control: [data/source/control.json]", "control: []")
    (PLACE / "params.yaml").write_text(text, encoding="utf-8")
    spec = PLACE / "conf" / "model" / f"{MODEL}.yaml"
    sums = "".join(f"  {file.name}: {manifest.file_digest(file)}\n" for file in sorted(base.iterdir()))
    spec.write_text(spec.read_text(encoding="utf-8").replace("files: {}", f"files:\n{sums}#"), encoding="utf-8")


def write_base(folder: Path, config: dict[str, Any]) -> None:
    """Write random weights, config and SentencePiece model like the publisher's folder."""
    from tests.conftest import write_sentencepiece

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    known = list(dict.fromkeys(pieces()))
    room = config["vocab_size"] - 3 - 256 - len(MARKERS)
    write_sentencepiece(folder, [*known, *(f"\u2042{number:06}" for number in range(room - len(known)))], MARKERS)
    wide, inner = config["hidden_size"], config["intermediate_size"]
    heads, few = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.tok_embeddings.weight": (config["vocab_size"], wide)}
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        shapes |= {
            f"{layer}attention.wqkv.weight": ((heads + 2 * few) * wide // heads, wide),
            f"{layer}attention.wo.weight": (wide, wide),
            f"{layer}attention_norm.weight": (wide,),
            f"{layer}feed_forward.w1.weight": (inner, wide),
            f"{layer}feed_forward.w2.weight": (wide, inner),
            f"{layer}feed_forward.w3.weight": (inner, wide),
            f"{layer}ffn_norm.weight": (wide,),
        }
    shapes |= {"model.norm.weight": (wide,), "output.weight": (config["vocab_size"], wide)}
    write_weights(folder, shapes)


def write_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write random bfloat16 weights of these names and shapes. A GPU, if there is one, draws the numbers faster."""
    import torch

    from remint.weights import shards

    where = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(where).manual_seed(0)
    writer = shards.Writer(folder, 2000 * 2**20)
    for name, shape in shapes.items():
        weight = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator, device=where)
        writer.add(name, weight.to(torch.bfloat16).cpu())
    writer.close()


def pieces() -> Iterator[str]:
    """Vocabulary from the records: their characters, and their words with all prefixes."""
    for path in sorted((ROOT / "data" / "source").glob("*.json")):
        text = path.read_text(encoding="utf-8")
        yield from sorted(set(text) - {" ", "\n"})
        for word in sorted(set(text.replace("\n", " ").split(" "))):
            for end in range(2, len(word) + 1):
                yield word[:end]
                yield f"\u2581{word[: end - 1]}"


def run(stage: str, settings: list[str]) -> float:
    """Run a stage by its command, with the output in a log. Returns its seconds."""
    block = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    block["TRITON_CACHE_DIR"] = str(PLACE / "triton")
    started = time.monotonic()
    with (PLACE / f"{stage}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-m", "remint", stage, *settings],
            cwd=PLACE,
            env=block,
            stdout=log,
            stderr=log,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{stage} failed:\n{(PLACE / f'{stage}.log').read_text(encoding='utf-8')[-3000:]}")
    return time.monotonic() - started


def facts(stage: str) -> str:
    """The size of the stage's output, for the table."""
    if stage == "replicate_data":
        return f"{sum(1 for _ in (PLACE / 'data/dataset/train.jsonl').open(encoding='utf-8')):,} rows"
    made = {"stage_base": "base", "convert": "adapter", "merge": "model", "eval_chat": "report"}[stage]
    return f"{sum(file.stat().st_size for file in (PLACE / 'data' / made).iterdir()) / 1e9:.2f} GB"


def adapter() -> str:
    """Number of steps and the sha256 of the last checkpoint of `train`."""
    steps = sorted((PLACE / "data" / "checkpoint").glob("step-*"))
    lines = (PLACE / "data/checkpoint/history.jsonl").read_text(encoding="utf-8").splitlines()
    sums = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(steps[-1].glob("*.safetensors")))).hexdigest()
    return f"{json.loads(lines[-1])['step']} steps, {sums[:10]}"


if __name__ == "__main__":
    main()
