"""evaluate.py: losses on fixed samples of text, those of the baselines measured only once."""

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, FixedBatches, looped, small_model, small_tokenizer
from safetensors.torch import load_file, save_file

from data import Batches
from estimates import gap_recovered, mean_loss, paired_difference
from evaluate import EVALUATION_SEED, evaluate, evaluate_baselines, evaluate_columns
from files import UserError
from ouroboros import Ouroboros
from qwen import Qwen
from report import print_results
from sources import TextSource

CPU = torch.device("cpu")


@pytest.fixture
def options():
    return Namespace(seq_len=16, eval_sequences=5)


@pytest.fixture
def columns(pretrained):
    source = TextSource(pretrained.parent / "text.txt")
    return {
        "train": Batches(source, "train", TOKENIZER, 16, seed=EVALUATION_SEED),
        "held-out": Batches(source, "val", TOKENIZER, 16, seed=EVALUATION_SEED),
    }


def test_an_evaluation_has_a_loss_for_each_sequence(pretrained, columns):
    model = looped(Qwen.from_pretrained(pretrained), rank=4, depth=2)
    losses = evaluate(model.loss, columns["held-out"], 5, CPU)
    for n in range(5):
        assert losses[n] == model.loss(*columns["held-out"].batch(n, 1)).item()
    assert mean_loss(losses).mean == pytest.approx(
        model.loss(*columns["held-out"].batch(0, 5)).item(), rel=1e-5
    )
    assert evaluate(model.loss, columns["held-out"], 3, CPU, first=2) == losses[2:]


def test_no_sequence_is_evaluated_twice(pretrained, columns):
    model = looped(Qwen.from_pretrained(pretrained), rank=4, depth=2)
    total = columns["held-out"].at_most(10**6)
    expected = evaluate(model.loss, columns["held-out"], total, CPU)
    assert len(expected) == total
    assert evaluate(model.loss, columns["held-out"], total + 7, CPU) == expected
    assert evaluate(model.loss, columns["held-out"], total, CPU, first=total - 2) == expected[-2:]


def test_an_evaluation_that_takes_long_shows_a_bar(pretrained, columns, options, capsys, monkeypatch):
    model = looped(Qwen.from_pretrained(pretrained), rank=4, depth=2)
    evaluate_baselines(model, None, columns, options, CPU)
    assert capsys.readouterr().err == ""

    monkeypatch.setattr("evaluate.BAR_DELAY", 0)  # as if every evaluation took long
    evaluate_columns(model.loss, columns, options, CPU)
    evaluate_baselines(model, None, columns, Namespace(**{**vars(options), "seq_len": 17}), CPU)
    shown = capsys.readouterr().err
    for name in ("the model, train", "the full model, held-out", "the cut model, train"):
        assert f"evaluating {name}" in shown
    assert "| 0/5" in shown
    assert shown.endswith("\r")  # and nothing is left of it


def test_an_evaluation_leaves_no_gradient(pretrained, columns, options):
    model = looped(Qwen.from_pretrained(pretrained), rank=4, depth=2)
    evaluate_columns(model.loss, columns, options, CPU)
    for p in model.parameters():
        assert p.grad is None


def test_the_baselines_are_the_full_and_the_cut_model(pretrained, columns, options, empty_cache):
    qwen = Qwen.from_pretrained(pretrained)
    model = looped(qwen, rank=4)
    losses = evaluate_baselines(model, qwen, columns, options, CPU)
    assert losses["full"] == evaluate_columns(qwen.loss, columns, options, CPU)
    assert losses["cut"] == evaluate_columns(model.cut.loss, columns, options, CPU)
    assert losses["full"] != losses["cut"]


def test_the_baselines_are_measured_once_and_then_kept(
    pretrained, columns, options, empty_cache, monkeypatch
):
    model = looped(Qwen.from_pretrained(pretrained), rank=4)
    losses = evaluate_baselines(model, None, columns, options, CPU)  # where the full model is not loaded
    (path,) = empty_cache.glob("baseline-losses/*.json")
    assert json.loads(path.read_text()) == losses

    monkeypatch.setattr(Qwen, "hidden", lambda *_: pytest.fail("measured again"))
    assert evaluate_baselines(model, None, columns, options, CPU) == losses

    def assert_measured_again(model, columns, options):
        with pytest.raises(pytest.fail.Exception):
            evaluate_baselines(model, None, columns, options, CPU)

    another_cut = Ouroboros(Qwen.from_pretrained(pretrained), prelude=2, recurrent=3, coda=1, rank=4)
    assert_measured_again(another_cut, columns, options)
    assert_measured_again(model, columns, Namespace(**{**vars(options), "eval_sequences": 6}))
    source = TextSource(Path(pretrained.parent / "text.txt"))
    other_tokens = Batches(source, "val", small_tokenizer(350), 16, seed=EVALUATION_SEED)
    assert_measured_again(model, {**columns, "held-out": other_tokens}, options)


@pytest.mark.parametrize("change", ["rope_theta", "a removed layer"])
def test_a_changed_base_is_measured_again_and_a_moved_one_is_not(
    change, pretrained, columns, options, empty_cache, tmp_path
):
    def baselines(folder):
        qwen = Qwen.from_pretrained(folder)
        return evaluate_baselines(Ouroboros(qwen, rank=4), qwen, columns, options, CPU)

    before = baselines(pretrained)
    moved = pretrained.rename(tmp_path / "moved")
    assert baselines(moved) == before
    assert len(list(empty_cache.glob("baseline-losses/*.json"))) == 1

    if change == "rope_theta":
        config = json.loads((moved / "config.json").read_text())
        (moved / "config.json").write_text(json.dumps({**config, "rope_theta": 99.0}))
    else:
        state = load_file(moved / "model.safetensors")
        state["model.layers.2.mlp.up_proj.weight"] *= 2
        save_file(state, moved / "model.safetensors")
    after = baselines(moved)
    assert after["full"] != before["full"]
    assert (after["cut"] == before["cut"]) == (change == "a removed layer")


def results_of(full, cut, ouroboros):
    """Results of one column: the losses of the sequences of each model."""
    return {"full": {"held-out": full}, "cut": {"held-out": cut}, "ouroboros": {"held-out": ouroboros}}


def test_the_gap_recovered_is_the_share_of_the_way_from_the_cut_to_the_full_model():
    assert gap_recovered(results_of([1.0, 3.0], [3.0, 5.0], [2.0, 3.0]), "held-out").mean == 0.75
    assert gap_recovered(results_of([2.0], [4.0], [4.5]), "held-out").mean == -0.25


def test_the_error_of_a_mean_is_that_of_many_samples():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(10_000, 50, dtype=torch.float64, generator=generator)
    spread = samples.mean(1).std().item()
    errors = [mean_loss(sample.tolist()).error for sample in samples[:200]]
    assert sum(errors) / 200 == pytest.approx(spread, rel=0.03)


def test_the_error_of_a_share_is_that_of_many_samples():
    """A sequence that is hard for one model is hard for all, and the share is not the same everywhere."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    full = 3 + normal(2000, 60)
    cut = full + 2 + 0.5 * normal(2000, 60)
    model = full + 0.4 * (cut - full) + 0.2 * normal(2000, 60)
    shares = []
    errors = []
    for f, c, m in zip(full.tolist(), cut.tolist(), model.tolist()):
        share = gap_recovered(results_of(f, c, m), "held-out")
        shares.append(share.mean)
        errors.append(share.error)
    shares = torch.tensor(shares)
    assert shares.mean().item() == pytest.approx(0.6, abs=0.002)
    assert sum(errors) / len(errors) == pytest.approx(shares.std().item(), rel=0.05)


def test_a_single_loss_has_no_error_and_no_loss_has_no_mean():
    assert str(mean_loss([2.5])) == "2.500"
    assert gap_recovered(results_of([2.0], [4.0], [3.0]), "held-out").percent() == "50.0%"
    assert math.isnan(mean_loss([]).mean)


def test_a_paired_difference_has_no_error_where_all_sequences_differ_alike():
    difference = paired_difference([1.5, 3.5, 7.5], [1.0, 3.0, 7.0])
    assert difference == (0.5, 0.0)
    assert mean_loss([1.0, 3.0, 7.0]).error > 1
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize("full", [4.0, 4.5])
def test_where_the_full_model_is_no_better_than_the_cut_one_there_is_no_share(full, capsys):
    results = results_of([full], [4.0], [3.0])
    assert gap_recovered(results, "held-out") is None
    print_results(small_model(), results, 3)
    assert "no gap: on this text the full model is no better" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_one_line():
    def no_number(ids, targets):
        return torch.tensor(float("nan"))

    options = Namespace(eval_sequences=2)
    with pytest.raises(UserError, match="the model has a loss of nan on held-out text; try --dtype float32"):
        evaluate_columns(no_number, {"held-out": FixedBatches()}, options, "cpu")
