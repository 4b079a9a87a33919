"""data.py: text becomes tokens and batches, the same at every start, and no text is in both splits."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TOKENIZER, flip_a_bit, small_tokenizer, works, write_text
from tokenizers import Tokenizer, models
from tqdm import tqdm

import data
import sources
from data import Batches
from files import UserError
from sources import TextSource, open_source


@pytest.fixture
def source(tmp_path):
    """A text of 60 documents in which every word names its document."""
    return TextSource(write_text(tmp_path / "text.txt"))


def whole_epoch(batches: Batches):
    """The inputs of all sequences, in the order of the first epoch."""
    total = 0
    i = 0
    while batches.sequences_in(i) > 0:
        total += batches.sequences_in(i)
        i += 1
    ids, _ = batches.batch(0, total)
    return ids


def documents_in(batches: Batches) -> set[str]:
    """The numbers of the documents that the text of one epoch names, in words that no row cuts."""
    documents = set()
    for row in TOKENIZER.decode_batch(whole_epoch(batches).tolist()):
        documents.update(re.findall(r" doc(\d+) ", row))
    return documents


# ---- Inputs and targets ----------------------------------------------------------------------------------


def test_the_target_is_the_next_token_shifted_once(source):
    batches = Batches(source, "train", TOKENIZER, length=16)
    stream = batches.chunk(0).tolist()
    ids, targets = batches.batch(0, 30)
    assert ids.shape == targets.shape == (30, 16)
    assert ids.dtype == targets.dtype == torch.int64
    for row, aims in zip(ids.tolist(), targets.tolist()):
        starts = [i for i in range(0, len(stream), 16) if stream[i : i + 16] == row]
        assert any(stream[i + 1 : i + 17] == aims for i in starts)


def test_with_an_offset_of_two_the_target_is_the_token_after_the_next(source):
    ids, targets = Batches(source, "train", TOKENIZER, length=16, offset=2).batch(0, 5)
    assert torch.equal(ids[:, 2:], targets[:, :-2])
    assert not torch.equal(ids[:, 1:], targets[:, :-1])


def test_documents_are_joined_by_the_end_of_text_token(source):
    tokens = Batches(source, "train", TOKENIZER, 16).chunk(0).tolist()
    text = TOKENIZER.decode(tokens, skip_special_tokens=False)
    documents = text.split("<|endoftext|>")
    assert documents.pop() == ""  # the last one ends with the token, too
    assert 50 < len(documents) < 60
    for n, document in zip((0, 1, 2), documents):
        assert set(document.split()) == {f"doc{n}"}


def test_no_document_is_in_both_splits_and_all_are_in_one(source):
    training = documents_in(Batches(source, "train", TOKENIZER, 16))
    held_out = documents_in(Batches(source, "val", TOKENIZER, 16))
    assert not training.intersection(held_out)
    assert training.union(held_out) == {str(n) for n in range(60)}
    assert held_out


# ---- Text that looks like a special token ----------------------------------------------------------------


@pytest.fixture
def marked():
    """A tokenizer with marks of both kinds: special ones, and one that is not called special."""
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.add_tokens(["<|fim_prefix|>", "    "])
    return tokenizer


def test_a_special_token_written_in_a_text_is_text(tmp_path, marked):
    text = "The token <|endoftext|> ends, <|im_start|>system opens, <|fim_prefix|> too."
    with open(tmp_path / "a.jsonl", "w") as file:
        for n in range(200):
            file.write(json.dumps({"text": f"{text} {n}"}) + "\n")
    source = TextSource(tmp_path / "a.jsonl")
    training = Batches(source, "train", marked, 16)
    tokens = training.chunk(0)
    count = training.count()
    assert np.count_nonzero(tokens == training.end_token) == count.documents < 200
    for mark in ("<|im_start|>", "<|fim_prefix|>"):
        assert marked.token_to_id(mark) not in tokens
    assert marked.decode(tokens.tolist()).count(text) == count.documents
    assert "<|im_start|>" in marked.encode("<|im_start|>").tokens  # the tokenizer itself stays as it was


def test_an_added_token_that_is_no_mark_stays_a_token(tmp_path, marked):
    (tmp_path / "a.txt").write_text("x    y\n" * 2000)
    tokens = Batches(TextSource(tmp_path / "a.txt"), "train", marked, 16).chunk(0)
    assert marked.token_to_id("    ") in tokens


# ---- How much text there is ------------------------------------------------------------------------------


def test_the_count_is_that_of_the_whole_text_where_it_is_one_chunk(source):
    training = Batches(source, "train", TOKENIZER, 16)
    held_out = Batches(source, "val", TOKENIZER, 16)
    for batches in (training, held_out, Batches(source, "train", TOKENIZER, 16)):  # the last: from the cache
        count = batches.count()
        assert count.is_all
        assert count.tokens == len(batches.chunk(0))
        assert count.sequences == (count.tokens - 1) // 16
    assert training.count().documents + held_out.count().documents == 60


def test_the_count_of_a_longer_text_is_that_of_its_first_chunk(source, small_chunks):
    batches = Batches(source, "train", TOKENIZER, 16)
    count = batches.count()
    assert not count.is_all
    assert count.tokens == len(batches.chunk(0))
    assert count.sequences < batches.at_most(10**6)


def test_no_sequence_is_counted_twice(source, small_chunks):
    batches = Batches(source, "train", TOKENIZER, 16)
    total = len(whole_epoch(batches))
    assert batches.at_most(10**6) == total
    assert batches.at_most(3) == 3


def test_tokenizing_shows_how_far_it_is(source, empty_cache, monkeypatch, capsys):
    bars = []

    def bar(*arguments, **options):
        bars.append(tqdm(*arguments, **{**options, "delay": 0, "mininterval": 0}))
        return bars[-1]

    monkeypatch.setattr(data, "tqdm", bar)
    Batches(source, "train", TOKENIZER, 16)
    assert bars[-1].n == bars[-1].total == sum(len(text) for text in next(source.chunks("train"))[0])
    printed = capsys.readouterr()
    assert "tokenizing training text" in printed.err
    assert printed.out == ""


# ---- The same at every start -----------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 2_000)


def test_batches_are_a_function_of_seed_and_position_alone(source, small_chunks):
    one = Batches(source, "train", TOKENIZER, 16, seed=0)
    walk = [one.batch(4 * step, 4)[0] for step in range(200)]  # over more than one epoch
    assert len(one.chunks) > 2
    assert one.complete
    assert one.place_of(4 * 200)[0] >= 1
    for step in (37, 0, 195):
        again = Batches(source, "train", TOKENIZER, 16, seed=0)  # a new start, straight at that step
        assert torch.equal(again.batch(4 * step, 4)[0], walk[step])
    other = Batches(source, "train", TOKENIZER, 16, seed=1)
    assert not torch.equal(other.batch(0, 4)[0], walk[0])


def test_a_batch_does_not_depend_on_how_the_batches_are_cut(source, small_chunks):
    batches = Batches(source, "train", TOKENIZER, 16)
    ids, targets = batches.batch(0, 12)
    for first in (0, 3, 11):
        row, aims = batches.batch(first, 1)
        assert torch.equal(row[0], ids[first])
        assert torch.equal(aims[0], targets[first])


def test_each_epoch_is_the_same_text_in_another_order(source, small_chunks):
    batches = Batches(source, "train", TOKENIZER, 16)
    first = whole_epoch(batches)
    second, _ = batches.batch(len(first), len(first))
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())


# ---- The cache -------------------------------------------------------------------------------------------


def test_the_second_start_reads_the_cache_and_another_text_is_another_cache(
    source, tmp_path, empty_cache, monkeypatch
):
    first, _ = Batches(source, "train", TOKENIZER, 16).batch(0, 8)
    assert list(empty_cache.rglob("*.npy"))
    assert not list(empty_cache.rglob("*.part*"))

    monkeypatch.setattr(Batches, "_encode", lambda *_: pytest.fail("tokenized again"))
    again, _ = Batches(source, "train", TOKENIZER, 16).batch(0, 8)
    assert torch.equal(again, first)
    with pytest.raises(pytest.fail.Exception):  # another tokenizer is another cache
        Batches(source, "train", small_tokenizer(350), 16)
    write_text(tmp_path / "text.txt", documents=61)
    with pytest.raises(pytest.fail.Exception):
        Batches(TextSource(tmp_path / "text.txt"), "train", TOKENIZER, 16)


def test_tokens_that_were_half_written_to_the_cache_are_read_no_further(source, small_chunks, empty_cache):
    whole = whole_epoch(Batches(source, "train", TOKENIZER, 16))
    chunks = sorted(empty_cache.rglob("*.npy"))
    assert len(chunks) > 3
    for chunk in chunks[2:]:  # as if the first start had ended before it reached them
        chunk.unlink()
    assert torch.equal(whole_epoch(Batches(source, "train", TOKENIZER, 16)), whole)


def test_a_flipped_bit_in_the_cache_gives_tokens_or_one_line(source):
    path = Batches(source, "train", TOKENIZER, 16).folder / "00000.npy"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)

    def use():
        batches = Batches(source, "train", TOKENIZER, 16)
        batches.batch(0, 2)
        assert batches.chunk(0).max() < 400  # a model with so many tokens can read them

    outcomes = set()
    for _ in range(50):
        flip_a_bit(path, rng, first=200)  # in the header or soon after it
        outcomes.add(works(use))
        path.write_bytes(whole)
    assert outcomes == {True, False}
    assert works(use)


def test_a_pickle_in_the_cache_is_not_loaded(source, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = Batches(source, "train", TOKENIZER, 16).folder / "00000.npy"
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="00000.npy: cannot be read as tokens"):
        Batches(source, "train", TOKENIZER, 16)
    assert not (tmp_path / "executed").exists()


# ---- What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("text.txt", b"short", "text is too short"),
        ("text.txt", b"\xff\xfe" * 900, "cannot be read as text"),
        ("text.jsonl", b'{"no": 1}\n' * 50, "cannot be read as text"),
        ("text.jsonl", b'{"text": 1}\n', "cannot be read as text"),
        ("text.jsonl", b"no json\n", "cannot be read as text"),
        ("text.jsonl.gz", b"no gzip", "cannot be read as text"),
        ("text.csv", b"a,b", "text.csv: not a kind of text that can be read; --data takes .txt"),
        ("nothing", None, "nothing: no such file or folder; --data takes .txt"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_clear_error(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Batches(open_source(str(path)), "train", TOKENIZER, 16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("characters", [300, 3_000, 30_000])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_length_that_is_proposed_for_a_short_text_fits(characters, split, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(" ".join(f"word{n}" for n in range(characters // 7)))
    source = TextSource(path)
    with pytest.raises(UserError, match="short.txt: the .* text is too short for one sequence") as caught:
        Batches(source, split, TOKENIZER, 100_000)
    (length,) = re.findall(r"--seq-len (\d+) or less fits", str(caught.value))
    for side in ("train", "val"):
        for offset in (1, 2):
            Batches(source, side, TOKENIZER, int(length), offset).batch(0, 2)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(source):
    without = Tokenizer(models.WordLevel({"doc1": 0}, unk_token="doc1"))
    with pytest.raises(
        UserError, match=r"has no <\|endoftext\|> token, which ends a document; give --model another"
    ):
        Batches(source, "train", without, 16)
