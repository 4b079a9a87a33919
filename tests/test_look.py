"""inside.py and look.py: what happens in the loop, in the terminal and on a page."""

import itertools
import json
import math
import re
import shutil
import subprocess
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    SETTINGS,
    SMALL,
    TOKENIZER,
    assert_refused_at_once,
    looped,
    move_trained_weights,
    run,
    small_model,
    small_qwen,
    succeed,
    tokens,
)

import look
from experiments.inside_picture import directions, draw
from files import UserError
from inside import compare, look_inside, stacked_diagonals
from ouroboros import LoopCache
from qwen import Qwen, rotary_at

HOSTILE = "</script><script>alert(1)</script><!--<script>"  # some vocabularies have a whole tag in a token


def prompt_of(text: str, depth=None, **settings) -> look.Prompt:
    """What a small model with the vocabulary of TOKENIZER does with a prompt."""
    qwen = small_qwen(config=replace(SMALL, vocab_size=400))
    model = looped(qwen, rank=4, **{"depth": 3, **settings})
    move_trained_weights(model, 0.1)
    return look.read_prompt(model, TOKENIZER, text, Namespace(run="RUN", depth=depth))


def data_of(page: str) -> dict:
    """The JSON in a page."""
    return json.loads(re.search('id="data">(.*?)</script>', page, re.DOTALL)[1])


# ---- The values ------------------------------------------------------------------------------------------


def before_loop(model, ids):
    """The state [B, T, d] that the loop begins with, and the rotary angles."""
    rotary = rotary_at(SMALL, 0, ids.shape[1], "cpu")
    no_cache = LoopCache([None] * len(model.prelude), [], [])
    return model.run_prelude(model.embed_tokens(ids), rotary, no_cache), rotary


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_predicts_what_the_model_predicts_whose_loop_ends_there(name):
    model = small_model(**SETTINGS[name])
    ids = tokens(1)
    steps = look_inside(model, ids[0], depth=4)  # one more than the model's own
    assert len(steps) == 4
    for t, step in enumerate(steps):
        p = model(ids, depth=t + 1)[0].softmax(-1)  # [T, V]
        assert torch.allclose(step.likeliest_p, p.topk(3).values, atol=1e-5)
        assert torch.allclose(step.likeliest_p, p.gather(-1, step.likeliest), atol=1e-5)
        for i in range(11):
            assert step.next_p[i].item() == pytest.approx(p[i, ids[0, i + 1]].item(), abs=1e-5)
        assert math.isnan(step.next_p[11])


@pytest.mark.parametrize("name", SETTINGS)
def test_opening_movement_and_diagonals_are_those_of_the_step(name):
    model = small_model(**SETTINGS[name])
    ids = tokens(1)
    h, rotary = before_loop(model, ids)
    for t, step in enumerate(look_inside(model, ids[0])):
        m, g, h_after = model.step_values(h, t, rotary)
        for i in range(12):
            opening = g if isinstance(g, float) else g.expand(1, 12, 32)[0, i].mean()
            assert torch.allclose(step.opening[i], torch.as_tensor(opening), atol=1e-6)
            moved = (h_after - h)[0, i].norm() / h[0, i].norm()
            assert torch.allclose(step.movement[i], moved, rtol=1e-4)
            for k in m or {}:
                assert torch.allclose(step.diagonals[k][i], m[k].expand(1, 12, 4)[0, i], atol=1e-6)
        assert len(step.diagonals) == (0 if m is None else 7)
        h = h_after


def test_an_update_is_measured_against_what_the_projection_gives_by_itself():
    model = small_model()
    ids = tokens(1)
    h, _ = before_loop(model, ids)
    x = model.recurrent.input_layernorm(h)
    (step, *_) = look_inside(model, ids[0])
    lora, projection = model.lora["q_proj"], model.recurrent.self_attn.q_proj
    for i in range(12):
        update = 16 / 4 * lora.B @ torch.diag(step.diagonals["q_proj"][i]) @ lora.A @ x[0, i]
        expected = update.norm() / projection(x[0, i]).norm()
        assert torch.allclose(step.updates["q_proj"][i], expected, rtol=1e-3)


def test_a_new_model_has_no_modulation_yet():
    for step in look_inside(small_model(randomise=False), tokens(1)[0]):
        for k, diagonal in step.diagonals.items():
            assert diagonal.abs().max() == 0
            assert step.updates[k].max() == 0
        assert torch.allclose(step.opening, torch.sigmoid(torch.tensor(-2.0)))


def test_the_last_tokens_have_the_same_values_without_those_before_them():
    model = small_model()
    ids = tokens(1)[0]
    for whole, end in zip(look_inside(model, ids), look_inside(model, ids, last=5)):
        for name in ("likeliest_p", "opening", "movement"):
            assert torch.equal(getattr(end, name), getattr(whole, name)[-5:])
        assert torch.equal(end.next_p[:4], whole.next_p[-5:-1])
        for k in end.diagonals:
            assert torch.equal(end.diagonals[k], whole.diagonals[k][-5:])
            assert torch.equal(end.updates[k], whole.updates[k][-5:])


def test_a_bfloat16_model_gives_float32_values():
    for step in look_inside(small_model(torch.bfloat16), tokens(1)[0]):
        for value in (step.likeliest_p, step.next_p, step.opening, step.movement, *step.diagonals.values()):
            assert value.dtype == torch.float32


# ---- Comparing texts -------------------------------------------------------------------------------------


def test_differences_are_those_of_all_pairs():
    diagonals = torch.randn(4, 3, 7, 5)  # texts, steps, projections, rank
    comparison = compare(diagonals)

    squares = [(a - b).square() for a, b in itertools.combinations(diagonals, 2)]
    squares = torch.stack(squares)
    assert torch.allclose(comparison.difference, squares.mean((0, 3)).sqrt(), atol=1e-5)
    assert comparison.between_texts == pytest.approx(squares.mean().sqrt().item(), rel=1e-4)

    squares = [(diagonals[:, t] - diagonals[:, s]).square() for t, s in itertools.combinations(range(3), 2)]
    assert comparison.between_steps == pytest.approx(torch.stack(squares).mean().sqrt().item(), rel=1e-4)

    size = diagonals.mean(0).square().mean(-1).sqrt()
    assert torch.allclose(comparison.size, size)
    assert torch.allclose(comparison.ratio, comparison.difference / size)


def test_a_static_table_gives_every_text_the_same_diagonals_and_a_controller_does_not():
    for modulation, same in (("static", True), ("controller", False)):
        model = small_model(modulation=modulation)
        means = [stacked_diagonals(look_inside(model, tokens(1, seed=n)[0])).mean(0) for n in (1, 2)]
        comparison = compare(torch.stack(means))
        assert (comparison.between_texts < 1e-6) == same
        assert comparison.between_steps > 0.01


def test_two_prompts_are_compared_by_the_means_of_their_tokens():
    prompts = [prompt_of("one text"), prompt_of("another text, which is longer")]
    means = []
    for prompt in prompts:
        of_steps = [step.diagonals["v_proj"].mean(0) for step in prompt.steps]
        means.append(torch.stack(of_steps))
    expected = (means[0] - means[1]).square().mean(-1).sqrt()
    assert torch.allclose(look.compare_prompts(prompts).difference[:, 2], expected, rtol=1e-4)


def test_with_one_step_there_are_no_steps_to_compare_and_without_diagonals_nothing():
    one_step = [prompt_of("one text", depth=1)]
    comparison = look.compare_prompts(one_step)
    assert comparison.between_steps is None
    assert "two steps" not in look.summary("RUN", one_step, comparison)[1]
    assert look.compare_prompts([prompt_of("a")]) is None  # one token
    no_diagonals = [prompt_of("one text", modulation="none")]
    assert look.compare_prompts(no_diagonals) is None
    assert len(look.summary("RUN", no_diagonals, None)) == 1


# ---- The terminal ----------------------------------------------------------------------------------------


def test_every_character_of_a_token_can_be_seen():
    ids = TOKENIZER.encode("a\n\tb \x1b[31m").ids
    assert "".join(look.text_of(TOKENIZER, token) for token in ids) == "a\\n\\tb \\x1b[31m"
    end = TOKENIZER.token_to_id("<|endoftext|>")
    assert look.text_of(TOKENIZER, end) == "<|endoftext|>"
    for piece in TOKENIZER.encode("é").ids:
        assert look.text_of(TOKENIZER, piece) == "\N{REPLACEMENT CHARACTER}"


def test_wide_and_combining_characters_take_their_columns():
    assert look.padded("日本", 6) == "日本  "
    assert look.padded("e\N{COMBINING ACUTE ACCENT}", 3) == "e\N{COMBINING ACUTE ACCENT}  "


def test_the_terminal_has_a_table_with_aligned_rows_for_each_of_the_last_tokens(capsys):
    prompt = prompt_of("a text\n\twith more lines")
    look.print_prompt("Prompt 1", prompt, 4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"Prompt 1: the last 4 of {len(prompt.tokens)} tokens"
    headers = [line for line in lines if line.startswith("step")]
    rows = [line for line in lines if re.match(r" +\d ", line)]
    assert len(headers) == 4
    assert len(rows) == 4 * 3  # steps
    assert {len(line) for line in headers + rows} == {len(headers[0])}
    assert headers[0].split()[-7:] == look.NAMES

    last = rows[-1].split()
    assert f"{prompt.steps[2].likeliest_p[-1, 0]:.2f}" == last[1]
    assert last[-10] == "-"  # no token follows the last one
    for k, size in zip(prompt.steps[2].diagonals, last[-7:]):
        assert size == f"{prompt.steps[2].diagonals[k][-1].square().mean().sqrt():.2f}"


def test_the_sentence_counts_the_tokens_whose_first_prediction_is_the_last_one():
    prompt = prompt_of("a text with some more words in it")
    settled = 0
    for i in range(len(prompt.tokens)):
        settled += prompt.would_say[0][i][0] == prompt.would_say[2][i][0]
    assert 0 < settled < len(prompt.tokens)
    (sentence,) = look.summary("RUN", [prompt], None)
    assert f"for {settled} of {len(prompt.tokens)} tokens" in sentence
    opening = sum(step.opening.mean() for step in prompt.steps) / 3
    assert f"takes over {opening:.0%}" in sentence


# ---- The page --------------------------------------------------------------------------------------------


def hostile_prompt() -> look.Prompt:
    """A prompt each of whose tokens would leave the element that holds it."""
    prompt = prompt_of("a text")
    return prompt._replace(tokens=[HOSTILE] * len(prompt.tokens))


def page_of(folder: Path, *prompts: look.Prompt) -> str:
    """The page of these prompts."""
    comparison = look.compare_prompts(prompts)
    data = look.page_data(look.summary("RUN", prompts, comparison), prompts, comparison)
    look.write_page(folder / "look.html", data)
    return (folder / "look.html").read_text()


def test_the_page_has_the_values_of_the_prompt(tmp_path):
    prompt = prompt_of("a text\nof two lines")
    (shown,) = data_of(page_of(tmp_path, prompt))["prompts"]
    assert shown["tokens"] == prompt.tokens
    assert len(shown["steps"]) == 3
    for step, values in zip(prompt.steps, shown["steps"]):
        assert values["opening"] == pytest.approx(step.opening.tolist(), rel=1e-3)
        assert values["next_p"][:-1] == pytest.approx(step.next_p[:-1].tolist(), rel=1e-3)
        assert values["next_p"][-1] is None  # nan is not JSON
        assert values["updates"][6] == pytest.approx(step.updates["down_proj"].tolist(), rel=1e-3)


def test_the_page_asks_nobody_for_anything(tmp_path):
    page = page_of(tmp_path, prompt_of("a text")).lower()
    for request in ("http:", "https:", "//cdn", " src=", "<link", "@import", "url(", "fetch(", "import("):
        assert request not in page
    assert "default-src 'none'" in page


def test_a_text_cannot_leave_its_place_in_the_page(tmp_path):
    page = page_of(tmp_path, hostile_prompt())
    template = (ROOT / "look.html").read_text()
    for tag in ("<script", "</script", "<!--"):
        assert page.count(tag) == template.count(tag)
    assert data_of(page)["prompts"][0]["tokens"][0] == HOSTILE
    assert "innerHTML" not in template


def test_the_page_shows_the_end_of_a_long_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "PAGE_TOKENS", 5)
    text = "a text with some more words in it"
    (shown,) = data_of(page_of(tmp_path, prompt_of(text)))["prompts"]
    assert len(shown["tokens"]) == len(shown["steps"][0]["opening"]) == 5
    assert shown["left_out"] == len(TOKENIZER.encode(text).ids) - 5
    assert text.endswith("".join(shown["tokens"]))


def test_the_page_lies_in_the_folder_of_the_run_or_where_it_is_told(tmp_path):
    checkpoint = tmp_path / "run" / "step-0000100"
    checkpoint.mkdir(parents=True)
    for run_name in (checkpoint, checkpoint.parent):
        options = Namespace(run=str(run_name), page=None)
        assert look.page_path(options) == tmp_path / "run" / "look.html"
    assert look.page_path(Namespace(run="owner/name", page=None)) == Path("look.html")  # of the Hub
    assert look.page_path(Namespace(run="owner/name", page=Path("a.html"))) == Path("a.html")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_shows_the_page(tmp_path):
    prompt = hostile_prompt()
    page_of(tmp_path, prompt, prompt_of("another text"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
    command += ["--dump-dom", f"file://{tmp_path}/look.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    shown = shown[
        : shown.index('<script type="application/json"')
    ]  # what the script has made, without the script itself
    assert shown.count('role="option"') == len(prompt.tokens) + len(TOKENIZER.encode("another text").ids)
    assert shown.count("<table") == 3 + 3  # of the chosen token, and of the comparison
    assert "<script" not in shown
    assert "&lt;/script&gt;" in shown


# ---- The program -----------------------------------------------------------------------------------------


def test_the_program_compares_two_prompts_and_writes_the_page(pretrained, tmp_path):
    model = looped(Qwen.from_pretrained(pretrained), rank=4, depth=2)
    move_trained_weights(model, 0.1)
    model.save(tmp_path / "run")
    options = ["--prompt", "doc1 doc1", "--prompt", "doc22", "--tokens", 2, "--depth", 3, "--device", "cpu"]
    printed = succeed("look.py", tmp_path / "run", *options)
    sentences = printed.splitlines()[:2]
    assert "3 steps" in sentences[0]
    assert "two prompts differ" in sentences[1]
    assert printed.count("would say  ") == 4  # two tokens of each prompt
    assert "The difference of two prompts" in printed
    data = data_of((tmp_path / "run" / "look.html").read_text())
    assert data["summary"] == sentences
    assert len(data["prompts"]) == 2
    assert len(data["comparison"]["ratio"]) == 3


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("prompts", ["a", "b", "c"], "--prompt is given 3 times"),
        ("tokens", 0, "--tokens 0"),
        ("depth", -1, "--depth -1"),
        ("page", Path("."), "--page .: is a folder"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(option, value, message):
    options = {"prompts": ["a"], "tokens": 12, "depth": None, "page": None, option: value}
    with pytest.raises(UserError, match=message):
        look.check_options(Namespace(**options))


def test_a_run_that_is_not_there_is_refused_in_one_line(tmp_path):
    assert_refused_at_once(run("look.py", tmp_path / "none", "--prompt", "a"), "no such run")


def test_an_empty_prompt_and_a_model_without_numbers_are_refused():
    with pytest.raises(UserError, match="--prompt is empty"):
        prompt_of("")
    model = small_model()
    model.step_norm.weight.data[1] = torch.nan
    options = Namespace(run="RUN", depth=None)
    with pytest.raises(UserError, match="step 2 of the loop gives values that are not finite"):
        look.read_prompt(model, TOKENIZER, "!!", options)


# ---- The picture of RESULTS.md ---------------------------------------------------------------------------


def test_diagonals_that_only_grow_and_shrink_together_have_one_direction():
    together = torch.randn(5, 3, 1, 1) * torch.randn(7, 4)  # texts, steps, projections, rank
    assert directions(together) == 1
    independent = torch.zeros(5, 3, 7, 4)
    independent[0, 0, 0, 0] = independent[1, 1, 1, 1] = independent[2, 2, 2, 2] = 1
    assert directions(independent) == 3
    assert directions(independent, share=0.5) == 2


def test_the_picture_is_drawn_from_a_comparison(tmp_path):
    draw(compare(torch.randn(4, 3, 7, 5)), tmp_path / "inside.png")
    assert (tmp_path / "inside.png").read_bytes().startswith(b"\x89PNG")
