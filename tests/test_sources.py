"""sources.py: which files are text, which of it is held out, and by what a text is known again."""

import gzip
import json
import os
import shutil

import numpy as np
import pytest
from helpers import flip_a_bit, works, write_shard, write_text
from tokenizers import Tokenizer, models

from documents import read_documents
from files import UserError
from sources import PythonSource, TextSource, open_source, read_shard, shard_documents, split_by_size


def documents_of(source, split: str) -> list[str]:
    """All documents of one split."""
    documents = []
    for chunk, _ in source.chunks(split):
        documents.extend(chunk)
    return documents


def both_splits(path) -> tuple[str, str]:
    """The training text and the held-out text at a path."""
    source = open_source(str(path))
    return "".join(documents_of(source, "train")), "".join(documents_of(source, "val"))


def words(characters: int, name="word") -> str:
    """A text of about so many characters on one line, in which each word has a number of its own."""
    return " ".join(f"{name}{n:06}" for n in range(characters // (len(name) + 7)))


# ---- The split by size -----------------------------------------------------------------------------------


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def many_lines(path):
    path.with_suffix(".txt").write_text(words(600_000).replace(" ", "\n"))


def one_line(path):
    path.with_suffix(".txt").write_text(words(300_000))


def one_line_without_spaces(path):
    path.with_suffix(".txt").write_text(words(300_000).replace(" ", "_"))


def a_few_thousand_characters(path):
    path.with_suffix(".txt").write_text(words(9_500))


def a_long_line_and_a_short_one(path):
    path.with_suffix(".txt").write_text(words(280_000) + "\n" + words(17_000, "more"))


def one_long_document(path):
    write_jsonl(path.with_suffix(".jsonl"), [words(300_000)])


def a_long_document_first(path):
    write_jsonl(path.with_suffix(".jsonl"), [words(280_000)] + [words(300, f"d{n}_") for n in range(60)])


def many_short_documents(path):
    write_jsonl(path.with_suffix(".jsonl"), [words(300, f"d{n}_") for n in range(1000)])


def long_documents(path):
    write_jsonl(path.with_suffix(".jsonl"), [words(30_000, f"d{n}_") for n in range(40)])


def a_large_file_and_small_ones(path):
    path.mkdir()
    (path / "a.txt").write_text(words(40_000))
    for n in range(4):
        (path / f"b{n}.txt").write_text(words(2_500, f"file{n}_"))


LAYOUTS = [
    many_lines,
    one_line,
    one_line_without_spaces,
    a_few_thousand_characters,
    a_long_line_and_a_short_one,
    one_long_document,
    a_long_document_first,
    many_short_documents,
    long_documents,
    a_large_file_and_small_ones,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_about_a_twentieth_of_the_characters_is_held_out_whatever_the_layout(layout, tmp_path):
    layout(tmp_path / "text")
    (path,) = tmp_path.iterdir()
    training, held_out = both_splits(path)
    share = len(held_out) / (len(held_out) + len(training))
    limit = 0.15 if layout is a_few_thousand_characters else 0.08
    assert 0.03 < share < limit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_text_is_in_both_splits_and_none_is_lost(layout, tmp_path):
    layout(tmp_path / "text")
    (path,) = tmp_path.iterdir()
    training, held_out = both_splits(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    everything = "".join(file.read_text() for file in files)
    if path.suffix == ".jsonl":
        everything = "".join(json.loads(line)["text"] for line in everything.splitlines())
    assert sorted(training + held_out) == sorted(everything)
    if layout is not one_line_without_spaces:
        assert not set(training.split()).intersection(held_out.split())


def test_a_document_no_longer_than_a_spot_is_never_cut():
    rng = np.random.default_rng(0)
    documents = [(f"{n} " * int(rng.integers(1, 300)), True) for n in range(3000)]
    pieces = list(split_by_size(documents, 40_000))
    assert [text for text, _ in pieces] == [text for text, _ in documents]
    held_out = sum(len(text) for text, is_held_out in pieces if is_held_out)
    assert 0.04 < held_out / sum(len(text) for text, _ in pieces) < 0.06


def test_the_split_does_not_depend_on_the_parts_in_which_a_document_comes():
    text = words(100_000)
    whole = list(split_by_size([(text, True)], 40_000))
    parts = [(text[i : i + 70], False) for i in range(0, len(text), 70)] + [("", True)]
    assert [piece for piece in split_by_size(parts, 40_000) if piece[0]] == whole
    assert len(whole) > 4


def large_txt(folder):
    (folder / "text.txt").write_text(words(30_000_000))


def large_document(folder):
    write_jsonl(folder / "text.jsonl", [words(30_000_000)])


def large_named_files(folder):
    (folder / "train.txt").write_text(words(30_000_000))
    (folder / "val.txt").write_text(words(1_000_000, "more"))


@pytest.mark.parametrize("layout", [large_txt, large_document, large_named_files])
def test_a_large_text_is_read_in_pieces_and_only_as_far_as_needed(layout, tmp_path, monkeypatch):
    layout(tmp_path)
    source = TextSource(tmp_path)
    read = 0

    def counted(path):
        nonlocal read
        for part, ends in read_documents(path):
            assert len(part) <= 1_000_000
            read += len(part)
            yield part, ends

    monkeypatch.setattr("sources.read_documents", counted)
    documents, is_last = next(source.chunks("train"))
    assert not is_last
    assert max(map(len, documents)) <= 200_000
    assert read < 12_000_000


# ---- The files of a folder -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "training, held_out",
    [
        (["train.jsonl", "train_part2.jsonl"], ["val.jsonl"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], ["validation-00000-of-00001.jsonl"]),
        (["wiki.train.txt", "more.txt"], ["wiki.valid.txt"]),
        (["train/0.txt", "train/1.txt"], ["val/0.txt", "val/1.txt"]),
        (["a.jsonl", "b.txt"], ["test.jsonl", "val.jsonl.gz"]),
        (["latest.txt", "invalid.txt"], ["dev2.txt"]),
    ],
)
def test_files_named_for_it_are_held_out_and_all_others_are_trained_on(training, held_out, tmp_path):
    for name in training + held_out:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = f"{name} " * 30
        if ".jsonl" in name:
            text = json.dumps({"text": text})
        open_file = gzip.open if name.endswith(".gz") else open
        with open_file(path, "wt") as file:
            file.write(text)

    source = TextSource(tmp_path)
    assert set(" ".join(documents_of(source, "train")).split()) == set(training)
    assert set(" ".join(documents_of(source, "val")).split()) == set(held_out)
    (note,) = source.notes
    assert f"for training: the other {len(training)} of {len(training) + len(held_out)} files" in note


def test_where_every_file_is_named_for_it_the_text_is_split_by_size(tmp_path):
    write_text(tmp_path / "test1.txt")
    write_text(tmp_path / "test2.txt")
    training, held_out = both_splits(tmp_path)
    assert len(training) > 5 * len(held_out) > 0


def test_a_run_in_the_data_folder_is_no_text_and_changes_nothing(tmp_path):
    write_text(tmp_path / "text.txt")
    before = TextSource(tmp_path)
    run = tmp_path / "runs" / "tiny"
    (run / "step-0000010").mkdir(parents=True)
    for folder in (run, tmp_path):  # the second: with --out .
        (folder / "args.json").write_text("{}")
        (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        (folder / "results.json").write_text("{}")
    (run / "sample.txt").write_text("what a model wrote " * 100)
    (tmp_path / "text.123.part.txt").write_text("half a file")
    (tmp_path / "text.txt.part").write_text("half a file")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt"):
        (tmp_path / "model" / name).write_text("a b\n" * 100)

    after = TextSource(tmp_path)
    assert after.files == [tmp_path / "text.txt"]
    assert after.key == before.key
    assert "runs/tiny (a run of train.py)" in after.notes[0]


def test_stray_files_are_skipped_with_a_word(tmp_path):
    write_text(tmp_path / "text.txt")
    (tmp_path / "._text.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "notes.txt").mkdir()
    (tmp_path / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "text.txt").write_text("hidden")
    source = TextSource(tmp_path)
    assert source.files == [tmp_path / "text.txt"]
    for name in ("._text.txt", "gone.txt", "loop.txt", "notes.txt", "pipe.txt"):
        assert f"{name} (" in source.notes[0]


def test_folders_behind_links_are_read_once_and_a_circle_of_links_ends(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    write_text(folder / "a.txt")
    (folder / "again.txt").symlink_to("a.txt")
    (folder / "circle").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    write_text(tmp_path / "elsewhere" / "b.txt")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "other link").symlink_to(tmp_path / "elsewhere")
    assert TextSource(folder).files == [folder / "a.txt", folder / "link" / "b.txt"]


@pytest.mark.parametrize("name", ["text.csv", "folder", "nothing.txt", "link.txt"])
def test_a_path_without_text_is_one_line_that_names_what_can_be_given(name, tmp_path):
    (tmp_path / "text.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "._a.txt").write_text("hidden")
    (tmp_path / "link.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name}: .*--data takes .txt, .txt.gz, .jsonl") as caught:
        open_source(str(tmp_path / name))
    if name == "folder":
        assert "skipped: ._a.txt (hidden)" in str(caught.value)


def test_files_of_other_kinds_are_named(tmp_path):
    write_text(tmp_path / "a.txt")
    for name in ("notes.md", "table.csv", ".hidden"):
        (tmp_path / name).write_text("not read")
    (note,) = TextSource(tmp_path).notes
    assert note.startswith("left out, because only .txt, ")
    assert note.endswith(" are read: notes.md, table.csv")


# ---- By what a text is known again -----------------------------------------------------------------------


def test_a_text_is_known_by_its_content_wherever_it_is_and_whenever_it_was_written(tmp_path):
    (tmp_path / "one" / "more").mkdir(parents=True)
    write_text(tmp_path / "one" / "a.txt", 30)
    write_text(tmp_path / "one" / "more" / "b.txt", 40)
    key = TextSource(tmp_path / "one").key
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "a.txt", (1, 1))
    assert TextSource(tmp_path / "two").key == key

    content = (tmp_path / "two" / "a.txt").read_bytes()
    (tmp_path / "two" / "a.txt").write_bytes(content.replace(b"doc7", b"doc8", 1))  # of the same size
    assert TextSource(tmp_path / "two").key != key


def test_a_text_that_changes_while_it_is_in_use_is_refused(tmp_path):
    source = TextSource(write_text(tmp_path / "text.txt"))
    write_text(tmp_path / "text.txt", documents=61)
    with pytest.raises(UserError, match="text.txt: was changed while it was in use"):
        documents_of(source, "train")


# ---- Python source code ----------------------------------------------------------------------------------


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
