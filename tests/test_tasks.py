"""The tasks and the n-gram tables: models and texts with known answers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.ngrams import Bigrams, Unigrams
from experiments.tasks import COPIES, COPY_LENGTH, binomial, choices, copying

V = 11  # tokens in the vocabulary
SURE = 20.0  # a logit that leaves the others no probability


class CountingText:
    """Sequence n counts upwards from n: each token is the one before it plus 1, modulo V."""

    def at_most(self, limit: int) -> int:
        return limit

    def batch(self, first: int, size: int, device):
        ids = (torch.arange(100) + first) % V
        return ids[None], (ids[None] + 1) % V


def counting_model(step: int):
    """A model that is sure that each token is the one before it plus `step`."""

    def logits(ids):
        return SURE * F.one_hot((ids + step) % V, V).float()

    return logits


def copying_model(ids):
    """A model that is sure of what followed the last earlier occurrence at a distance of COPY_LENGTH - 1."""
    B, T = ids.shape
    logits = torch.zeros(B, T, V)
    for t in range(COPY_LENGTH - 1, T):
        logits[:, t] = SURE * F.one_hot(ids[:, t - COPY_LENGTH + 1], V)
    return logits


def uniform_model(ids):
    """A model that knows nothing."""
    return torch.zeros(*ids.shape, V)


# ---- Choice ----------------------------------------------------------------------------------------------


def test_a_model_of_the_text_always_chooses_the_true_continuation():
    assert choices(counting_model(1), CountingText(), 0, V, "cpu") == [1] * V


def test_a_model_that_takes_the_next_text_for_the_continuation_never_chooses_the_true_one():
    def always_one_ahead(ids):
        logits = counting_model(1)(ids)
        position_64 = (ids[:, 63] + 2) % V  # where the continuation of the next sequence begins
        logits[:, 63] = SURE * F.one_hot(position_64, V)
        return logits

    assert choices(always_one_ahead, CountingText(), 0, V, "cpu") == [0] * V


def test_the_error_of_choices_is_binomial():
    share = binomial([1, 1, 1, 0])
    assert share.mean == 0.75
    assert share.error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


# ---- Copying ---------------------------------------------------------------------------------------------


def test_a_model_that_copies_is_always_right_and_one_that_knows_nothing_has_the_loss_of_chance():
    losses, accuracies = copying(copying_model, V, "cpu")
    assert len(losses) == len(accuracies) == COPIES
    assert max(losses) < 1e-6
    assert min(accuracies) == 1.0

    losses, accuracies = copying(uniform_model, V, "cpu")
    assert losses == pytest.approx([math.log(V)] * COPIES)
    assert 0 < sum(accuracies) / COPIES < 0.3


# ---- n-grams ---------------------------------------------------------------------------------------------

TEXT = np.array([0, 1, 0, 1, 0, 2], dtype=np.uint16)


def loss(table, first: int, second: int) -> float:
    return table.loss(torch.tensor([[first]]), torch.tensor([[second]])).item()


def test_a_unigram_is_its_count_plus_one():
    table = Unigrams(TEXT, 4)
    assert math.exp(-loss(table, 1, 0)) == pytest.approx((3 + 1) / (6 + 4))
    assert math.exp(-loss(table, 1, 3)) == pytest.approx(1 / 10)  # never seen
    assert sum(math.exp(-loss(table, 0, b)) for b in range(4)) == pytest.approx(1)


def test_a_bigram_is_its_count_mixed_with_the_unigram():
    table = Bigrams(TEXT, 4, k=2)
    assert math.exp(-loss(table, 0, 1)) == pytest.approx((2 + 2 * 0.3) / (3 + 2))
    assert math.exp(-loss(table, 3, 0)) == pytest.approx(0.4)  # nothing is known after 3 but the unigram
    for a in range(4):
        assert sum(math.exp(-loss(table, a, b)) for b in range(4)) == pytest.approx(1)


def test_the_loss_of_a_table_is_the_mean_over_the_targets():
    table = Bigrams(TEXT, 4, k=2)
    both = table.loss(torch.tensor([[0, 3]]), torch.tensor([[1, 0]])).item()
    assert both == pytest.approx((loss(table, 0, 1) + loss(table, 3, 0)) / 2)
