"""Converting and merging: every tensor is accounted for, the sum is right, and the proof can fail."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from remint.compute.packing import document
from remint.core.errors import ArtefactError, SettingsError
from remint.model import loading, quantization
from remint.model.qlora import Lora, Quantization
from remint.model.quantization import dequantized, quantize
from remint.stages.convert.run import chosen_step
from remint.stages.merge import run
from remint.stages.merge.proof import closeness, logits_at_targets
from remint.stages.merge.tensors import merge_tensor, write_merged
from remint.weights import adapter, shards

LORA = Lora(2, 4, 0.0, ["q_proj", "down_proj"])


def random_adapter(folder):
    torch.manual_seed(1)
    return {
        name: torch.randn(shape) * 0.1 for name, shape in adapter.expected_shapes(shards.shapes(folder), LORA).items()
    }


def test_the_sum_is_the_textbook_one():
    tensors = {
        "base_model.model.l.lora_A.weight": torch.tensor([[1.0, 2.0]]),
        "base_model.model.l.lora_B.weight": torch.tensor([[3.0], [4.0]]),
    }
    delta = adapter.delta(tensors, "l", Lora(1, 2, 0, ["l"]))
    assert delta.tolist() == [[6, 12], [8, 16]]
    assert merge_tensor(torch.ones(2, 2), delta, None, torch.float32).tolist() == [[7, 13], [9, 17]]


def test_the_head_and_the_norms_are_left_alone(tiny):
    layers = adapter.adapted_layers(shards.shapes(tiny.folder), LORA.targets)
    assert len(layers) == 4
    assert layers["model.layers.0.self_attn.q_proj"] == (16, 16)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_wrong_set_of_tensors_is_refused(tiny, change):
    found = {name: tuple(t.shape) for name, t in random_adapter(tiny.folder).items()}
    name = next(iter(found))
    if change == "missing":
        del found[name]
    elif change == "unexpected":
        found["base_model.model.other.lora_A.weight"] = (2, 2)
    else:
        found[name] = (3, 16)
    with pytest.raises(ArtefactError, match=change):
        adapter.check_tensors(found, shards.shapes(tiny.folder), LORA, Path("x"))


def test_the_proof_asks_for_no_position_that_the_model_does_not_have(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    tiny.conversation.save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 32}))
    turns = [{"role": "user", "content": "Why? " * 20}, {"role": "assistant", "content": "So. " * 20}]
    for name in ("held_out", "control"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    documents = run._documents(SimpleNamespace(dataset=tmp_path), tmp_path)
    assert max(len(document.ids) for document in documents) == 32
    assert sum(document.learned for document in documents) == 2 * (len("So. " * 20) + 1)


@pytest.mark.parametrize("rounding", [None, Quantization("nf4", True, 64, "once")])
def test_the_merged_model_says_what_peft_says(tiny, tmp_path, rounding):
    from peft import PeftModel

    tensors = random_adapter(tiny.folder)
    made, merged_folder = tmp_path / "adapter", tmp_path / "model"
    made.mkdir()
    merged_folder.mkdir()
    adapter.write(tensors, LORA, "tiny", made)
    write_merged(tiny.folder, tensors, LORA, rounding, None, merged_folder)
    for name in ("config.json", "generation_config.json"):
        (merged_folder / name).write_bytes((tiny.folder / name).read_bytes())
    base = tiny.model()
    if rounding:
        quantize(base, rounding)
    documents = [document(list(range(3, 40)), [True] * 37)]
    reference = logits_at_targets(PeftModel.from_pretrained(base, made).eval(), documents)
    merged = loading.load_model(merged_folder, torch.float32, torch.device("cpu"))
    found = closeness(reference, logits_at_targets(merged, documents))
    assert found.max_logit_difference < 1e-4
    assert found.agreement == 1
    plain = closeness(reference, logits_at_targets(tiny.model(), documents))
    assert plain.mean_divergence > 1e-3


def test_dequantized_means_the_values_of_the_four_bit_layer(tiny):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    settings = Quantization("nf4", True, 64, "each_use")
    layer = torch.nn.Linear(64, 64, bias=False)
    layer.weight.data = weight.clone()
    packed = quantization._linear_4bit(layer, settings)
    ids = torch.eye(64)
    assert torch.allclose(packed(ids).T, dequantized(weight, settings), atol=1e-6)
    assert not torch.allclose(weight, dequantized(weight, settings), atol=1e-3)


def test_the_same_adapter_has_the_same_bytes(tiny, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        adapter.write(random_adapter(tiny.folder), LORA, "tiny", tmp_path / name)
    for file in (adapter.WEIGHTS, adapter.CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    read, lora = adapter.read(tmp_path / "a")
    assert lora == Lora(2, 4, 0.0, ["down_proj", "q_proj"])
    assert read.keys() == random_adapter(tiny.folder).keys()


def test_a_step_that_was_not_kept_is_refused():
    steps = {"last": 9, "best": 4, "kept": [4, 8, 9]}
    assert [chosen_step(c, steps) for c in ("last", "best", "8")] == [9, 4, 8]
    with pytest.raises(SettingsError, match="choose last, best or one of 4, 8, 9"):
        chosen_step("5", steps)


def test_many_shards_are_written_and_read(tmp_path):
    writer = shards.Writer(tmp_path, limit=100)
    made = {f"t{n}": torch.full((5,), float(n)) for n in range(12)}
    for name, tensor in made.items():
        writer.add(name, tensor)
    writer.close()
    files = shards.files(tmp_path)
    assert len(files) == 3
    assert {name: t.tolist() for file in files for name, t in shards.tensors(file)} == {
        n: t.tolist() for n, t in made.items()
    }
    files[1].unlink()
    with pytest.raises(ArtefactError, match="missing, though the index names it"):
        shards.files(tmp_path)
