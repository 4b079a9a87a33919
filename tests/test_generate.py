"""Generation: the cache changes no token, a text ends where it should, and sample.py continues a prompt."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from helpers import (
    ROOT,
    SETTINGS,
    SMALL,
    TOKENIZER,
    assert_refused_at_once,
    greedy_without_cache,
    looped,
    move_trained_weights,
    run,
    small_model,
    small_qwen,
    succeed,
    tokens,
)

from device import pick_dtype
from files import UserError
from generation import nucleus
from ouroboros import Ouroboros
from patch import full_model_of, load_run
from qwen import Qwen, load_tokenizer
from sample import print_continuation, prompts_in, typed_prompts

# ---- The cache -------------------------------------------------------------------------------------------


def model_named(name: str, dtype=torch.float32):
    """A plain decoder, the cut of a looped model, or a looped model with the settings of this name."""
    if name == "plain":
        return small_qwen(dtype=dtype)
    if name == "cut":
        return small_model(dtype).cut
    return small_model(dtype, **SETTINGS[name])


def sample(model, prompts, n: int, **options):
    """n tokens drawn with seed 0 at a temperature at which they vary. [B, T] -> [B, n]"""
    torch.manual_seed(0)
    return model.generate(prompts, n, temperature=3.0, **options)[:, prompts.shape[1] :]


def sample_without_cache(model, prompts, n: int, **options):
    """The same, where the model reads everything again for each token."""
    torch.manual_seed(0)
    ids = prompts
    for _ in range(n):
        p = (model(ids, **options)[:, -1] / 3.0).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    return ids[:, prompts.shape[1] :]


@pytest.mark.parametrize("name", ["plain", "cut"])
def test_the_cache_changes_no_token_of_a_plain_model(name):
    model = model_named(name, torch.float64)
    prompts = tokens()
    assert torch.equal(model.generate(prompts, 12), greedy_without_cache(model, prompts, 12))
    drawn = sample(model, prompts, 12)
    assert torch.equal(drawn, sample_without_cache(model, prompts, 12))
    assert len(drawn.unique()) > 5


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_cache_changes_no_token_of_the_looped_model(name, depth):
    model = model_named(name)
    prompts = tokens()
    expected = greedy_without_cache(model, prompts, 12, depth=depth)
    assert torch.equal(model.generate(prompts, 12, depth=depth), expected)

    model = model_named(name, torch.float64)
    drawn = sample(model, prompts, 12, depth=depth)
    assert torch.equal(drawn, sample_without_cache(model, prompts, 12, depth=depth))
    assert len(drawn.unique()) > 5


def test_the_cache_changes_no_token_of_a_trained_model():
    """Its likeliest tokens vary, while those of a random model hardly do."""
    model = Ouroboros(Qwen.from_pretrained("tiny"), rank=4, depth=3)
    move_trained_weights(model, 0.01)
    prompts = tokens(vocabulary=4096)
    generated = model.generate(prompts, 12)
    assert torch.equal(generated, greedy_without_cache(model, prompts, 12))
    assert len(generated[:, 12:].unique()) > 5


@pytest.mark.parametrize("name", ["plain", "cut", *SETTINGS])
def test_a_cache_can_be_fed_in_pieces(name):
    model = model_named(name, torch.float64)
    cache = model.new_cache()
    if name == "sequence pool":  # there, a new token changes the states of all earlier ones
        assert cache is None
        return

    ids = tokens(T=11)
    logits = [model(piece, cache=cache) for piece in ids.split([4, 1, 6], dim=1)]
    assert torch.allclose(torch.cat(logits, dim=1), model(ids), atol=1e-9)


def test_a_cache_of_another_depth_is_not_used():
    model = small_model()
    with pytest.raises(AssertionError, match="the cache was made for another depth"):
        model(tokens(), cache=model.new_cache(depth=2), depth=3)


# ---- The end of a text -----------------------------------------------------------------------------------


def test_generation_stops_at_an_end_token():
    prompt = tokens(B=1)
    free = sample(small_qwen(), prompt, 12)[0].tolist()
    end = free[3]
    assert end not in free[:3]
    ending = small_qwen(config=replace(SMALL, eos_token_id=(96, end)))
    assert sample(ending, prompt, 12)[0].tolist() == free[:4]


def test_a_text_that_has_ended_is_filled_up_while_others_go_on():
    prompts = tokens(B=2)
    free = sample(small_qwen(), prompts, 12).tolist()
    end = free[0][2]
    assert free[0].count(end) == 1
    assert end not in free[1]

    ending = small_qwen(config=replace(SMALL, eos_token_id=(end,)))
    first, second = sample(ending, prompts, 12).tolist()
    assert first == free[0][:3] + [end] * 9
    assert second == free[1]


def test_all_places_that_name_an_end_token_count(pretrained):
    """config.json, generation_config.json, and what stands between the documents of a training text."""
    config = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    (pretrained / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, 5]}))
    assert TOKENIZER.token_to_id("<|endoftext|>") == 0
    assert Qwen.from_pretrained(pretrained).config.eos_token_id == (7, 9, 5, 0)


# ---- Temperature -----------------------------------------------------------------------------------------


def test_a_high_temperature_varies_and_a_low_one_takes_the_likeliest_token():
    qwen = small_qwen()
    prompt = tokens(B=1)
    torch.manual_seed(0)
    draws = torch.cat([qwen.generate(prompt, 4, temperature=5.0) for _ in range(5)])
    assert len(draws.unique(dim=0)) > 1
    assert torch.equal(qwen.generate(prompt, 4, temperature=1e-4), qwen.generate(prompt, 4))


def test_tokens_are_drawn_with_the_probabilities_of_the_temperature():
    qwen = small_qwen()
    prompt = tokens(B=1, T=2)
    expected = (qwen(prompt)[0, -1] / 3.0).softmax(-1)
    torch.manual_seed(0)
    drawn = qwen.generate(prompt.expand(20_000, -1), 1, temperature=3.0)[:, -1]
    shares = torch.bincount(drawn, minlength=SMALL.vocab_size) / 20_000
    assert (shares - expected).abs().max() < 0.012  # about four standard errors of the likeliest token


def test_top_p_draws_from_the_likeliest_tokens_alone():
    p = torch.tensor([[0.1, 0.5, 0.05, 0.35], [0.25, 0.25, 0.25, 0.25]])
    kept = nucleus(p, 0.8)
    assert torch.equal(kept[0], torch.tensor([0.0, 0.5, 0.0, 0.35]))  # 0.5 is not enough, 0.85 is
    assert kept[1].count_nonzero() == 4  # three have 0.75
    assert torch.equal(nucleus(p, 1e-9).argmax(-1)[:1], p.argmax(-1)[:1])  # the likeliest one always stays

    qwen = small_qwen()
    prompt = tokens(B=1)
    p = (qwen(prompt)[0, -1] / 3.0).softmax(-1)
    likeliest = set(nucleus(p[None], 0.3)[0].nonzero().flatten().tolist())
    drawn = qwen.generate(prompt.expand(2_000, -1), 1, temperature=3.0, top_p=0.3)[:, -1]
    assert set(drawn.tolist()) == likeliest
    assert 1 < len(likeliest) < SMALL.vocab_size / 2


# ---- sample.py -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole", "patched"])
def test_sample_continues_a_prompt_with_a_saved_model_at_the_depth_that_is_asked_for(name, tmp_path):
    model = looped(Qwen.from_pretrained("tiny"), rank=4, depth=1, **SETTINGS[name])
    move_trained_weights(model, 0.02)
    model.save(tmp_path / "run")

    dtype = pick_dtype("auto", torch.device("cpu"))  # the program's
    model = load_run(tmp_path / "run", dtype=dtype)
    tokenizer = load_tokenizer("tiny")
    prompt = "def forward(self, x):"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    expected = model.generate(ids, 12, depth=4)
    assert not torch.equal(expected, model.generate(ids, 12))

    options = ["--prompt", prompt, "--max-new-tokens", 12, "--depth", 4, "--device", "cpu"]
    printed = succeed("sample.py", tmp_path / "run", *options)
    assert printed == tokenizer.decode(expected[0].tolist()) + "\n"


@pytest.mark.parametrize(
    "option, value",
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "1e-40"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "-3"),
        ("--depth", "0"),
        ("--top-p", "0.0"),
        ("--top-p", "1.5"),
        ("--top-p", "nan"),
        ("--seed", "-1"),
        ("--prompt-file", "nowhere.txt"),
    ],
)
def test_sample_refuses_a_number_that_makes_no_sense(option, value):
    assert_refused_at_once(
        run("sample.py", "runs/any", "--prompt", "doc1", option, value), f"{option} {value}"
    )


def test_sample_shows_where_a_text_ends(pretrained, tmp_path):
    looped(Qwen.from_pretrained(pretrained), rank=4, depth=2).save(tmp_path / "run")
    prompt = "doc1<|endoftext|>doc2"
    printed = succeed("sample.py", tmp_path / "run", "--prompt", prompt, "--max-new-tokens", 1)
    assert printed.startswith(prompt)


def test_sample_refuses_an_empty_prompt_and_takes_a_base_that_was_moved(pretrained, tmp_path):
    looped(Qwen.from_pretrained(pretrained), rank=4, depth=2).save(tmp_path / "run")
    moved = pretrained.rename(tmp_path / "moved")
    empty = run("sample.py", tmp_path / "run", "--prompt", "", "--model", moved)
    assert_refused_at_once(empty, "--prompt is empty")
    lost = run("sample.py", tmp_path / "run", "--prompt", "doc1")
    assert_refused_at_once(lost, "no such folder")


def test_sample_draws_another_text_with_another_seed_and_the_same_with_the_same(pretrained, tmp_path):
    looped(Qwen.from_pretrained(pretrained), rank=4, depth=2).save(tmp_path / "run")

    def drawn(seed: int) -> str:
        options = ["--temperature", 2, "--top-p", 0.9, "--max-new-tokens", 10, "--seed", seed]
        return succeed("sample.py", tmp_path / "run", "--prompt", "doc1", *options)

    assert drawn(1) == drawn(1) != drawn(2)


def test_sample_compares_the_looped_model_with_the_full_and_the_cut_one(pretrained, tmp_path):
    model = looped(Qwen.from_pretrained(pretrained), rank=4, depth=2)
    move_trained_weights(model, 0.5)
    model.save(tmp_path / "run")
    printed = succeed(
        "sample.py", tmp_path / "run", "--prompt", "doc1 doc1", "--compare", "--max-new-tokens", 8
    )

    dtype = pick_dtype("auto", torch.device("cpu"))
    model = load_run(tmp_path / "run", dtype=dtype)
    tokenizer = load_tokenizer(pretrained)
    ids = torch.tensor([tokenizer.encode("doc1 doc1").ids])
    models = {"full model": full_model_of(model), "cut model": model.cut, "ouroboros, depth 2": model}
    expected = "prompt:\ndoc1 doc1\n"
    for name, model in models.items():
        new = model.generate(ids, 8)[0].tolist()
        continuation = tokenizer.decode(new, skip_special_tokens=False).removeprefix("doc1 doc1")
        expected += f"\n{name}:\n{continuation}\n"
    assert printed == expected


def test_sample_takes_several_prompts_from_options_and_files(pretrained, tmp_path):
    looped(Qwen.from_pretrained(pretrained), rank=4, depth=2).save(tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("doc2\ndoc3\n<|endoftext|>\ndoc4\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": "doc5\n"}) + "\n")
    common = [tmp_path / "run", "--max-new-tokens", 1]
    one_by_one = [succeed("sample.py", *common, "--prompt", text) for text in ("doc1", "doc2\ndoc3", "doc4")]
    together = succeed("sample.py", *common, "--prompt", "doc1", "--prompt-file", tmp_path / "prompts.txt")
    assert together == "\n".join(one_by_one)
    assert succeed("sample.py", *common, "--prompt-file", tmp_path / "prompts.jsonl").startswith("doc5")


def test_empty_documents_of_a_prompt_file_are_left_out_and_a_file_without_prompts_is_refused(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("doc1\n<|endoftext|>\n\n<|endoftext|>\ndoc2\n<|endoftext|>\n")
    assert prompts_in(file) == ["doc1", "doc2"]
    file.write_text("\n<|endoftext|>\n")
    with pytest.raises(UserError, match="prompts.txt: holds no prompt"):
        prompts_in(file)


def test_sample_reads_a_prompt_from_a_pipe_and_streams_it(pretrained, tmp_path):
    looped(Qwen.from_pretrained(pretrained), rank=4, depth=2).save(tmp_path / "run")
    common = [tmp_path / "run", "--max-new-tokens", 3]
    expected = succeed("sample.py", *common, "--prompt", "doc1\ndoc2")
    command = [sys.executable, ROOT / "sample.py", *map(str, common)]
    piped = subprocess.run(command, input="doc1\ndoc2\n", capture_output=True, text=True)
    assert piped.stdout == expected
    nothing = subprocess.run(command, input="", capture_output=True, text=True)
    assert_refused_at_once(nothing, "--prompt is empty")


def test_sample_continues_each_typed_line_until_an_empty_one(monkeypatch):
    lines = iter(["doc1", "doc2", "", "doc3"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert list(typed_prompts()) == ["doc1", "doc2"]


def test_the_streamed_text_is_the_whole_text_where_characters_have_several_tokens(capsys):
    """The tokens of a character are shown together, and those of one that is not finished at the end."""
    ids = TOKENIZER.encode("doc1 \u4e2d\u6587").ids
    assert len(TOKENIZER.encode("\u4e2d").ids) > 1
    for end in (len(ids), len(ids) - 1):  # all of them, and without the last part of a character
        prompt, new = ids[:2], ids[2:end]
        model = Namespace(norm=torch.nn.RMSNorm(1))
        options = Namespace(seed=0, max_new_tokens=9, temperature=0, top_p=1)

        def given(model, ids, *options, new=new):
            return (torch.tensor([[token]]) for token in new)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sample.new_tokens", given)
            print_continuation(model, TOKENIZER.decode(prompt), TOKENIZER, options, show_prompt=True)
        assert capsys.readouterr().out == TOKENIZER.decode(ids[:end]) + "\n"
