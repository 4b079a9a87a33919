"""experiments/halting.py: when a token may leave the loop, and what that costs."""

import pytest
import torch
from helpers import FixedBatches, small_model, tokens
from torch.distributions import Categorical

from experiments.halting import (
    gain_over_fixed_depth,
    losses_and_changes,
    measure_halting,
    predictions_by_depth,
    steps_taken,
)


def test_the_prediction_after_each_step_is_that_of_a_loop_that_ends_there():
    model = small_model(depth=4)
    predictions = predictions_by_depth(model, tokens(), depth=4)
    for t, log_p in enumerate(predictions):
        assert torch.allclose(log_p, model(tokens(), depth=t + 1).log_softmax(-1), atol=1e-5)


def test_a_token_stops_at_the_first_small_change_or_at_the_last_step():
    changes = torch.tensor([[torch.inf] * 3, [0.5, 0.01, 0.5], [0.02, 0.5, 0.5], [0.5, 0.5, 0.5]])[:, None]
    assert steps_taken(changes, 0.1).tolist() == [[2, 1, 3]]
    assert steps_taken(changes, 0.0).tolist() == [[3, 3, 3]]


def test_the_change_of_a_prediction_is_its_divergence_from_the_one_before():
    model = small_model(depth=3)
    ids, targets = tokens(), tokens(seed=1)
    losses, changes = losses_and_changes(model, ids, targets, depth=3)
    p = [model(ids, depth=t).softmax(-1) for t in (1, 2, 3)]
    divergence = torch.distributions.kl_divergence(Categorical(p[2]), Categorical(p[1]))
    assert torch.allclose(changes[2], divergence, atol=1e-5)
    assert torch.allclose(losses.mean((1, 2))[1], model.loss(ids, targets, depth=2))


def test_no_rule_is_better_than_the_oracle_and_a_fixed_depth_gains_nothing_over_itself():
    model = small_model(depth=4)
    measured = measure_halting(model, FixedBatches(), 6, 4, "cpu")
    for rule in measured["thresholds"].values():
        assert max(rule["steps"]) <= 4 and min(rule["steps"]) >= 2  # the first prediction has none before it
        assert all(loss >= best - 1e-6 for loss, best in zip(rule["loss"], measured["oracle"]["loss"]))

    second = {"steps": [2.0] * 6, "loss": measured["fixed"][1]}
    assert gain_over_fixed_depth(second, measured["fixed"]) == (0.0, 0.0)
    last = {"steps": [4.0] * 6, "loss": measured["fixed"][3]}
    assert gain_over_fixed_depth(last, measured["fixed"]).mean == 0.0
    half = {"steps": [1.5] * 6, "loss": measured["fixed"][0]}
    expected = sum(b - a for a, b in zip(measured["fixed"][0], measured["fixed"][1])) / 6 / 2
    assert gain_over_fixed_depth(half, measured["fixed"]).mean == pytest.approx(expected)
