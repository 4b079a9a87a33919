"""The perplexity of a whole file: each token is predicted once, and the three models stand side by side."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TOKENIZER, looped, move_trained_weights

from data import Tokens
from hub import load_tokenizer
from perplexity import WholeFile, print_perplexities, windows_of
from qwen import Qwen

CPU = torch.device("cpu")


def tokens_of(path) -> Tokens:
    return Tokens(WholeFile(path), "val", TOKENIZER)


@pytest.mark.parametrize("length", [5, 16, 1000])
def test_each_token_of_a_file_is_predicted_once_and_in_order(length, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a first document\n<|endoftext|>\nand a second one, which is longer\n")
    tokens = tokens_of(file)
    windows = list(windows_of(tokens, length))
    assert windows[0][0] == tokens.end_token
    targets = np.concatenate([window[1:] for window in windows])
    assert targets.tolist() == tokens.chunk(0).tolist()
    for window, following in zip(windows, windows[1:]):
        assert window[-1] == following[0]
    sizes = [len(window) - 1 for window in windows]
    assert max(sizes) <= length
    assert max(sizes) - min(sizes) <= 1


def test_loss_perplexity_and_bits_are_those_of_the_three_models(pretrained, tmp_path, capsys, empty_cache):
    qwen = Qwen.from_pretrained(pretrained)
    model = looped(qwen, rank=4, depth=2)
    move_trained_weights(model, 0.3)
    file = tmp_path / "text.txt"
    text = "doc1 doc1 doc2 and so on, doc3 \u4e2d\n"
    file.write_text(text)
    tokenizer = load_tokenizer(pretrained)
    print_perplexities(model, file, tokenizer, Namespace(depth=3, seq_len=1000), CPU)
    rows = capsys.readouterr().out.splitlines()

    end = tokenizer.token_to_id("<|endoftext|>")
    ids = torch.tensor([[end, *tokenizer.encode(text).ids, end]])
    logits = {"full model": qwen(ids), "cut to": model.cut(ids), "ouroboros, depth 3": model(ids, depth=3)}
    for name, values in logits.items():
        loss = F.cross_entropy(values[0, :-1], ids[0, 1:]).item()
        bits = loss * (ids.shape[1] - 1) / math.log(2) / len(text.encode())
        [row] = [row for row in rows if row.startswith(name)]
        assert row.split()[-3:] == [f"{loss:.3f}", f"{math.exp(loss):.2f}", f"{bits:.3f}"]


def test_windows_of_unequal_length_count_by_their_tokens(pretrained, tmp_path, capsys, empty_cache):
    model = looped(Qwen.from_pretrained(pretrained), rank=4, depth=1)
    file = tmp_path / "text.txt"
    file.write_text("doc1 is a text of some length, which has several windows")
    tokenizer = load_tokenizer(pretrained)
    print_perplexities(model, file, tokenizer, Namespace(depth=1, seq_len=7), CPU)
    [row] = [row for row in capsys.readouterr().out.splitlines() if row.startswith("cut to")]

    total = 0
    windows = list(windows_of(Tokens(WholeFile(file), "val", tokenizer), 7))
    assert len({len(window) for window in windows}) == 2
    for window in windows:
        ids = torch.from_numpy(window.astype(np.int64))
        total += F.cross_entropy(model.cut(ids[None, :-1])[0], ids[1:], reduction="sum").item()
    assert f"{math.exp(total / sum(len(window) - 1 for window in windows)):.2f}" in row
