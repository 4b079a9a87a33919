"""Text -> documents -> tokens -> batches: deterministic in the seed, and able to start again at any step.

A text has two splits, "train" and "held-out"; "all" is what evaluate.py --data reads. A split is read in
chunks, lists of documents, which are tokenised when they are first needed, so training begins before all of a
large text is. The tokens stay in memory. Sequence n of the training order is a function of the text, the seed
and n alone.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from support.files import UserError, check_choice, fetch, reading
from support.machine import progress
from support.pretrained import END_OF_TEXT, load_tokenizer

CHUNK_CHARACTERS = 8_000_000  # of text in a chunk, about two million tokens
EVALUATION_SEED = 2**32  # evaluation reads a text in an order of its own, whatever --seed is

# ---- Tokens ----------------------------------------------------------------------------------------------


class Tokens:
    """The tokens of one split of a text: "train", "held-out" or "all", in chunks.

    An end-of-text token follows each document. What looks like a special token in a text is encoded as the
    characters that it is written with. Raises UserError if the tokenizer has no end-of-text token.
    """

    def __init__(self, text, split: str, tokenizer: Tokenizer):
        check_choice("split", split, ("train", "held-out", "all"))
        self.name = f"{split} text of {text.name}"
        self.tokenizer = tokenizer
        self.plain_tokenizer = without_special_tokens(tokenizer)
        self.end_token = tokenizer.token_to_id(END_OF_TEXT)
        if self.end_token is None:
            raise UserError(
                f"the tokenizer has no {END_OF_TEXT} token, which ends a document; name another model"
            )
        self.vocab_size = tokenizer.get_vocab_size()
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        self.chunks = []  # the tokens of the chunks so far
        self.text_chunks = text.chunks(split)  # those that are not tokenised yet

    def chunk(self, i: int) -> np.ndarray | None:
        """The tokens of chunk i; None after the last one."""
        while i >= len(self.chunks):
            with progress(desc=f"reading the {self.name}", delay=0, bar_format="{desc}"):
                documents = next(self.text_chunks, None)
            if documents is None:
                return None
            self.chunks.append(self._encode(documents))
        return self.chunks[i]

    def _encode(self, documents: list[str]) -> np.ndarray:
        parts = [np.zeros(0, self.dtype)]
        total = sum(map(len, documents))
        with progress(desc=f"tokenising the {self.name}", total=total, unit=" characters") as bar:
            for texts in grouped(documents, 1_000_000):
                # a lone surrogate, which is no UTF-8, becomes "?"
                texts = [text.encode("utf-8", "replace").decode() for text in texts if text.strip()]
                for encoding in self.plain_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                    parts.append(np.array([*encoding.ids, self.end_token], self.dtype))
                bar.update(sum(map(len, texts)))
        return np.concatenate(parts)

    def hash(self) -> str:
        """A hash of the first chunk, by which a resumed run recognises its text."""
        return hashlib.sha256(self.chunk(0)).hexdigest()[:16]


def without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer that reads <|endoftext|> and its like in a text as text.

    Some marks, such as <|fim_prefix|> and <tool_call> of Qwen2.5, are not called special in tokenizer.json.
    They are treated alike. Runs of spaces, which some tokenizers add as tokens, stay tokens.
    """
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        if token["content"].startswith("<") and token["content"].endswith(">"):
            token["special"] = True
    copy = Tokenizer.from_str(json.dumps(content))
    copy.encode_special_tokens = True
    return copy


# ---- Batches ---------------------------------------------------------------------------------------------


class Batches:
    """Fixed-length (input, target) pairs of tokens.

    A sequence is `length` inputs and the `length` tokens that lie `offset` further on; offset 1 is the next
    token. Targets are shifted here and nowhere else. The training order goes chunk after chunk, each shuffled
    by (seed, epoch, chunk), and then from the beginning again. repeats: the share of the sequences that
    repeat a passage (with_repeat).

    Raises UserError if the text is too short for one sequence.
    """

    def __init__(self, tokens: Tokens, length: int, offset=1, seed=EVALUATION_SEED, repeats=0.0):
        self.tokens = tokens
        self.length = length
        self.offset = offset
        self.seed = seed
        self.repeats = repeats
        if self.sequences_in(0) == 0:
            available = len(tokens.chunk(0))
            raise UserError(
                f"the {tokens.name} has {available:,} tokens, too few for a sequence of {length}; give more "
                "text, also a file named val.txt to hold out, or a smaller --seq-len"
            )

    def sequences_in(self, i: int) -> int:
        """How many sequences chunk i holds; 0 after the last chunk."""
        tokens = self.tokens.chunk(i)
        if tokens is None:
            return 0
        return max(0, (len(tokens) - self.offset) // self.length)

    def at_most(self, limit: int) -> int:
        """How many different sequences there are, counted up to `limit`."""
        total = 0
        i = 0
        while total < limit and self.tokens.chunk(i) is not None:
            total += self.sequences_in(i)
            i += 1
        return min(total, limit)

    def place_of(self, n: int) -> tuple[int, int, int]:
        """(epoch, chunk, place in the chunk's shuffled order) of sequence n of the training order."""
        epoch = 0
        i = 0
        while n >= self.sequences_in(i):
            n -= self.sequences_in(i)
            i += 1
            if self.tokens.chunk(i) is None:
                epoch += 1
                i = 0
        return epoch, i, n

    def sequence(self, n: int) -> tuple[np.ndarray, int]:
        """(sequence n with `offset` more tokens, how many of its first targets do not count)"""
        epoch, i, place = self.place_of(n)
        order = shuffled(self.seed, epoch, i, self.sequences_in(i))
        start = int(order[place]) * self.length
        window = self.tokens.chunk(i)[start : start + self.length + self.offset]
        generator = np.random.default_rng((self.seed, n, 0, 1))  # not one that shuffles
        if generator.random() < self.repeats:
            return with_repeat(window, self.tokens.vocab_size, generator)
        return window, 0

    def batch(self, first: int, size: int, device="cpu"):
        """Sequences first .. first+size-1 of the training order: (inputs, targets), [size, length] each.

        A target that nothing could predict is -100, which no loss counts.
        """
        windows, uncounted = zip(*(self.sequence(n) for n in range(first, first + size)))
        ids = torch.from_numpy(np.stack(windows).astype(np.int64))
        inputs = ids[:, : self.length]
        targets = ids[:, self.offset :].clone()
        for row, count in zip(targets, uncounted):
            row[:count] = -100
        if torch.device(device).type == "cuda":  # the program need not wait for the copy
            inputs = inputs.pin_memory()
            targets = targets.pin_memory()
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def batches(self, first: int, end: int, size: int, device="cpu"):
        """Sequences first .. end-1 of the training order, at most `size` in each batch."""
        for start in range(first, end, size):
            yield self.batch(start, min(size, end - start), device)


@lru_cache(maxsize=16)
def shuffled(seed: int, epoch: int, chunk: int, size: int) -> np.ndarray:
    """The order of a chunk's sequences in an epoch."""
    return np.random.default_rng((seed, epoch, chunk)).permutation(size)


def with_repeat(window: np.ndarray, vocab_size: int, generator) -> tuple[np.ndarray, int]:
    """(a sequence of the window's length that repeats a passage, how many of its first targets do not count).

    The passage has at most 128 tokens, at most half of the window, and at least a tenth of that. Four times
    in five it is the beginning of the window, which is read twice before the text goes on. Otherwise the
    passage is random tokens, repeated to the end, which only copying can predict, after the first reading.
    """
    longest = min(128, (len(window) - 1) // 2)  # so that some targets count
    size = generator.integers(max(1, longest // 10), longest + 1)
    if generator.random() < 0.8:
        return np.concatenate([window[:size], window])[: len(window)], 0
    passage = generator.integers(vocab_size, size=size).astype(window.dtype)
    return np.resize(passage, len(window)), size


# ---- A person's own text ---------------------------------------------------------------------------------

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
HELD_OUT_NAMES = re.compile(r"(^|[^a-z])(val|valid|validation|dev|test|eval|held.?out)($|[^a-z])")
LONGEST = 200_000  # characters; a longer document of a .txt is read as several


class TextFiles:
    """A .txt or .jsonl, each also with .gz, or all such files of a folder, sorted.

    A .txt is one document, or several between lines of <|endoftext|>. A line of a .jsonl is {"text": "..."}.
    Files that are named for it, such as val.txt, are held out. If there are none, the last twentieth of every
    file is, cut at a line. Raises UserError where there is no text, and later for a file that is damaged.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        self.files = [path]
        if path.is_dir():
            found = progress(path.rglob("*"), desc=f"listing {path}", unit=" files")
            self.files = sorted(file for file in found if is_text(file.relative_to(path)))
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give a text, python or fineweb-edu")
        if not self.files or not is_text(Path(self.files[0].name)):
            raise UserError(f"{path}: holds no text; give a {', '.join(SUFFIXES)}, or a folder of them")
        named = [file for file in self.files if HELD_OUT_NAMES.search(str(file.relative_to(path)).lower())]
        self.held_out_files = set(named) if len(named) < len(self.files) else set()

    def chunks(self, split: str) -> Iterator[list[str]]:
        """Lists of documents, each list of about CHUNK_CHARACTERS."""
        return grouped(self._documents(split), CHUNK_CHARACTERS)

    def _documents(self, split: str) -> Iterator[str]:
        for file in self.files:
            if split == "all":
                yield from join_documents(pieces_of(file))
            elif self.held_out_files:
                if (file in self.held_out_files) == (split == "held-out"):
                    yield from join_documents(pieces_of(file))
            else:
                yield from join_documents(pieces_of_split(file, split))


def is_text(path: Path) -> bool:
    """Whether a path inside a data folder is a text. Hidden and unfinished files and runs are not."""
    hidden = any(part.startswith(".") for part in path.parts)
    unfinished = path.stem.endswith(".part")
    return path.name.lower().endswith(SUFFIXES) and path.name != "log.jsonl" and not hidden and not unfinished


def pieces_of(file: Path) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends with it) for the lines of a file, in their order."""
    open_file = gzip.open if file.suffix.lower() == ".gz" else open
    is_json = file.name.lower().endswith((".jsonl", ".jsonl.gz"))
    with reading(file, "UTF-8 text"), open_file(file, "rt", encoding="utf-8-sig") as lines:
        if is_json:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield text_of_line(line, number), True
        else:
            line = lines.readline(10_000)  # characters at most: a whole text may be one line
            while line:
                if line.rstrip() == END_OF_TEXT:
                    yield "", True
                else:
                    yield line, False
                line = lines.readline(10_000)


def text_of_line(line: str, number: int) -> str:
    """The "text" of a line of a .jsonl. Raises ValueError if it has none."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'line {number} is not {{"text": "..."}}: {error!r}') from error
    if not isinstance(text, str):
        raise ValueError(f'"text" in line {number} is no string')
    return text.strip()


def pieces_of_split(file: Path, split: str) -> Iterator[tuple[str, bool]]:
    """The pieces of one split of a file: the last twentieth of its characters is held out."""
    characters = sum(len(text) for text, _ in pieces_of(file))
    first_held_out = characters - characters // 20
    position = 0
    for text, ends in pieces_of(file):
        if (position >= first_held_out) == (split == "held-out"):
            yield text, ends
        position += len(text)


def join_documents(pieces: Iterator[tuple[str, bool]]) -> Iterator[str]:
    """The documents that consist of these pieces."""
    document = []
    characters = 0
    for text, ends in pieces:
        document.append(text)
        characters += len(text)
        if ends or characters >= LONGEST:
            yield "".join(document)
            document = []
            characters = 0
    if document:
        yield "".join(document)


def grouped(texts, size: int) -> Iterator[list[str]]:
    """Lists of neighbouring texts, of about `size` characters together; one empty list if there are none."""
    group = []
    characters = 0
    for text in texts:
        if characters >= size:
            yield group
            group = []
            characters = 0
        group.append(text)
        characters += len(text)
    yield group


# ---- Python source code ----------------------------------------------------------------------------------


class PythonSource:
    """The .py files of the standard library and of the installed torch package, without their tests.

    One file in twenty is held out, by a hash of its path, the same on every machine. The built-in model was
    pretrained without the files that are held out here.
    """

    SKIPPED_FOLDERS = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages"}
    name = "python"

    def chunks(self, split: str) -> Iterator[list[str]]:
        """One list of documents: in the order of the hash, the first CHUNK_CHARACTERS are a fair sample."""
        files = self._files("stdlib", Path(json.__file__).parents[1])
        files += self._files("torch", Path(torch.__file__).parent)
        files.sort()
        yield next(grouped(self._documents(files, split), CHUNK_CHARACTERS))

    def _files(self, package: str, root: Path) -> list[tuple[str, Path]]:
        """(hash of the path, path) of each file."""
        files = []
        for path in root.rglob("*.py"):
            below = path.relative_to(root)
            is_test = self.SKIPPED_FOLDERS.intersection(below.parts) or below.name.startswith("test_")
            if path.is_file() and not is_test:
                path_hash = hashlib.sha1(f"{package}/{below.as_posix()}".encode()).hexdigest()
                files.append((path_hash, path))
        return files

    def _documents(self, files: list[tuple[str, Path]], split: str) -> Iterator[str]:
        for path_hash, path in files:
            held_out = int(path_hash[-4:], 16) % 20 == 0
            if split == "all" or held_out == (split == "held-out"):
                yield path.read_text(encoding="utf-8", errors="ignore")


# ---- FineWeb-Edu -----------------------------------------------------------------------------------------

FINEWEB = "kjj0/finewebedu10B-gpt2"  # a data set of the Hub
GPT2 = "openai-community/gpt2"
GPT2_END_OF_TEXT = 50256
DOCUMENTS_AT_ONCE = 2000  # about two million tokens


class FineWebEdu:
    """FineWeb-Edu, which the Hub holds as GPT-2 tokens: 99 shards of 100M tokens and one that is held out.

    A shard is fetched when it is first needed. GPT-2's tokenizer loses nothing, so decoding gives the text.
    """

    name = "fineweb-edu"

    def chunks(self, split: str) -> Iterator[list[str]]:
        """Lists of documents, each list of about two million tokens."""
        gpt2 = load_tokenizer(GPT2)
        names = ["finewebedu_val_000000.bin"]
        if split == "train":
            names = [f"finewebedu_train_{i:06d}.bin" for i in range(1, 100)]
        for name in names:
            tokens = read_shard(fetch(FINEWEB, [name], "dataset") / name)
            starts = np.flatnonzero(tokens == GPT2_END_OF_TEXT)  # the separator comes first in each document
            documents = np.split(tokens, starts)
            for first in range(0, len(documents), DOCUMENTS_AT_ONCE):
                some = documents[first : first + DOCUMENTS_AT_ONCE]
                yield gpt2.decode_batch([document.tolist() for document in some])


def read_shard(path: Path) -> np.ndarray:
    """The uint16 tokens of a shard, mapped from the file. Raises UserError for a damaged file.

    They follow a header of 256 int32: magic 20240520, version 1, number of tokens.
    """
    with reading(path, "a whole token shard"):
        header = np.fromfile(path, dtype="<i4", count=256)
        if list(header[:2]) != [20240520, 1] or path.stat().st_size != 1024 + 2 * int(header[2]):
            raise ValueError("its header or its length is wrong; delete it, and it is fetched again")
        return np.memmap(path, dtype="<u2", mode="r", offset=1024)


# ---- All texts -------------------------------------------------------------------------------------------

BUILT_IN_TEXTS = {"python": PythonSource, "fineweb-edu": FineWebEdu}


def open_text(name: str):
    """The text for --data: "python", "fineweb-edu", or the path of a file or folder."""
    if name in BUILT_IN_TEXTS:
        return BUILT_IN_TEXTS[name]()
    return TextFiles(Path(name))
