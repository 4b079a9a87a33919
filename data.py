"""Text -> tokens -> batches of (input, target), deterministic in the seed and able to start again at any step.

A source yields its documents in an order that never changes, in chunks of about two million tokens. Each becomes a file
in the cache when it is first needed. Sequence n of the training order is a function of (source, seed, n) alone.
"""

import gzip
import hashlib
import json
import os
import re
from functools import lru_cache, partial
from itertools import count, islice, takewhile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from qwen import UserError, handling, load_tokenizer, locate, replace_file

CHUNK = 8_000_000  # characters of text in a chunk, about 2M tokens
END_OF_TEXT = "<|endoftext|>"
FINEWEB = "kjj0/finewebedu10B-gpt2"

def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ouroboros"

# ---- Sources: a key that changes when the text does, and chunks(split) of "train" or "val", lists of documents ------
class PythonSource:
    """The .py files of the standard library and of the installed torch package, tests left out. Held out by a hash of
    the path, the same on every machine: what is held out here was held out of the built-in model's pretraining too."""
    def __init__(self):
        skip = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages"}
        self.files = []  # (hash of the path, path): sorted by it, every chunk is a fair sample
        for package, root in ("stdlib", Path(json.__file__).parents[1]), ("torch", Path(torch.__file__).parent):
            for path in root.rglob("*.py"):
                below = path.relative_to(root)
                if path.is_file() and not skip.intersection(below.parts) and not below.name.startswith("test_"):
                    self.files.append((hashlib.sha1(f"{package}/{below.as_posix()}".encode()).hexdigest(), path))
        self.files.sort()
        self.key = [(name, path.stat().st_size) for name, path in self.files]
    def chunks(self, split):
        mine = [path for name, path in self.files if (int(name[-4:], 16) % 20 == 0) == (split == "val")]
        return grouped((path.read_text(encoding="utf-8", errors="ignore") for path in mine), CHUNK)

class TextSource:
    """A .txt, .jsonl or .jsonl.gz file, or a folder of them.
    Documents: the "text" of each line of a .jsonl; in a .txt, what stands between lines of <|endoftext|>, or the file,
    a lone one in pieces. Held out: the val.* of a folder with train.* and val.*, else every twentieth document."""
    def __init__(self, path: Path):
        kinds = (".txt", ".jsonl", ".jsonl.gz")
        self.files = [p for p in ([path] if path.is_file() else sorted(path.rglob("*"))) if p.name.endswith(kinds)]
        if not self.files:
            raise UserError(f"{path}: no such file, or no text; --data takes {', '.join(kinds)}, python or fineweb-edu")
        self.own = {split: [p for p in self.files if p.name.split(".")[0] == split] for split in ("train", "val")}
        self.key = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
    def chunks(self, split):
        if all(self.own.values()):
            return grouped((document for path in self.own[split] for document in self.documents(path)), CHUNK)
        everything = enumerate(d for path in self.files for d in self.documents(path) if d.strip())
        return grouped((document for n, document in everything if (n % 20 == 0) == (split == "val")), CHUNK)
    def documents(self, path):
        with handling(path, 'read as text: a .txt is UTF-8, a line of a .jsonl is {"text": "..."}'):
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                if ".jsonl" in path.suffixes:
                    yield from (json.loads(line)["text"].strip() for line in file if line.strip())
                    return
                documents = re.split(r"^<\|endoftext\|>\s*$", file.read(), flags=re.MULTILINE)
            if len(documents) == 1 and len(self.files) == 1:
                documents = map("".join, grouped(documents[0].splitlines(keepends=True), 10_000))
            yield from documents

class FineWebSource:
    """FineWeb-Edu, on the Hub as GPT-2 tokens: 99 shards of 100M, one held out. Decoding gives the very text back."""
    key = [FINEWEB, CHUNK]
    def chunks(self, split):
        gpt2 = load_tokenizer("openai-community/gpt2")
        for name in ["val_000000"] if split == "val" else [f"train_{i:06d}" for i in range(1, 100)]:
            tokens = read_shard(locate(FINEWEB, f"finewebedu_{name}.bin", repo_type="dataset"))
            starts = np.flatnonzero(tokens == 50256)  # the separator comes first in each document
            yield from grouped((gpt2.decode(document.tolist()) for document in np.split(tokens, starts)), CHUNK)

def read_shard(path: Path) -> np.ndarray:
    """The uint16 tokens of a .bin shard behind its header of 256 int32: magic 20240520, version 1, token count."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or tuple(header[:2]) != (20240520, 1) or path.stat().st_size != 1024 + 2 * int(header[2]):
        raise UserError(f"{path}: not a whole token shard; delete it and run again, it is then fetched anew")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)

def grouped(texts, size: int):
    """Lists of neighbouring texts of about `size` characters in all."""
    group, characters = [], 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= size:
            yield group
            group, characters = [], 0
    if group:
        yield group

SOURCES = {"python": PythonSource, "fineweb-edu": FineWebSource}

def open_source(name: str):  # python, fineweb-edu, or a path
    return SOURCES[name]() if name in SOURCES else TextSource(Path(name))

# ---- Tokens and batches ----------------------------------------------------------------------------------------------
class Batches:
    """Fixed-length (input, target) pairs of one split, "train" or "val", of a source.
    A sequence is T inputs and the T tokens that lie `offset` further on (1: the next token). Only here are targets
    shifted. The order: chunk after chunk, each shuffled by (seed, epoch, chunk), and again from the beginning."""
    def __init__(self, source, split: str, tokenizer: Tokenizer, length: int, offset=1, seed=0):
        self.source, self.split, self.tokenizer = source, split, tokenizer
        self.length, self.offset, self.seed = length, offset, seed
        self.end = tokenizer.token_to_id(END_OF_TEXT)
        if self.end is None:
            raise UserError(f"the tokenizer has no {END_OF_TEXT} token; use the model's own tokenizer.json")
        self.largest = max(tokenizer.get_vocab().values())
        self.dtype = np.uint16 if self.largest < 2**16 else np.uint32
        identity = json.dumps([source.key, split, CHUNK]) + tokenizer.to_str()
        self.folder = cache_folder() / hashlib.sha256(identity.encode()).hexdigest()[:24]
        self.tokens, self.documents, self.complete = [], None, False
        if not self.sequences(0):
            raise UserError(f"the {'held-out' if split == 'val' else 'training'} text is too short for one sequence of "
                            f"{length} tokens; give more text or a smaller --seq-len")
    def chunk(self, i: int) -> np.ndarray | None:
        """The tokens of chunk i, from the cache or encoded now; None after the last."""
        while i >= len(self.tokens) and not self.complete:
            path = self.folder / f"{len(self.tokens):05d}.npy"
            if not path.exists():
                if self.documents is None:
                    self.documents = islice(self.source.chunks(self.split), len(self.tokens), None)
                replace_file(path, partial(np.save, arr=self.encode(next(self.documents, [])), allow_pickle=False))
            elif self.documents is not None:  # another process was faster
                next(self.documents, None)
            with handling(path, "read as tokens", "delete it, it is then made anew"):
                tokens = np.load(path, mmap_mode="r", allow_pickle=False)
                if tokens.dtype != self.dtype or tokens.ndim != 1 or tokens.max(initial=0) > self.largest:
                    raise ValueError("not tokens of this tokenizer")
            self.complete = len(tokens) == 0  # an empty file marks the end
            self.tokens += [] if self.complete else [tokens]
        return self.tokens[i] if i < len(self.tokens) else None
    def encode(self, documents) -> np.ndarray:
        documents = [d.encode("utf-8", "replace").decode() for d in documents if d.strip()]  # no lone surrogates
        encodings = self.tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        return np.concatenate([np.zeros(0, self.dtype), *(np.array([*e.ids, self.end], self.dtype) for e in encodings)])
    def sequences(self, i: int) -> int:  # how many chunk i holds
        tokens = self.chunk(i)
        return 0 if tokens is None else max(0, (len(tokens) - self.offset) // self.length)
    def locate(self, n: int) -> tuple[int, int, int]:
        """(epoch, chunk, place in its shuffled order) of sequence n of the training order."""
        for epoch in count():
            for i in takewhile(lambda i: self.chunk(i) is not None, count()):
                if n < self.sequences(i):
                    return epoch, i, n
                n -= self.sequences(i)
    def batch(self, first: int, size: int, device="cpu"):
        """Sequences first .. first+size-1 of the training order: inputs and targets, [size, T] int64 each."""
        windows = []
        for epoch, i, place in map(self.locate, range(first, first + size)):
            start = int(shuffled(self.seed, epoch, i, self.sequences(i))[place]) * self.length
            windows.append(self.chunk(i)[start : start + self.length + self.offset])
        ids, cuda = torch.from_numpy(np.stack(windows).astype(np.int64)), torch.device(device).type == "cuda"
        ids = (ids.pin_memory() if cuda else ids).to(device, non_blocking=cuda)  # pinned: the program need not wait
        return ids[:, : self.length], ids[:, self.offset :]

@lru_cache(maxsize=16)
def shuffled(seed: int, epoch: int, chunk: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, chunk)).permutation(size)
