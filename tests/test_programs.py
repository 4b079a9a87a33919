"""evaluate.py and sample.py, the report of a run, and the readers and writers of files."""

import io
import math
import os
import re
import sys

import pytest
import torch
from helpers import SMALL, small_qwen, write_text
from huggingface_hub import ModelCard
from test_train import command, refusal, table_of
from torch import nn

import evaluate
import sample
import train
from data import Batches, Tokens, open_text
from qwen import LanguageModel, load_tokenizer
from support import files, report
from support.files import UserError, read_checkpoint, read_json


@pytest.fixture(scope="module")
def run(pretrained, tmp_path_factory):
    """A run of four steps. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    train.main(command(pretrained, "--out", folder))
    return folder


# ---- evaluate.py -----------------------------------------------------------------------------------------


def test_evaluate_measures_all_of_another_text_at_another_depth(run, pretrained, tmp_path, capsys):
    text = write_text(tmp_path / "poems.txt", 40)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    evaluate.main([str(run), "--data", str(text), "--depth", "3", "--sequences", "2"])
    table = table_of(capsys.readouterr().out)
    assert re.split("  +", table[0].strip()) == [
        *("poems.txt", "copies text", "copies random", "chooses text", "chooses number")
    ]
    assert table[3].startswith("ouroboros, depth 3")

    model, full, cut = evaluate.open_run_and_baselines(run)
    batches = Batches(Tokens(open_text(str(text)), "all", load_tokenizer(pretrained)), 32)
    for line, (kind, depth) in zip(table[1:4], ((full, {}), (cut, {}), (model, {"depth": 3})), strict=True):
        values = [kind.loss(*batches.batch(n, 1), **depth).item() for n in range(2)]
        assert str(report.estimate(values)) in line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


class Copier(LanguageModel):
    """A decoder whose likeliest next token is the one that followed the same token the last time, if any."""

    config = SMALL

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(SMALL.vocab_size)
        self.lm_head = nn.Linear(SMALL.vocab_size, SMALL.vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def hidden(self, ids):
        h = torch.zeros(*ids.shape, SMALL.vocab_size)
        for row, state in zip(ids.tolist(), h):
            follower = {}
            for i, token in enumerate(row):
                if i > 0:
                    follower[row[i - 1]] = token
                if token in follower:
                    state[i, follower[token]] = 9.0
        return h


def test_a_model_that_copies_has_all_of_a_passage_and_finds_the_answer_that_stood_in_the_prompt():
    passages = torch.randperm(97)[:60].reshape(5, 12)
    assert evaluate.copied(Copier(), passages) == [1.0] * 5
    assert max(evaluate.copied(small_qwen(), passages)) < 0.5
    questions = [([5, 6, 7, 8, 5], [[6, 7], [7, 8], [8, 5]]), ([5, 6, 7, 8, 7], [[6, 7, 8], [8]])]
    assert evaluate.chosen(Copier(), questions) == [1.0, 0.0]


def test_a_question_has_one_right_answer_the_first_one():
    starts = torch.arange(5 * 96).reshape(5, 96).tolist()
    for n, (prompt, answers) in enumerate(evaluate.continuation_questions(starts)):
        assert prompt + answers[0] == starts[n] and len({tuple(answer) for answer in answers}) == 4
    tokenizer = load_tokenizer("tiny")
    for prompt, answers in evaluate.needle_questions(starts, tokenizer):
        text = tokenizer.decode(prompt)
        answers = [tokenizer.decode(answer) for answer in answers]
        assert text.endswith("\nThe number of Anna is") and f"Anna is{answers[0]}." in text
        assert all(f" is{answer}." in text for answer in answers) and len(set(answers)) == 4


# ---- sample.py -------------------------------------------------------------------------------------------


def sampled(capsys, *argv) -> str:
    capsys.readouterr()
    sample.main([str(word) for word in argv])
    return capsys.readouterr().out


def test_a_prompt_is_continued_by_the_likeliest_tokens(run, pretrained, capsys):
    printed = sampled(capsys, run, "--prompt", "doc1 doc1", "--max-new-tokens", 5, "--depth", 3)
    tokenizer = load_tokenizer(pretrained)
    ids = torch.tensor([tokenizer.encode("doc1 doc1").ids])
    ids = evaluate.open_run(run).generate(ids, 5, depth=3)
    assert printed == tokenizer.decode(ids[0].tolist(), skip_special_tokens=False) + "\n"


def test_the_seed_decides_what_is_drawn(run, capsys):
    argv = [run, "--prompt", "doc1", "--max-new-tokens", 20, "--temperature", 1.5]
    one, again, other = (sampled(capsys, *argv, "--seed", seed) for seed in (1, 1, 2))
    assert one == again != other
    assert sampled(capsys, *argv, "--seed", 2, "--top-p", 1e-6) == sampled(capsys, *argv, "--top-p", 1e-6)


def test_all_three_models_continue_each_of_several_prompts(run, capsys):
    printed = sampled(capsys, run, "--compare", "--prompt", "doc1", "--prompt", "doc2", "--max-new-tokens", 3)
    heads = [line for line in printed.splitlines() if line.endswith(":")]
    assert heads == 2 * ["prompt:", "full model:", "cut model:", "ouroboros, depth 2:"]
    assert printed.count("doc1") == printed.count("doc2") == 1
    alone = sampled(capsys, run, "--prompt", "doc2", "--max-new-tokens", 3)
    assert printed.endswith(f"ouroboros, depth 2:\n{alone.removeprefix('doc2')}")


def test_each_line_of_the_input_is_a_prompt(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("doc1\n\ndoc2\n"))
    printed = sampled(capsys, run, "--max-new-tokens", 1)
    assert printed.startswith("doc1") and "\ndoc2" in printed


WRONG = "temperature -1, temperature nan, top-p 0, top-p 1.1, max-new-tokens 0, depth 0, device gpu"


def test_what_cannot_be_drawn_is_one_line_that_names_the_option(run, capsys):
    for option in WRONG.split(", "):
        line = refusal(capsys, sample.main, run, "--prompt", "doc1", *f"--{option}".split())
        assert f"--{option.split()[0]}" in line
    assert "--prompt is empty" in refusal(capsys, sample.main, run, "--prompt", "")
    line = refusal(capsys, sample.main, run, "--prompt", "doc1", "--temperature", "1e-40")
    assert "temperature 1e-40" in line


# ---- The report ------------------------------------------------------------------------------------------


def test_means_their_errors_and_the_gap_are_those_by_hand():
    mean, error = report.estimate([1.0, 2.0, 6.0])
    assert (mean, error) == (3.0, pytest.approx(math.sqrt(7 / 3)))  # variance 7, of three values
    results = {"full": {"a": [1.0, 3.0], "b": [1.0]}, "cut": {"a": [5.0, 6.0], "b": [1.0]}}
    results["ouroboros"] = {"a": [3.0, 3.0], "b": [1.0]}  # 2 of 4 and 3 of 3 have come back; b has no gap
    rows = report.table_rows(results, {"full": "F", "cut": "C", "ouroboros": "O"})
    assert rows[:2] == [["", "a", "b"], ["F", "2.000 ± 1.000", "1.000"]]
    assert rows[2:4] == [["C", "5.500 ± 0.500", "1.000"], ["O", "3.000 ± 0.000", "1.000"]]
    assert rows[4] == ["gap recovered", "71.4 ± 24.5%", ""]
    assert report.gap_recovered([1.0], [3.0], [0.0]).percent() == "150.0%"
    assert report.gap_recovered([1.0], [3.0], [4.0]).percent() == "-50.0%"
    assert report.gap_recovered([3.0, 3.0], [2.0, 2.0], [1.0, 1.0]) is None


def test_a_run_has_a_picture_and_a_card_without_a_path_of_this_machine(run, pretrained, tmp_path):
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    path = run / "step-0000004" / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "ouroboros-from-scratch"
    assert card.data.base_model is None  # it is a folder here
    for part in ("# mine\n", "| gap recovered |", "| rank | 4 |", "| model | model |", "| data | text.txt |"):
        assert part in card.text
    assert str(run.parent) not in path.read_text() and str(pretrained.parent) not in path.read_text()
    options, _ = train.parse_options(["--model", "Qwen/Qwen2.5-0.5B"])
    report.write_card(tmp_path / "run" / "step-1", [["", "a"]], options, 4)
    assert ModelCard.load(tmp_path / "run" / "step-1" / "README.md").data.base_model == "Qwen/Qwen2.5-0.5B"


# ---- Reading and writing ---------------------------------------------------------------------------------


def test_a_writer_leaves_the_old_file_or_the_new_one_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "file.json"
    files.write_json(path, {"a": 1})

    def half(part):
        part.write_text('{"a"')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace_file(path, half)
    with pytest.raises(ValueError):  # a bug keeps its traceback
        files.write_json(path, {"a": math.nan})
    with pytest.raises(UserError, match="file.json/x: cannot be written"):
        files.write_json(path / "x", {})
    assert read_json(path) == {"a": 1}
    assert os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("two\nlines"), "error: two lines\n"),
        (MemoryError(), "error: out of memory; give a smaller"),
        (RuntimeError("CUDA out of memory"), "error: out of memory; give a smaller"),
        (OSError(28, "No space left"), "error: [Errno 28] No space left\n"),
    ],
    ids=repr,
)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(error, line, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as end:
        files.run_program(main)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line) and printed.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ZeroDivisionError):
        files.run_program(lambda: 1 / 0)


def assert_refused(reader, path):
    with pytest.raises(UserError) as caught:
        reader(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_with_any_bit_flipped_or_cut_short_is_refused(tmp_path):
    def read(path):
        return read_checkpoint(path.parent)

    tensors = {"a": torch.randn(7), "b": torch.arange(3), "c": torch.zeros(2, 2, dtype=torch.bfloat16)}
    files.write_checkpoint(tmp_path, tensors, {"model": {"base": "é"}, "step": 3})
    path = tmp_path / "ouroboros.safetensors"
    again, about = read(path)
    assert about["step"] == 3
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert_refused(read, path)
    for length in range(0, len(good), 5):
        path.write_bytes(good[:length])
        assert_refused(read, path)
    path.unlink()
    assert_refused(read, path)
    files.write_checkpoint(tmp_path, tensors, {"format": 3})
    with pytest.raises(UserError, match="4bfd857 reads format 3"):
        read(path)
