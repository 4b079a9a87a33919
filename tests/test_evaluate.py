"""evaluate.py: losses on fixed samples of text, those of the baselines measured only once."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, FixedBatches, looped, small_model, small_tokenizer
from safetensors.torch import load_file, save_file

from data import Batches
from evaluate import EVALUATION_SEED, evaluate, evaluate_baselines, evaluate_columns, gap_recovered
from files import UserError
from ouroboros import Ouroboros
from qwen import Qwen
from report import print_results
from sources import TextSource

CPU = torch.device("cpu")


@pytest.fixture
def options():
    return Namespace(seq_len=16, eval_sequences=5, batch_size=2)


@pytest.fixture
def columns(pretrained):
    source = TextSource(pretrained.parent / "text.txt")
    return {
        "train": Batches(source, "train", TOKENIZER, 16, seed=EVALUATION_SEED),
        "held-out": Batches(source, "val", TOKENIZER, 16, seed=EVALUATION_SEED),
    }


def test_a_loss_is_the_mean_over_the_sequences_whatever_the_batch_size(pretrained, columns):
    model = looped(Qwen.from_pretrained(pretrained), rank=4, depth=2)
    ids, targets = columns["held-out"].batch(0, 5)
    expected = model.loss(ids, targets).item()
    for batch_size in (1, 2, 5, 8):
        loss = evaluate(model.loss, columns["held-out"], 5, batch_size, CPU)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_no_sequence_is_evaluated_twice(pretrained, columns):
    model = looped(Qwen.from_pretrained(pretrained), rank=4, depth=2)
    total = columns["held-out"].at_most(10**6)
    expected = evaluate(model.loss, columns["held-out"], total, 4, CPU)
    assert evaluate(model.loss, columns["held-out"], total + 7, 4, CPU) == expected


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
    (path,) = empty_cache.glob("baselines/*.json")
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
    assert len(list(empty_cache.glob("baselines/*.json"))) == 1

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


def test_the_gap_recovered_is_the_share_of_the_way_from_the_cut_to_the_full_model():
    results = {"full": {"held-out": 2.0}, "cut": {"held-out": 4.0}, "ouroboros": {"held-out": 2.5}}
    assert gap_recovered(results, "held-out") == 0.75
    results["ouroboros"]["held-out"] = 4.5
    assert gap_recovered(results, "held-out") == -0.25


@pytest.mark.parametrize("full", [4.0, 4.5])
def test_where_the_full_model_is_no_better_than_the_cut_one_there_is_no_share(full, capsys):
    results = {"full": {"held-out": full}, "cut": {"held-out": 4.0}, "ouroboros": {"held-out": 3.0}}
    assert gap_recovered(results, "held-out") is None
    print_results(small_model(), results, 3)
    assert "no gap: on this text the full model is no better" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_one_line():
    def no_number(ids, targets):
        return torch.tensor(float("nan"))

    options = Namespace(eval_sequences=2, batch_size=2)
    with pytest.raises(UserError, match="the model has a loss of nan on held-out text; try --dtype float32"):
        evaluate_columns(no_number, {"held-out": FixedBatches()}, options, "cpu")
