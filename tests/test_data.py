"""data.py: text becomes tokens and batches, the same at every start, and no text is in both splits."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TOKENIZER, flip_a_bit, small_tokenizer, works, write_shard, write_text
from tokenizers import Tokenizer, models

import data
from data import Batches, PythonSource, TextSource, open_source, read_shard, shard_documents
from files import UserError


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
    assert len(documents) == 57
    for n, document in zip((1, 2, 3), documents):  # document 0 is held out
        assert set(document.split()) == {f"doc{n}"}


# ---- The splits ------------------------------------------------------------------------------------------


def test_no_document_is_in_both_splits_and_all_are_in_one(source):
    training = documents_in(Batches(source, "train", TOKENIZER, 16))
    held_out = documents_in(Batches(source, "val", TOKENIZER, 16))
    assert held_out == {"0", "20", "40"}
    assert training == {str(n) for n in range(60)} - held_out


def test_a_folders_own_split_is_used_and_jsonl_is_read(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    with open(folder / "train.jsonl", "w") as file:
        for n in range(9):
            file.write(json.dumps({"text": f"doc{n} " * 30}) + "\n")
    with gzip.open(folder / "val.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "doc99 " * 60}) + "\n")

    source = open_source(str(folder))
    assert documents_in(Batches(source, "train", TOKENIZER, 16)) == {str(n) for n in range(9)}
    assert documents_in(Batches(source, "val", TOKENIZER, 16)) == {"99"}


def test_the_files_of_a_folder_are_one_text_and_one_document_in_twenty_is_held_out(tmp_path):
    folder = tmp_path / "text"
    (folder / "more").mkdir(parents=True)
    for n in range(30):
        (folder / f"{n:02}.txt").write_text(f"doc{n} " * 30)
    with open(folder / "more" / "lines.jsonl", "w") as file:
        for n in range(30, 60):
            file.write(json.dumps({"text": f"doc{n} " * 30}) + "\n")

    source = open_source(str(folder))
    training = documents_in(Batches(source, "train", TOKENIZER, 16))
    held_out = documents_in(Batches(source, "val", TOKENIZER, 16))
    assert held_out == {"0", "20", "40"}
    assert training == {str(n) for n in range(60)} - held_out


def documents_of(source, split: str) -> list[str]:
    """All documents of one split."""
    documents = []
    for chunk in source.chunks(split):
        documents.extend(chunk)
    return documents


def test_a_lone_txt_without_separators_is_split_into_pieces_at_its_lines(tmp_path):
    lines = [f"doc{n} doc{n} doc{n}\n" for n in range(20_000)]
    (tmp_path / "text.txt").write_text("".join(lines))
    source = TextSource(tmp_path / "text.txt")
    training = "".join(documents_of(source, "train")).splitlines(keepends=True)
    held_out = "".join(documents_of(source, "val")).splitlines(keepends=True)
    assert sorted(training + held_out) == sorted(lines)
    assert 0.04 < len(held_out) / len(lines) < 0.08


def test_the_python_source_holds_out_files_by_their_path_and_leaves_tests_out():
    source = PythonSource()
    training = documents_of(source, "train")
    held_out = documents_of(source, "val")
    assert len(training) + len(held_out) == len(source.files)
    characters_held_out = sum(map(len, held_out))
    assert 0.02 < characters_held_out / sum(map(len, training)) < 0.1

    for _, path in source.files:
        assert not {"test", "tests"}.intersection(path.parts[-3:-1]), path
    assert any("class Module" in document for document in training + held_out)


# ---- The same at every start -----------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(data, "CHUNK_CHARACTERS", 2_000)


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
    write_text(tmp_path / "text.txt", documents=61)
    with pytest.raises(pytest.fail.Exception):
        Batches(TextSource(tmp_path / "text.txt"), "train", TOKENIZER, 16)
    with pytest.raises(pytest.fail.Exception):  # and another tokenizer is one, too
        Batches(source, "train", small_tokenizer(350), 16)


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


# ---- Token shards ----------------------------------------------------------------------------------------


def test_the_documents_of_a_shard_begin_at_its_separators(tmp_path):
    gpt2 = Tokenizer(models.WordLevel({"a": 1, "b": 2, "c": 3}, unk_token="a"))
    write_shard(tmp_path / "shard.bin", [50256, 1, 2, 50256, 3, 3, 1])
    documents = list(shard_documents(read_shard(tmp_path / "shard.bin"), gpt2))
    assert [document.split() for document in documents if document] == [["a", "b"], ["c", "c", "a"]]


def test_a_flipped_bit_in_a_token_shard_gives_tokens_or_one_line(tmp_path):
    path = tmp_path / "shard.bin"
    ids = list(range(3000))
    write_shard(path, ids)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)

    def use():
        assert len(read_shard(path)) == 3000

    outcomes = set()
    for _ in range(50):
        flip_a_bit(path, rng, first=200)
        outcomes.add(works(use))
        path.write_bytes(whole)
    assert outcomes == {True, False}
    assert read_shard(path).tolist() == ids


@pytest.mark.parametrize("damage", ["truncated", "longer", "header only", "empty"])
def test_a_damaged_token_shard_is_named(damage, tmp_path):
    path = tmp_path / "finewebedu_train_000001.bin"
    write_shard(path, list(range(3000)))
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[:-2],
        "longer": whole + b"xx",
        "header only": whole[:1000],
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match="finewebedu_train_000001.bin: not a whole token shard"):
        read_shard(path)


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
        ("text.csv", b"a,b", "no such file, or no text in it"),
        ("nothing", None, "no such file, or no text in it"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_clear_error(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Batches(open_source(str(path)), "train", TOKENIZER, 16)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(source):
    without = Tokenizer(models.WordLevel({"doc1": 0}, unk_token="doc1"))
    with pytest.raises(UserError, match=r"the tokenizer has no <\|endoftext\|> token"):
        Batches(source, "train", without, 16)
