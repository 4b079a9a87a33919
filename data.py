"""Text -> tokens -> batches of (input, target): deterministic in the seed, and able to start again at any
step.

A source yields its documents in an order that never changes, in chunks of about two million tokens. The
tokens of a chunk become a file in the cache when they are first needed. Sequence n of the training order
is a function of source, seed and n alone.
"""

import gzip
import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from files import UserError, cache_folder, explaining, replace_file
from hub import END_OF_TEXT, load_tokenizer, locate

CHUNK_CHARACTERS = 8_000_000  # of text in a chunk, about two million tokens
FINEWEB = "kjj0/finewebedu10B-gpt2"  # a data set of the Hub
GPT2 = "openai-community/gpt2"
GPT2_END_OF_TEXT = 50256

# ---- Sources ---------------------------------------------------------------------------------------------
#
# A source has a key, which changes when the text does, and chunks(split), which yields lists of documents.
# split is "train" or "val".


class PythonSource:
    """The .py files of the standard library and of the installed torch package, without their tests.

    One file in twenty is held out, by a hash of its path, the same on every machine. The built-in model was
    pretrained without the files that are held out here.
    """

    SKIPPED_FOLDERS = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages"}

    def __init__(self):
        self.files = []  # (hash of the path, path): in the order of the hash, every chunk is a fair sample
        self._add_files("stdlib", Path(json.__file__).parents[1])
        self._add_files("torch", Path(torch.__file__).parent)
        self.files.sort()
        self.key = [(path_hash, path.stat().st_size) for path_hash, path in self.files]

    def _add_files(self, package: str, root: Path):
        for path in root.rglob("*.py"):
            below = path.relative_to(root)
            is_test = self.SKIPPED_FOLDERS.intersection(below.parts) or below.name.startswith("test_")
            if path.is_file() and not is_test:
                path_hash = hashlib.sha1(f"{package}/{below.as_posix()}".encode()).hexdigest()
                self.files.append((path_hash, path))

    def chunks(self, split: str):
        return grouped(self._documents(split), CHUNK_CHARACTERS)

    def _documents(self, split: str):
        for path_hash, path in self.files:
            held_out = int(path_hash[-4:], 16) % 20 == 0
            if held_out == (split == "val"):
                yield path.read_text(encoding="utf-8", errors="ignore")


class TextSource:
    """A .txt, .jsonl or .jsonl.gz file, or a folder of them.

    Documents: the "text" of each line of a .jsonl. In a .txt, what lies between lines of <|endoftext|>,
    or the whole file; a lone .txt without such lines is split into pieces. Held out: the val.* of a
    folder that has train.* and val.*, otherwise every twentieth document.

    Raises UserError if there is no such file, and later if a file is not what its name says.
    """

    SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")

    def __init__(self, path: Path):
        candidates = [path] if path.is_file() else sorted(path.rglob("*"))
        self.files = [file for file in candidates if file.name.endswith(self.SUFFIXES)]
        if not self.files:
            kinds = ", ".join(self.SUFFIXES)
            raise UserError(
                f"{path}: no such file, or no text in it; --data takes {kinds}, python or fineweb-edu"
            )

        self.train_files = [file for file in self.files if file.name.split(".")[0] == "train"]
        self.val_files = [file for file in self.files if file.name.split(".")[0] == "val"]
        self.key = []
        for file in self.files:
            status = file.stat()
            self.key.append((str(file.resolve()), status.st_size, status.st_mtime_ns))

    def chunks(self, split: str):
        return grouped(self._split(split), CHUNK_CHARACTERS)

    def _split(self, split: str):
        """The documents of one split."""
        if self.train_files and self.val_files:
            files = self.train_files if split == "train" else self.val_files
            for file in files:
                yield from self._documents(file)
            return

        number = 0
        for file in self.files:
            for document in self._documents(file):
                if document.strip():
                    held_out = number % 20 == 0
                    if held_out == (split == "val"):
                        yield document
                    number += 1

    def _documents(self, path: Path):
        """All documents of one file."""
        open_file = gzip.open if path.suffix == ".gz" else open
        shape = 'read as text: a .txt is UTF-8, a line of a .jsonl is {"text": "..."}'
        with explaining(path, shape), open_file(path, "rt", encoding="utf-8") as file:
            if ".jsonl" in path.suffixes:
                yield from json_lines(file)
            else:
                yield from self._text_documents(file.read())

    def _text_documents(self, text: str):
        """The documents of a .txt."""
        documents = re.split(r"^<\|endoftext\|>\s*$", text, flags=re.MULTILINE)
        if len(documents) > 1 or len(self.files) > 1:
            yield from documents
            return
        for lines in grouped(text.splitlines(keepends=True), 10_000):
            yield "".join(lines)


def json_lines(file):
    """The "text" of each line of a .jsonl. Raises ValueError for a line that holds anything else."""
    for line in file:
        if line.strip():
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise ValueError(f'"text" is {text!r}')
            yield text.strip()


class FineWebSource:
    """FineWeb-Edu, which the Hub holds as GPT-2 tokens: 99 shards of 100M tokens and one that is held out.

    GPT-2's tokenizer loses nothing, so decoding gives the text itself.
    """

    key = [FINEWEB, CHUNK_CHARACTERS]

    def chunks(self, split: str):
        gpt2 = load_tokenizer(GPT2)
        names = ["val_000000"]
        if split == "train":
            names = [f"train_{i:06d}" for i in range(1, 100)]
        for name in names:
            tokens = read_shard(locate(FINEWEB, f"finewebedu_{name}.bin", repo_type="dataset"))
            yield from grouped(shard_documents(tokens, gpt2), CHUNK_CHARACTERS)


def read_shard(path: Path) -> np.ndarray:
    """The uint16 tokens of a shard, mapped from the file.

    They follow a header of 256 int32: magic 20240520, version 1, number of tokens. Raises UserError for a
    file with another header or of another length.
    """
    header = np.fromfile(path, dtype="<i4", count=256)
    whole = (
        len(header) == 256
        and (header[0], header[1]) == (20240520, 1)
        and path.stat().st_size == 1024 + 2 * int(header[2])
    )
    if not whole:
        raise UserError(f"{path}: not a whole token shard; delete it and run again, it is then fetched anew")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def shard_documents(tokens: np.ndarray, gpt2: Tokenizer):
    """The texts of a shard. The separator comes first in each document."""
    starts = np.flatnonzero(tokens == GPT2_END_OF_TEXT)
    for document in np.split(tokens, starts):
        yield gpt2.decode(document.tolist())


def grouped(texts, size: int):
    """Lists of neighbouring texts, of about `size` characters together."""
    group = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= size:
            yield group
            group = []
            characters = 0
    if group:
        yield group


BUILT_IN_SOURCES = {"python": PythonSource, "fineweb-edu": FineWebSource}


def open_source(name: str):
    """The source for --data: "python", "fineweb-edu", or the path of a file or folder."""
    if name in BUILT_IN_SOURCES:
        return BUILT_IN_SOURCES[name]()
    return TextSource(Path(name))


# ---- Tokens and batches ----------------------------------------------------------------------------------


class Batches:
    """Fixed-length (input, target) pairs of one split, "train" or "val", of a source.

    A sequence is `length` inputs and the `length` tokens that lie `offset` further on; offset 1 is the
    next token. Targets are shifted here and nowhere else. The training order goes chunk after chunk, each
    shuffled by (seed, epoch, chunk), and then from the beginning again.

    Raises UserError if the tokenizer has no end-of-text token or the text is too short for one sequence.
    """

    def __init__(self, source, split: str, tokenizer: Tokenizer, length: int, offset=1, seed=0):
        self.source = source
        self.split = split
        self.tokenizer = tokenizer
        self.length = length
        self.offset = offset
        self.seed = seed

        self.end_token = tokenizer.token_to_id(END_OF_TEXT)
        if self.end_token is None:
            raise UserError(f"the tokenizer has no {END_OF_TEXT} token; use the model's own tokenizer.json")
        self.largest_token = max(tokenizer.get_vocab().values())
        self.dtype = np.uint16 if self.largest_token < 2**16 else np.uint32

        identity = json.dumps([source.key, split, CHUNK_CHARACTERS]) + tokenizer.to_str()
        self.folder = cache_folder() / hashlib.sha256(identity.encode()).hexdigest()[:24]
        self.chunks = []  # the tokens of the chunks loaded so far, mapped from their files
        self.complete = False  # whether these are all chunks of the text
        self.text = None  # an iterator over the source's chunks, once one is missing from the cache
        self.text_chunks_read = 0

        if self.sequences_in(0) == 0:
            kind = "held-out" if split == "val" else "training"
            raise UserError(
                f"the {kind} text is too short for one sequence of {length} tokens; give more text or a "
                "smaller --seq-len"
            )

    # -- chunks of tokens

    def chunk(self, i: int) -> np.ndarray | None:
        """The tokens of chunk i, from the cache or encoded now; None after the last chunk."""
        while i >= len(self.chunks) and not self.complete:
            self._load_next_chunk()
        return self.chunks[i] if i < len(self.chunks) else None

    def _load_next_chunk(self):
        i = len(self.chunks)
        path = self.folder / f"{i:05d}.npy"
        if not path.exists():
            self._write_chunk(i, path)

        with explaining(path, "read as tokens", "delete it, it is then made anew"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if tokens.dtype != self.dtype or tokens.ndim != 1 or tokens.max(initial=0) > self.largest_token:
                raise ValueError("not tokens of this tokenizer")
        if len(tokens) == 0:  # an empty file marks the end of the text
            self.complete = True
        else:
            self.chunks.append(tokens)

    def _write_chunk(self, i: int, path: Path):
        if self.text is None:
            self.text = self.source.chunks(self.split)
        while self.text_chunks_read < i:  # chunks that were in the cache already
            next(self.text, None)
            self.text_chunks_read += 1
        documents = next(self.text, [])
        self.text_chunks_read += 1
        tokens = self._encode(documents)
        replace_file(path, lambda part: np.save(part, tokens, allow_pickle=False))

    def _encode(self, documents: list[str]) -> np.ndarray:
        """The tokens of the documents, with an end-of-text token after each."""
        texts = []
        for document in documents:
            if document.strip():
                texts.append(document.encode("utf-8", "replace").decode())  # a lone surrogate becomes "?"
        parts = [np.zeros(0, self.dtype)]
        for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, self.end_token], self.dtype))
        return np.concatenate(parts)

    # -- sequences of tokens

    def sequences_in(self, i: int) -> int:
        """How many sequences chunk i holds; 0 after the last chunk."""
        tokens = self.chunk(i)
        if tokens is None:
            return 0
        return max(0, (len(tokens) - self.offset) // self.length)

    def place_of(self, n: int) -> tuple[int, int, int]:
        """(epoch, chunk, place in the chunk's shuffled order) of sequence n of the training order."""
        epoch = 0
        i = 0
        while n >= self.sequences_in(i):
            n -= self.sequences_in(i)
            i += 1
            if self.chunk(i) is None:
                epoch += 1
                i = 0
        return epoch, i, n

    def batch(self, first: int, size: int, device="cpu"):
        """Sequences first ..

        first+size-1 of the training order: inputs and targets, [size, length] int64 each.
        """
        windows = []
        for n in range(first, first + size):
            epoch, i, place = self.place_of(n)
            order = shuffled(self.seed, epoch, i, self.sequences_in(i))
            start = int(order[place]) * self.length
            windows.append(self.chunk(i)[start : start + self.length + self.offset])
        ids = torch.from_numpy(np.stack(windows).astype(np.int64))

        if torch.device(device).type == "cuda":
            ids = ids.pin_memory().to(device, non_blocking=True)  # the program need not wait for the copy
        else:
            ids = ids.to(device)
        return ids[:, : self.length], ids[:, self.offset :]


@lru_cache(maxsize=16)
def shuffled(seed: int, epoch: int, chunk: int, size: int) -> np.ndarray:
    """The order of a chunk's sequences in an epoch."""
    return np.random.default_rng((seed, epoch, chunk)).permutation(size)
