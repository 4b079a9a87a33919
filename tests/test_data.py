"""data.py: which text is read and which is held out, and that its order depends on nothing but the seed."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, small_tokenizer, write_shard, write_text
from tokenizers import Tokenizer, models

import data
from data import Batches, Tokens, open_text
from support.files import UserError


def documents_of(path, split="all") -> list[str]:
    """The documents of a text that are not blank."""
    chunks = open_text(str(path)).chunks(split)
    return [document for chunk in chunks for document in chunk if document.strip()]


def assert_refused(action, message: str):
    with pytest.raises(UserError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


# ---- Documents -------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_a_line_of_end_of_text_and_nothing_else_ends_a_document(name, tmp_path):
    content = b"one\ntwo\r\n<|endoftext|>\r\nthree <|endoftext|> four\n<|endoftext|>  \n\n<|endoftext|>\nfive"
    documents = documents_of(write(tmp_path / name, b"\xef\xbb\xbf" + content))  # with a byte order mark
    assert documents == ["one\ntwo\n", "three <|endoftext|> four\n", "five"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_jsonl_has_a_document_in_each_line(name, tmp_path):
    texts = ["one", 'two\nlines, \\ and "quotes"', "\U0001f600\u4e2d\u00e9" * 9000, "four"]
    lines = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)]
    assert documents_of(write(tmp_path / name, "\n\n".join(lines).encode())) == texts


def test_a_long_document_is_read_as_several_that_have_all_of_its_text(tmp_path):
    text = "_".join(str(n) for n in range(80_000))
    documents = documents_of(write(tmp_path / "a.txt", text.encode()))
    assert len(documents) == 3
    assert "".join(documents) == text


BAD_LINES = ["no json", '{"content": "x"}', '{"text": 1}', '["text"]', "[" * 100_000, '{"text": "an end']


@pytest.mark.parametrize("line", BAD_LINES)
def test_an_error_in_a_jsonl_names_the_file_and_the_line(line, tmp_path):
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n'.encode())
    assert_refused(lambda: documents_of(path), r"a\.jsonl: is not UTF-8 text.*line 3")


BROKEN = {"a.txt": b"caf\xe9", "b.txt.gz": gzip.compress(b"text" * 99)[:-9], "c.jsonl.gz": b"no gzip"}


@pytest.mark.parametrize("name", BROKEN)
def test_a_text_that_cannot_be_read_is_one_line_that_names_it(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    assert_refused(lambda: documents_of(tmp_path), f"{name}: is not UTF-8 text")


# ---- Folders, and what is held out -----------------------------------------------------------------------

NAMES = [(["more.txt", "train.jsonl"], ["val.jsonl"]), (["train/0.txt.gz"], ["held-out/0.txt"])]
NAMES += [(["invalid.txt", "latest.txt"], ["dev2.txt", "my_test.jsonl.gz", "x-validation-00000-of-1.jsonl"])]


@pytest.mark.parametrize("training, held_out", NAMES)
def test_files_that_are_named_for_it_are_held_out_and_all_others_are_trained_on(training, held_out, tmp_path):
    for name in training + held_out:
        text = json.dumps({"text": name}) if ".jsonl" in name else name
        write(tmp_path / name, text.encode())
    assert documents_of(tmp_path, "train") == training
    assert documents_of(tmp_path, "held-out") == held_out
    assert documents_of(tmp_path, "all") == sorted(training + held_out)


@pytest.mark.parametrize("names", [["a.txt", "b.txt", "c/d.txt"], ["test1.txt", "test2.txt"], ["one.txt"]])
def test_else_the_last_twentieth_of_every_file_is_held_out_and_cut_at_a_line(names, tmp_path):
    lines = {name: [f"{name} {n}\n" for n in range(400)] for name in names}
    for name in names:
        write(tmp_path / name, "".join(lines[name]).encode())
    training = "".join(documents_of(tmp_path, "train")).splitlines(keepends=True)
    held_out = "".join(documents_of(tmp_path, "held-out")).splitlines(keepends=True)
    assert training == [line for name in names for line in lines[name][:381]]
    assert held_out == [line for name in names for line in lines[name][381:]]


def test_hidden_and_unfinished_files_and_runs_are_no_text(tmp_path):
    write_text(tmp_path / "text.txt")
    for name in (".hidden.txt", ".git/a.txt", "log.jsonl", "text.7.part.txt", "notes.md", "merges.TXT.zip"):
        write(tmp_path / name, b"not read")
    assert documents_of(tmp_path) == documents_of(tmp_path / "text.txt")


@pytest.mark.parametrize("name", ["text.csv", "folder", "nothing.txt"])
def test_a_path_without_text_is_one_line_that_says_what_can_be_given(name, tmp_path):
    write(tmp_path / "text.csv", b"a,b")
    (tmp_path / "folder").mkdir()
    assert_refused(lambda: open_text(str(tmp_path / name)), f"{name}: (holds no text|no such file).*; give")


def test_python_source_is_held_out_by_a_hash_of_its_path_and_tests_are_left_out():
    held_out, training = documents_of("python", "held-out"), documents_of("python", "train")
    for path in Path(json.__file__).parents[1].glob("*.py"):  # the modules of the standard library
        path_hash = hashlib.sha1(f"stdlib/{path.name}".encode()).hexdigest()
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert (text in held_out) == (int(path_hash[-4:], 16) % 20 == 0)
        assert text not in held_out or text not in training
    for path in Path(torch.__file__).parent.glob("testing/**/*.py"):
        assert path.read_text(encoding="utf-8").strip() == "" or path.read_text() not in held_out + training


# ---- FineWeb-Edu -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [slice(-2), slice(1000), slice(0), slice(4, None)], ids=str)
def test_a_damaged_token_shard_is_one_line_that_names_it(kept, tmp_path):
    path = write_shard(tmp_path / "shard.bin", list(range(3000)))
    assert data.read_shard(path).tolist() == list(range(3000))
    path.write_bytes(path.read_bytes()[kept])
    assert_refused(lambda: data.read_shard(path), r"shard\.bin: is not a whole token shard")


# ---- Tokens ----------------------------------------------------------------------------------------------


def test_an_end_token_follows_each_document_that_is_not_blank_and_a_lone_surrogate_becomes_a_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": " "}\n{"text": "two \\ud800"}\n')
    tokens = Tokens(open_text(str(path)), "all", TOKENIZER).chunk(0).tolist()
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == "one<|endoftext|>two ?<|endoftext|>"


def test_what_looks_like_a_special_token_in_a_text_is_text(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.add_tokens(["<|fim_prefix|>", "    "])  # not called special in tokenizer.json
    text = "The token <|endoftext|> ends, <|im_start|>system opens, <|fim_prefix|> too,    spaces stay."
    path = str(write(tmp_path / "a.txt", text.encode()))
    tokens = Tokens(open_text(path), "all", tokenizer).chunk(0).tolist()
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text + "<|endoftext|>"
    names = [tokenizer.id_to_token(token) for token in tokens]
    assert [name for name in names if " " in name or "<|" in name] == ["    ", "<|endoftext|>"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_CHARACTERS", 2_000)
    return open_text(str(write_text(tmp_path / "text.txt")))


def test_an_unknown_split_and_a_tokenizer_without_an_end_of_text_token_are_refused(text):
    assert_refused(lambda: Tokens(text, "test", TOKENIZER), "split 'test': give one of train, held-out, all")
    without = Tokenizer(models.WordLevel({"doc1": 0}, unk_token="doc1"))
    assert_refused(lambda: Tokens(text, "train", without), r"no <\|endoftext\|> token")


# ---- Batches ---------------------------------------------------------------------------------------------


def batches_of(text, **options) -> Batches:
    return Batches(Tokens(text, "train", TOKENIZER), length=16, **options)


@pytest.mark.parametrize("offset", [1, 2])
def test_a_target_is_the_token_so_far_further_on(offset, text):
    batches = batches_of(text, offset=offset)
    ids, targets = batches.batch(0, 5)
    for row, aims in zip(ids.tolist(), targets.tolist()):
        stream = batches.tokens.chunk(0).tolist()
        starts = [i for i in range(0, len(stream), 16) if stream[i : i + 16] == row]
        assert any(stream[i + offset : i + offset + 16] == aims for i in starts)


def test_a_batch_is_a_function_of_the_seed_and_its_place_alone(text):
    walk, _ = batches_of(text, seed=0).batch(0, 800)
    assert batches_of(text).at_most(800) < 800  # it goes over more than one epoch
    for first, size in ((148, 4), (0, 1), (783, 17)):
        again, _ = batches_of(text, seed=0).batch(first, size)  # a new start, straight at that place
        assert torch.equal(again, walk[first : first + size])
    assert not torch.equal(batches_of(text, seed=1).batch(0, 800)[0], walk)


def test_each_epoch_is_the_same_text_in_another_order(text):
    batches = batches_of(text)
    size = batches.at_most(10**6)
    (first, _), (second, _) = batches.batch(0, size), batches.batch(size, size)
    assert not torch.equal(first, second)
    windows = []
    for i, chunk in enumerate(batches.tokens.chunks):
        windows += chunk[: 16 * batches.sequences_in(i)].reshape(-1, 16).tolist()
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(windows)


def test_a_share_of_the_sequences_repeats_a_passage_of_the_text_or_of_random_tokens(text):
    tokens = Tokens(text, "train", TOKENIZER)
    plain, _ = Batches(tokens, 300, seed=0).batch(0, 200)
    ids, targets = Batches(tokens, 300, seed=0, repeats=0.5).batch(0, 200)
    sizes = {"text": [], "random": []}
    for row, aims, plain_row in zip(ids, targets, plain):
        unpredictable = (aims == -100).sum().item()
        if unpredictable > 0:  # random tokens; the first one of the second reading does not count
            size = unpredictable
            assert torch.equal(row[size:], row[:-size])
            assert (aims[:unpredictable] == -100).all()
            sizes["random"].append(size)
        elif not torch.equal(row, plain_row):
            sizes["text"].append(next(n for n in range(12, 129) if torch.equal(row[n:], plain_row[:-n])))
            assert torch.equal(row[: sizes["text"][-1]], plain_row[: sizes["text"][-1]])
        counted = aims[:-1] != -100
        assert torch.equal(aims[:-1][counted], row[1:][counted])
    assert 60 < len(sizes["text"]) < 100 and 10 < len(sizes["random"]) < 30
    assert 12 <= min(sizes["random"]) < 30 and 110 < max(sizes["random"]) <= 128


def test_a_text_that_is_too_short_is_one_line(tmp_path):
    text = open_text(str(write(tmp_path / "short.txt", b"a few words")))
    assert_refused(lambda: batches_of(text), r"train text of .*short\.txt has \d+ tokens, too few")
