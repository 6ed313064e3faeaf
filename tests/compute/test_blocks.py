"""The GPU's decoder computes what peft's and transformers' code computes. Plain torch replaces its Triton kernels here.

Where Triton is installed, the kernels themselves are compared with those plain operations, on a GPU or interpreted.
"""

import importlib
import sys

import pytest
import torch

from remint.compute import kernels
from remint.compute.kernels.layers import MOST_RANK
from remint.compute.loss import SupervisedLoss
from remint.compute.packing import collate, document
from remint.model.lora import add_lora
from remint.model.qlora import Lora, Quantization
from remint.model.quantization import quantize
from tests.compute import plain_ops

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROW = [document([5 + i % 90 for i in range(n)], [i > n // 2 for i in range(n)]) for n in (30, 7, 19)]


@pytest.fixture(scope="module")
def blocks():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ops", "attention"):
            patch.setitem(sys.modules, f"remint.compute.kernels.{name}", plain_ops)
        for name in ("fused_linear", "blocks"):  # restored afterwards, or removed if they were not imported
            patch.setitem(sys.modules, f"remint.compute.kernels.{name}", None)
            patch.setattr(kernels, name, None, raising=False)
            del sys.modules[f"remint.compute.kernels.{name}"]
        yield importlib.import_module("remint.compute.kernels.blocks")


def adapted(tiny, decoder=None, dropout=0.0, dequantize="once", checkpointing=False, targets=TARGETS, rank=4):
    """The tiny model with an adapter whose B is not zero, in training mode; `decoder` computes it if given."""
    model = tiny.model()
    quantize(model, Quantization("nf4", True, 64, dequantize))
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    loss = SupervisedLoss(add_lora(model, Lora(rank, 8, dropout, targets))).train()
    for parameter in loss.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    loss.decoder = decoder(loss.model) if decoder else None
    return loss


def step(loss, rows=(ROW,)):
    """Loss and gradients of one packed batch."""
    torch.manual_seed(7)
    loss.zero_grad()
    value = loss(**collate(rows))
    value.backward()
    return value.item(), {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max() for gradient in theirs.values())
    return max((ours[name] - theirs[name]).abs().max() / scale for name in theirs)


@pytest.mark.parametrize("dequantize", ["once", "each_use"])
@pytest.mark.parametrize("rows", [(ROW,), (ROW, ROW[:1])], ids=["one row", "two rows"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_loss_and_gradients_are_the_plain_ones(tiny, blocks, rows, dequantize, checkpointing):
    ours, gradients = step(adapted(tiny, blocks.Decoder, 0.0, dequantize, checkpointing), rows)
    theirs, reference = step(adapted(tiny, None, 0.0, dequantize), rows)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert largest_difference(gradients, reference) < 1e-5


def test_after_an_update_it_computes_with_the_new_values(tiny, blocks):
    ours, theirs = adapted(tiny, blocks.Decoder), adapted(tiny)
    for loss in (ours, theirs):
        step(loss)
        torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], lr=0.1, fused=True).step()
    assert step(ours)[0] == pytest.approx(step(theirs)[0], rel=1e-5)


def test_with_dropout_the_gradient_is_that_of_the_loss(tiny, blocks):
    """Finite differences along a random direction, with the dropout masks of one seed."""
    loss = adapted(tiny, blocks.Decoder, dropout=0.3).double()
    loss.decoder = blocks.Decoder(loss.model)
    _, gradients = step(loss)
    torch.manual_seed(0)
    direction = {name: torch.randn_like(gradient) for name, gradient in gradients.items()}
    expected = sum((gradients[name] * direction[name]).sum().item() for name in gradients)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in loss.named_parameters():
                if name in direction:
                    parameter += sign * 1e-3 * direction[name]
        values.append(step(loss)[0])
        with torch.no_grad():
            for name, parameter in loss.named_parameters():
                if name in direction:
                    parameter -= sign * 1e-3 * direction[name]
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=2e-3)


def test_recomputed_activations_meet_the_same_masks(tiny, blocks):
    once, gradients = step(adapted(tiny, blocks.Decoder, dropout=0.3))
    twice, again = step(adapted(tiny, blocks.Decoder, dropout=0.3, checkpointing=True))
    assert once == twice
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_dropout_is_new_in_each_step_and_absent_in_evaluation(tiny, blocks):
    loss = adapted(tiny, blocks.Decoder, dropout=0.3)
    torch.manual_seed(0)
    assert loss(**collate([ROW])) != loss(**collate([ROW]))
    assert loss.eval()(**collate([ROW])).item() == pytest.approx(
        adapted(tiny).eval()(**collate([ROW])).item(), rel=1e-5
    )


def test_the_adapter_and_the_model_stay_what_they_were(tiny, blocks):
    ours, theirs = adapted(tiny, blocks.Decoder), adapted(tiny)
    states = [loss.model.state_dict() for loss in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(ours.model.eval()(input_ids=ids).logits, theirs.model.eval()(input_ids=ids).logits)


def test_what_it_does_not_know_is_left_to_others(tiny, blocks):
    assert blocks.fits(adapted(tiny).model)
    assert not blocks.fits(adapted(tiny, targets=["q_proj", "v_proj"]).model)
    assert blocks.fits(adapted(tiny, rank=MOST_RANK).model)
    assert not blocks.fits(adapted(tiny, rank=MOST_RANK + 1).model)
    other = adapted(tiny).model
    other.get_base_model().model.config.sliding_window = 16
    assert not blocks.fits(other)


@pytest.mark.parametrize("dequantize", ["once", "each_use"])
@torch.no_grad()
def test_the_models_own_modules_answer_with_the_adapters_present_values(tiny, blocks, dequantize):
    ours = adapted(tiny, blocks.Decoder, dropout=0.1, dequantize=dequantize).eval()
    theirs = adapted(tiny, dropout=0.1, dequantize=dequantize).eval()
    ids = torch.arange(5, 25)[None]
    for _ in range(2):
        expected = theirs.model(input_ids=ids).logits
        with ours.answering():
            torch.testing.assert_close(ours.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
            with ours.model.disable_adapter(), theirs.model.disable_adapter():
                base = theirs.model(input_ids=ids).logits
                torch.testing.assert_close(ours.model(input_ids=ids).logits, base, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours.model(input_ids=ids).logits, expected)
        assert (expected - base).abs().max() > 1e-2
        for loss in (ours, theirs):
            for parameter in loss.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
