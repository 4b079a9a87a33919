"""look.py: the values of each step, the terminal and the page."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, small_model, small_qwen

import look
from ouroboros import LoopCache, Ouroboros
from patch import Patched
from qwen import Qwen, load_tokenizer, rotary_at
from support.files import UserError

TOKENIZER = load_tokenizer("tiny")
CONFIG = replace(SMALL, vocab_size=4096)
PROMPT = "def forward(self, x):"
IDS = torch.tensor([TOKENIZER.encode(PROMPT).ids])  # [1, T]
T = IDS.shape[1]
KINDS = {
    "paper": (Ouroboros, {}),
    "mean of the sequence": (Ouroboros, {"pool": "sequence", "step_norm": False}),
    "static": (Ouroboros, {"modulation": "static"}),
    "nothing": (Ouroboros, {"modulation": "none", "gate": False}),
    "patched": (Patched, {"modulation": "controller"}),
}


def assert_close(values, expected):
    """The values are rounded to four digits."""
    torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-3, atol=1e-8)


def looped_model(kind=Ouroboros, **settings):
    qwen = small_qwen(config=CONFIG)
    qwen.embed_tokens.weight *= 0.2  # so that no token is certain
    return small_model(kind=kind, qwen=qwen, **{"depth": 2, **settings})


# ---- The values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_step_predicts_what_the_model_predicts_whose_loop_ends_there(kind):
    model_class, settings = KINDS[kind]
    model = looped_model(model_class, **settings)
    values, _ = look.look_inside(model, TOKENIZER, PROMPT, depth=3)  # one more than the model's own
    assert len(values["steps"]) == 3
    for t, step in enumerate(values["steps"]):
        p = model(IDS, depth=t + 1)[0].softmax(-1)  # [T, V]
        likeliest_p, likeliest = p.topk(3)
        assert_close(step["p"], likeliest_p)
        assert step["would_say"] == look.texts_of(TOKENIZER, likeliest.tolist())
        assert_close(step["next_p"][:-1], p[:-1].gather(-1, IDS[0, 1:, None])[:, 0])
        assert step["next_p"][-1] is None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_opening_movement_and_diagonals_are_those_of_the_equations(kind):
    model_class, settings = KINDS[kind]
    model = looped_model(model_class, **settings)
    values, diagonals = look.look_inside(model, TOKENIZER, PROMPT)
    rotary = rotary_at(CONFIG, 0, T, "cpu")
    h = model.run_prelude(model.embed_tokens(IDS), rotary, LoopCache([None, None], [], []))
    for t, step in enumerate(values["steps"]):
        m = model.diagonals(h, t) or {}
        h_new = model.recurrent(h, rotary, None, model.modulated_by(m or None))
        if model.step_norm is not None:
            h_new = F.rms_norm(h_new, [32], eps=CONFIG.rms_norm_eps) * model.step_norm.weight[t]
        g = torch.ones(32)
        if model.gate is not None:
            g = model.gate.linear(torch.cat([h_new, h], dim=-1)).sigmoid()
        if kind == "patched":
            g = model.opening[t]
        h_after = g * h_new + (1 - g) * h
        assert_close(step["opening"], g.expand_as(h).mean(-1)[0])
        assert_close(step["movement"], ((h_after - h).norm(dim=-1) / h.norm(dim=-1))[0])
        h = h_after

        assert diagonals.shape == (T, 2, len(m), 4)
        assert_close(step["sizes"], diagonals[:, t].square().mean(-1).sqrt())
        for i, k in enumerate(m):
            assert torch.allclose(diagonals[:, t, i], m[k].expand(1, T, 4)[0], atol=1e-5)


# ---- The command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    model = Ouroboros(Qwen.from_pretrained("tiny"), depth=2, rank=4)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.controller.heads.weight)  # at zero there is no modulation
    model.save(folder / "step-0000001")
    return folder


def data_of(page: Path) -> dict:
    """The JSON in a page."""
    return json.loads(re.search('id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_the_command_prints_what_the_page_holds(run, capsys):
    prompt = f"{PROMPT}\n\udcff"  # a byte that is no UTF-8
    look.main([str(run), "--prompt", prompt, "--tokens", "2", "--depth", "3", "--device", "cpu"])
    printed = capsys.readouterr().out
    data = data_of(run / "look.html")
    assert printed.splitlines()[:2] == data["summary"]

    tables = re.findall(r"^step  would say.*\n(?: +\d .*\n)+", printed, re.MULTILINE)
    assert len(tables) == 2  # two tokens
    header, *rows = tables[1].splitlines()
    assert header.split()[-7:] == data["projections"] == look.NAMES
    assert len(rows) == 3
    step = data["steps"][2]
    last_row = rows[-1].split()
    assert last_row[-10:-7] == ["-", f"{step['opening'][-1]:.2f}", f"{step['movement'][-1]:.2f}"]
    assert last_row[-7:] == [f"{size:.2f}" for size in step["sizes"][-1]]
    assert "".join(data["tokens"]) == f"{PROMPT}\\n?"


def test_no_text_can_leave_its_place_in_the_page_and_the_page_asks_nobody(tmp_path):
    page = tmp_path / "look.html"
    hostile = "</script><script>alert(1)</script><!--<script>"
    look.write_page(page, {"tokens": [hostile]})
    assert data_of(page) == {"tokens": [hostile]}
    template = look.TEMPLATE.read_text()
    for tag in ("<script", "</script", "<!--"):
        assert page.read_text().count(tag) == template.count(tag)
    for word in ("innerHTML", "http:", "https:", " src=", "<link", "@import", "url(", "fetch("):
        assert word not in template


def test_what_a_person_can_mend_is_a_user_error(run, tmp_path):
    with pytest.raises(UserError, match="--prompt is empty"):
        look.main([str(run), "--prompt", ""])
    with pytest.raises(UserError, match="is a folder"):
        look.main([str(run), "--prompt", "a", "--page", str(tmp_path)])
    model = looped_model()
    model.step_norm.weight.data[1] = torch.nan
    with pytest.raises(UserError, match="step 2 of the loop is not finite"):
        look.look_inside(model, TOKENIZER, PROMPT)
