"""On a GPU: the decoder's numbers in half precision, and the same bytes from every run, killed or not."""

import json

import pytest
import torch

from remint.compute.loss import SupervisedLoss
from remint.compute.packing import collate, document, moved
from remint.model.loading import load_model
from remint.model.lora import add_lora
from remint.model.qlora import Lora, Quantization
from remint.model.quantization import quantize
from tests.stages.test_train import Killed, paths, session, train  # noqa: F401  (a fixture among them)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPU = {"precision": "bfloat16", "lora": Lora(8, 16, 0.1, TARGETS), "epochs": 3}


@pytest.fixture
def places(paths, monkeypatch):  # noqa: F811
    monkeypatch.setenv("REMINT_DEVICE", "cuda")
    return paths


def loss_and_gradient(tiny, fused, dtype):
    """Loss and the flat gradient of one batch, computed in `dtype`."""
    rows = [document([5 + i % 90 for i in range(n)], [i > n // 2 for i in range(n)]) for n in (30, 7, 19, 200)]
    model = load_model(tiny.folder, dtype, torch.device("cuda"))
    quantize(model, Quantization("nf4", True, 64, "once"))
    torch.manual_seed(1)
    loss = SupervisedLoss(add_lora(model, Lora(8, 16, 0.0, TARGETS)), fused=fused).train()
    assert (loss.decoder is not None) is fused
    torch.manual_seed(2)
    for parameter in loss.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        value = loss(**moved(collate([rows]), torch.device("cuda")))
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in loss.parameters() if p.requires_grad])


def test_in_full_precision_loss_and_gradients_are_the_plain_ones(tiny):
    (ours, gradient), (theirs, reference) = (loss_and_gradient(tiny, fused, torch.float32) for fused in (True, False))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert (gradient - reference).norm() / reference.norm() < 1e-4


def test_in_half_precision_it_is_no_farther_from_the_truth_than_the_plain_way(tiny):
    _, truth = loss_and_gradient(tiny, False, torch.float32)
    ours, theirs = (
        (loss_and_gradient(tiny, fused, torch.bfloat16)[1] - truth).norm() / truth.norm() for fused in (True, False)
    )
    assert ours < 1.1 * theirs


def test_a_skipped_pass_draws_what_a_pass_draws(tiny):
    model = load_model(tiny.folder, torch.bfloat16, torch.device("cuda"))
    loss = SupervisedLoss(add_lora(model, Lora(8, 16, 0.1, TARGETS)), fused=True).train()
    batch = moved(collate([[document([5] * 40, [True] * 40)]]), torch.device("cuda"))
    torch.manual_seed(7)
    loss(**batch).backward()
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    torch.manual_seed(7)
    loss.skip(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"precision": "float16"}], ids=str)
def test_two_runs_and_a_killed_one_leave_the_same_bytes(places, monkeypatch, changes):
    settings = {**GPU, **changes}
    whole = train(places, **settings)
    assert train(places, **settings) == whole
    assert json.loads(whole["manifest.json"])["facts"]["steps"]["last"] >= 4
    record = session.Session.record
    for moment in (1, 3):

        def dying(self, finished, moment=moment):
            record(self, finished)
            if finished.step == moment:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(session.Session, "record", dying)
            train(places, **settings)
        assert train(places, **settings) == whole


# The tiny model's layers are smaller than what bitsandbytes' fast kernel takes, of which it warns when answers are computed.
@pytest.mark.filterwarnings("ignore:inner dimension")
def test_four_bit_memory_and_recomputing_change_no_byte_of_the_adapter(places):
    runs = [
        train(places, **GPU),
        train(places, **GPU, gradient_checkpointing=True),
        train(places, **GPU, quantization=Quantization("nf4", True, 64, "each_use")),
    ]
    last = max(name for name in runs[0] if name.endswith("state.safetensors"))
    assert runs[0][last] == runs[1][last] == runs[2][last]
