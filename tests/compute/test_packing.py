"""Packing changes only the speed: no record is cut, lost or visible to another one, and the loss is the same."""

import random

import numpy as np
import pytest
import torch

from remint.compute.loss import SupervisedLoss, mean_loss
from remint.compute.packing import IGNORED, collate, cut, document, encode, epoch_rows, pack


@pytest.mark.parametrize("seed", range(20))
def test_every_record_lies_whole_in_one_row(seed):
    chance = random.Random(seed)
    limit = chance.randint(8, 300)
    lengths = [chance.randint(1, limit) for _ in range(chance.randint(1, 400))]
    rows = pack(lengths, limit)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= limit for row in rows)
    # Best fit never leaves two rows that would go into one.
    fill = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > limit


def test_a_known_packing():
    assert sorted(map(sorted, pack([6, 4, 3, 7, 5, 5], 10))) == [[0, 1], [2, 3], [4, 5]]


def test_targets_are_the_next_learned_tokens():
    made = document([7, 8, 9, 5], [False, False, True, True])
    assert made.targets.tolist() == [IGNORED, 9, 5, IGNORED]
    assert made.learned == 2


def test_a_record_too_long_is_cut_without_losing_a_target():
    whole = document(list(range(1, 26)), [True] * 25)
    pieces = cut([whole], 8)
    assert max(len(piece.ids) for piece in pieces) <= 8
    assert sum(piece.learned for piece in pieces) == whole.learned
    assert np.concatenate([piece.ids for piece in pieces]).tolist() == whole.ids.tolist()


def test_order_is_a_function_of_seed_and_epoch():
    lengths = list(range(5, 60))
    assert epoch_rows(lengths, 64, True, 1, 0) == epoch_rows(lengths, 64, True, 1, 0)
    assert epoch_rows(lengths, 64, True, 1, 0) != epoch_rows(lengths, 64, True, 1, 1)
    assert epoch_rows(lengths, 64, True, 1, 0) != epoch_rows(lengths, 64, True, 2, 0)


def rows_of(tiny, count=12):
    texts = [("What is " + "x" * (3 * n) + "?", "It is " + "y" * n + "。") for n in range(count)]
    records = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in texts]
    return encode(tiny.tokenizer, tiny.conversation, records)


def test_packed_and_unpacked_give_the_same_loss(tiny):
    documents, loss = rows_of(tiny), SupervisedLoss(tiny.model())

    def total(rows):
        with torch.no_grad():
            return loss(**collate([[documents[index] for index in row] for row in rows])).item()

    alone = sum(total([[index]]) for index in range(len(documents)))
    packed = total(pack([len(doc.ids) for doc in documents], 200))
    padded = total([[index] for index in range(len(documents))])
    learned = sum(doc.learned for doc in documents)
    assert packed / learned == pytest.approx(alone / learned, abs=1e-5)
    assert padded / learned == pytest.approx(alone / learned, abs=1e-5)
    assert mean_loss(loss, documents, 200) == pytest.approx(alone / learned, abs=1e-5)


def test_it_is_the_loss_of_transformers(tiny):
    made, model = rows_of(tiny)[5], tiny.model()
    labels = torch.full((1, len(made.ids)), IGNORED)
    labels[0, 1:] = torch.from_numpy(made.targets[:-1].astype(np.int64))
    ids = torch.from_numpy(made.ids.astype(np.int64))[None]
    with torch.no_grad():
        reference = model(input_ids=ids, labels=labels).loss.item()
    assert mean_loss(SupervisedLoss(model), [made], 512) == pytest.approx(reference, abs=1e-5)


def test_a_record_does_not_see_its_neighbours(tiny):
    documents, model = rows_of(tiny), tiny.model()
    first = collate([[documents[3], documents[5]]])
    other = collate([[documents[4], documents[5]]])
    size = len(documents[5].ids)
    with torch.no_grad():
        hidden = [
            model.model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state[0, -size:]
            for batch in (first, other)
        ]
    assert torch.allclose(*hidden, atol=1e-5)
