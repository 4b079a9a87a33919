"""The code in CONTRIBUTING.md does what the page says of it."""

import re

import pytest
import torch
from helpers import ROOT, SMALL, TOKENIZER, greedy_without_cache, small_qwen, tokens

from data import Batches
from qwen import rotary_at
from sources import BUILT_IN_SOURCES, open_source


@pytest.fixture
def page(monkeypatch) -> dict:
    """The names that the blocks of the page define, one after the other."""
    monkeypatch.setattr("sources.BUILT_IN_SOURCES", BUILT_IN_SOURCES.copy())
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    return names


def test_the_gate_has_one_opening_for_each_position(page):
    model = page["WithScalarGate"](small_qwen(), rank=4, depth=2)
    rotary = rotary_at(SMALL, 0, 5, "cpu")
    values = model.step_values(torch.randn(2, 5, SMALL.hidden_size), 0, rotary)
    assert values.g.shape == (2, 5, 1)
    model.loss(tokens(), tokens()).backward()
    assert model.gate.linear.weight.grad.abs().sum() > 0


def test_the_pool_sees_no_later_token_and_generation_uses_it(page):
    h = torch.randn(1, 6, 4)
    pooled = page["pair_mean"](h)
    assert torch.equal(pooled[:, 3], (h[:, 2] + h[:, 3]) / 2)
    model = page["WithPairMean"](small_qwen(), rank=4, depth=2)
    torch.nn.init.normal_(model.controller.heads.weight)
    assert torch.equal(model.generate(tokens(), 5), greedy_without_cache(model, tokens(), 5))


def test_the_source_is_found_by_its_name_and_gives_batches(page, empty_cache):
    source = open_source("poems")
    for split, text in (("train", "frog"), ("val", "pond")):
        ids, targets = Batches(source, split, TOKENIZER, length=8).batch(0, 2)
        assert text in TOKENIZER.decode(ids.flatten().tolist())
        assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_the_row_has_a_run_for_each_seed(page):
    runs = page["runs"].runs
    assert list(runs) == [f"depth8 scalar gate seed{seed}" for seed in range(3)]
    assert all(run.model_class is page["WithScalarGate"] for run in runs.values())
