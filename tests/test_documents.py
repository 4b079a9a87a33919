"""documents.py: a text file becomes documents, in parts of a bounded size, and an error names its line."""

import gzip
import json

import numpy as np
import pytest

import documents
from documents import kind_of, read_documents
from files import UserError


def texts_of(path) -> list[str]:
    """The documents of a file, each whole, blank ones left out."""
    texts = [""]
    for part, ends in read_documents(path):
        assert len(part) < 2 * documents.PART
        texts[-1] += part
        if ends:
            texts.append("")
    return [text for text in texts if text.strip()]


@pytest.fixture(params=[3, 40, 500_000])
def part_size(request, monkeypatch):
    """Parts smaller than a word, smaller than a document, and larger than the file."""
    monkeypatch.setattr(documents, "PART", request.param)
    return request.param


# ---- .txt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_size", [20, 40, 500_000], indirect=True)  # a separator has 13 characters
def test_a_line_of_end_of_text_and_nothing_else_ends_a_document(tmp_path, part_size):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\r\n<|endoftext|>\r\nthree <|endoftext|> four\n<|endoftext|>  \n\nfive")
    assert texts_of(path) == ["one\ntwo\n", "three <|endoftext|> four\n", "\nfive"]


def test_a_txt_without_separators_is_one_document(tmp_path, part_size):
    text = "a line\n" * 50 + "x" * 300
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path / "a.txt") == [text]


# ---- .jsonl ----------------------------------------------------------------------------------------------


def test_a_jsonl_has_a_document_in_each_line_however_long_the_line_is(tmp_path, part_size):
    texts = ["one", 'two\nlines, \\ and "quotes"', "\U0001f600\u4e2d\u00e9" * 40, "four"]
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for n, text in enumerate(texts):
            row = {"text": text, "meta": {"text": ["no", {"}": n}]}, "score": -1.5e3, "none": None}
            if n % 2:
                row = dict(reversed(row.items()))
            file.write(json.dumps(row, ensure_ascii=n < 3) + "\n\n")
    assert texts_of(path) == texts


def test_a_long_line_is_read_as_json_reads_it(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    characters = list('ab"\\\n\t/{}[], \u00e9\u4e2d\U0001f600')
    values = [1, -2.5e3, True, None, 'x"y\\', [1, ["]", {"text": "no"}]], {}, [], {"text": {"text": []}}]
    for _ in range(500):
        monkeypatch.setattr(documents, "PART", int(rng.integers(1, 40)))
        text = "x" + "".join(rng.choice(characters, rng.integers(60))) + "x"
        fields = [("text", text), ("a", values[rng.integers(9)]), ("b", values[rng.integers(9)])]
        rng.shuffle(fields)
        row = {name: value for name, value in fields}
        line = json.dumps({**row, "text": text}, ensure_ascii=bool(rng.integers(2)))
        (tmp_path / "a.jsonl").write_text(f"{line}\n{line}", encoding="utf-8")
        assert texts_of(tmp_path / "a.jsonl") == [text, text]


@pytest.mark.parametrize(
    "line, problem",
    [
        ("no json", "line 3: "),
        ('{"content": "x", "id": 1}', 'line 3: it has no "text", but content, id'),
        ('{"text": 1}', 'line 3: "text" is 1'),
        ('["text"]', "line 3: a list"),
        ("[" * 100_000, "line 3: "),
        ('{"text": "an end is miss', "line 3: "),
    ],
)
def test_an_error_in_a_jsonl_names_the_file_and_the_line(line, problem, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n')
    with pytest.raises(UserError) as caught:
        texts_of(path)
    assert "a.jsonl: cannot be read as text" in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"a": 1, "b": [2]}', 'line 2: it has no "text"'),
        ('{"text": 1}', "line 2: '1' where one of \" belongs"),
        ('{"text": "an end is miss', "line 2: it ends within its JSON object"),
        ('{"text": "a"} {"text": "b"}', "line 2: more follows"),
        ('{"text": "an \\x escape"}', "line 2: "),
    ],
)
def test_an_error_in_a_long_line_names_it_too(line, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART", 4)
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}')
    with pytest.raises(UserError, match="a.jsonl: cannot be read as text") as caught:
        texts_of(path)
    assert problem in str(caught.value)


# ---- Encodings -------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"one\n" + mark + b"<|endoftext|>\n" + mark + b"two")
    assert texts_of(tmp_path / "a.txt") == ["one\n", "two"]
    (tmp_path / "a.jsonl").write_bytes((mark + b'{"text": "one"}\n') * 2)
    assert texts_of(tmp_path / "a.jsonl") == ["one", "one"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(mark + b"one"))
    assert texts_of(tmp_path / "a.txt.gz") == ["one"]


def test_bytes_that_are_no_utf8_are_named_by_their_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é\n".encode() * 300_000 + b"caf\xe9\n")
    with pytest.raises(UserError, match="a.txt: cannot be read as text.*line 300001 is not UTF-8"):
        texts_of(path)
    path.write_bytes("Windows calls this Unicode".encode("utf-16"))
    with pytest.raises(UserError, match="it is UTF-16; save it as UTF-8"):
        texts_of(path)


def test_a_link_counts_by_its_own_name_and_by_that_of_its_target(tmp_path):
    (tmp_path / "3f78").write_text('{"text": "one"}\n')  # as in the cache of the Hub
    (tmp_path / "train.jsonl").symlink_to("3f78")
    assert texts_of(tmp_path / "train.jsonl") == ["one"]
    (tmp_path / "UPPER.TXT").write_text("two")
    (tmp_path / "link").symlink_to("UPPER.TXT")
    assert texts_of(tmp_path / "link") == ["two"]
    (tmp_path / "loop").symlink_to("loop")
    assert kind_of(tmp_path / "loop") is None
