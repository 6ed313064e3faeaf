"""The fused operations compute what peft's and torch's operations compute."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from remint.compute.kernels import adapted as cpu
from remint.compute.kernels import head
from remint.compute.loss import SupervisedLoss
from remint.compute.packing import collate, document
from remint.compute.teacher import TOP, Teacher, most_likely
from remint.model.lora import add_lora
from remint.model.qlora import Lora, Quantization
from remint.model.quantization import quantize
from remint.runner import recipes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROW = [document([5 + i % 90 for i in range(n)], [i > n // 2 for i in range(n)]) for n in (30, 7, 19)]


def adapted(tiny, fused, dropout=0.0, targets=TARGETS, dequantize="once", checkpointing=False):
    """The tiny model with an adapter whose B is not zero, in training mode."""
    model = tiny.model()
    quantize(model, Quantization("nf4", True, 64, dequantize))
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    loss = SupervisedLoss(add_lora(model, Lora(4, 8, dropout, targets)), fused=fused).train()
    for parameter in loss.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return loss


def step(loss, rows=(ROW,)):
    """Loss and gradients of one packed batch."""
    torch.manual_seed(7)
    value = loss(**collate(rows))
    value.backward()
    return value.item(), {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max() for gradient in theirs.values())
    return max((ours[name] - theirs[name]).abs().max() / scale for name in theirs)


@pytest.mark.parametrize("dequantize", ["once", "each_use"])
@pytest.mark.parametrize("rows", [(ROW,), (ROW, ROW[:1])], ids=["one row", "two rows"])
@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "up_proj"]], ids=["all layers", "two layers"])
def test_loss_and_gradients_are_the_plain_ones(tiny, targets, rows, dequantize):
    ours, gradients = step(adapted(tiny, True, targets=targets, dequantize=dequantize), rows)
    theirs, reference = step(adapted(tiny, False, targets=targets, dequantize=dequantize), rows)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert largest_difference(gradients, reference) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [(ROW,), (ROW, ROW[:1])], ids=["one row", "two rows"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_skipped_pass_draws_what_a_pass_draws(tiny, dropout, rows, checkpointing):
    loss = adapted(tiny, True, dropout, checkpointing=checkpointing)
    step(loss, rows)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), after) is (dropout == 0)
    loss.skip(1)
    assert torch.equal(torch.get_rng_state(), after)


def test_it_is_really_fused(tiny):
    layers = dict(adapted(tiny, True).named_modules())
    fused = [name for name, layer in layers.items() if isinstance(getattr(layer, "forward", None), cpu._Fused)]
    assert len(fused) == 2 * len(TARGETS)


def test_with_dropout_the_gradient_is_that_of_the_same_masks(tiny):
    """Compared with autograd through the formula, with the same dropout mask."""
    torch.manual_seed(3)
    x, w = torch.randn(5, 6, dtype=torch.double, requires_grad=True), torch.randn(4, 6, dtype=torch.double)
    lora_a, lora_b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((2, 6), (4, 2)))
    mask = torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0, 2.0], dtype=torch.double)

    def fused(x, lora_a, lora_b):
        return cpu._AdaptedLinear.apply(x, x * mask, w, lora_a, lora_b, 0.5)

    assert torch.allclose(fused(x, lora_a, lora_b), x @ w.T + 0.5 * ((x * mask) @ lora_a.T @ lora_b.T))
    assert torch.autograd.gradcheck(fused, (x, lora_a, lora_b))


def test_dropout_keeps_its_share_and_the_mean():
    torch.manual_seed(0)
    made = cpu.SharedDropout(0.1, 1)(torch.ones(1000, 1000))
    assert set(made.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).item()}
    assert (made == 0).float().mean().item() == pytest.approx(0.1, abs=0.002)
    assert made.mean().item() == pytest.approx(1, abs=0.002)
    # No pattern along rows or columns: each one is as random as the entire mask.
    assert (made == 0).float().mean(0).std().item() == pytest.approx((0.09 / 1000) ** 0.5, rel=0.15)
    assert (made == 0).float().mean(1).std().item() == pytest.approx((0.09 / 1000) ** 0.5, rel=0.15)


def test_dropout_is_one_for_the_readers_of_an_input_and_new_for_the_next():
    torch.manual_seed(0)
    dropout, x, y = cpu.SharedDropout(0.5, 2), torch.ones(64), torch.ones(64)
    first = dropout(x)
    assert dropout(x) is first
    second = dropout(x)
    assert not torch.equal(second, first)
    assert not torch.equal(dropout(y), second)  # even though another reader of x remains
    torch.manual_seed(0)
    assert torch.equal(cpu.SharedDropout(0.5, 2)(y), first)
    dropout.eval()
    assert dropout(x) is x


def test_recomputed_activations_meet_the_same_masks(tiny):
    once, gradients = step(adapted(tiny, True, dropout=0.3))
    twice, again = step(adapted(tiny, True, dropout=0.3, checkpointing=True))
    assert once == twice
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_dropout_changes_the_loss_in_training_alone(tiny):
    with_dropout, without = adapted(tiny, True, dropout=0.5), adapted(tiny, True)
    assert step(with_dropout)[0] != step(without)[0]
    assert step(with_dropout.eval())[0] == step(without.eval())[0]


@pytest.mark.parametrize("rows", [1, head.ROWS["cpu"], 2 * head.ROWS["cpu"] + 3])
def test_the_head_in_pieces_is_the_cross_entropy(rows):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    targets = torch.randint(50, (rows,))
    results = []
    for loss in (
        lambda h: head.head_loss(h, layer, targets),
        lambda h: F.cross_entropy(layer(h), targets, reduction="sum"),
    ):
        torch.manual_seed(1)
        hidden = torch.randn(rows, 8, requires_grad=True)
        value = loss(hidden)
        (value / 3).backward()
        results.append((value.item(), hidden.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def a_teacher(logits, soft, weight):
    """The base says `logits` (soft, vocabulary) at the positions `soft` (N,); the others have a target."""
    ids, log_probs = most_likely(logits)
    return Teacher((~soft).nonzero().flatten(), soft.nonzero().flatten(), ids, log_probs, weight)


@pytest.mark.parametrize("vocabulary", [TOP, 200])
@pytest.mark.parametrize("rows", [1, head.ROWS["cpu"], 2 * head.ROWS["cpu"] + 3])
def test_the_head_holds_the_model_to_the_base(rows, vocabulary):
    """With a vocabulary of TOP tokens, it is the complete divergence; with more, one of fewer outcomes."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, vocabulary, bias=False).requires_grad_(False)
    targets, soft = torch.randint(vocabulary, (rows,)), torch.rand(rows) < 0.6
    base = 3 * torch.randn(int(soft.sum()), vocabulary)
    teacher = a_teacher(base, soft, 0.7)

    def reference(hidden):
        logits = layer(hidden)
        log_probs, of_base = logits[soft].log_softmax(-1), base.log_softmax(-1)
        if vocabulary > TOP:
            log_probs, of_base = (as_outcomes(values, teacher.ids) for values in (log_probs, of_base))
        held = F.kl_div(log_probs, of_base, reduction="sum", log_target=True)
        return F.cross_entropy(logits[~soft], targets[~soft], reduction="sum") + 0.7 * held

    results = []
    for loss in (lambda h: head.head_loss(h, layer, targets, teacher), reference):
        torch.manual_seed(1)
        hidden = torch.randn(rows, 8, requires_grad=True)
        value = loss(hidden)
        (value / 3).backward()
        results.append((value.item(), hidden.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


def as_outcomes(log_probs, ids):
    """Log-probabilities of the tokens `ids` and, last, of all others together."""
    others = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(1, ids), others], -1)


@pytest.mark.parametrize("targets", [TARGETS, [*TARGETS, "lm_head"]], ids=["frozen head", "adapted head"])
def test_a_batch_that_holds_the_model_to_the_base_is_the_plain_one(tiny, targets):
    """One record learns its targets, two are held to what the base says with its adapter off."""
    losses = [adapted(tiny, fused, targets=targets) for fused in (True, False)]
    with losses[1].model.disable_adapter():
        taught = [dataclasses.replace(doc, base=likely(losses[1], doc)) for doc in ROW[1:]]
    (ours, gradients), (theirs, reference) = (step(loss, [[ROW[0], *taught]]) for loss in losses)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert largest_difference(gradients, reference) < 1e-5
    alone = step(losses[0], [[*taught]])[0]
    assert ours == pytest.approx(step(losses[0], [ROW[:1]])[0] + alone, rel=1e-5)
    assert alone > 0.1  # B is not zero, so the model is away from the base


def test_a_model_that_is_the_base_diverges_nowhere(tiny):
    loss = adapted(tiny, True)
    taught = [dataclasses.replace(doc, base=likely(loss, doc)) for doc in ROW]
    value, gradients = step(loss, [taught])
    assert value == pytest.approx(0, abs=1e-4)
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-3


def likely(loss, doc):
    """What the model says now at the learned positions of a record, as a document holds it."""
    ids, log_probs = loss.eval().most_likely(collate([[doc]]))
    loss.train()
    return ids.numpy().astype(np.int32), log_probs.numpy()


def test_every_recipe_says_which_kernels(in_root):
    assert all(recipes.settings(name)["train"]["kernels"] == "fused" for name in recipes.names())
