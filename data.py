"""Text -> tokens -> batches of (input, target): deterministic in the seed, and able to start again at any
step.

The tokens of a chunk of a source (sources.py) become a file in the cache when they are first needed.
Sequence n of the training order is a function of source, seed and n alone.
"""

import hashlib
import json
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import sources
from files import UserError, cache_folder, explaining, replace_file
from hub import END_OF_TEXT
from processes import RANK

TOKEN_RULE = "marks in a text are text"  # part of the cache's key: change it when the tokens change
ENCODED_AT_ONCE = 1_000_000  # characters

# ---- Tokens ----------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """How much text a split has, as far as it was read."""

    documents: int  # or parts of documents, where the split cuts them
    tokens: int
    sequences: int
    is_all: bool  # False: the numbers are those of the first chunk


class Tokens:
    """The tokens of one split, "train" or "val", of a source, in chunks.

    An end-of-text token follows each document. What looks like a special token in a text is encoded as the
    characters that it is written with.

    Raises UserError if the tokenizer has no end-of-text token.
    """

    def __init__(self, source, split: str, tokenizer: Tokenizer):
        self.source = source
        self.split = split
        self.end_token = tokenizer.token_to_id(END_OF_TEXT)
        if self.end_token is None:
            raise UserError(
                f"the tokenizer.json of this model has no {END_OF_TEXT} token, which ends a document; give "
                "--model another model, such as one of Qwen2.5"
            )
        self.largest_token = max(tokenizer.get_vocab().values())
        self.dtype = np.uint16 if self.largest_token < 2**16 else np.uint32

        serialized = tokenizer.to_str()
        self.tokenizer = without_special_tokens(serialized)
        identity = json.dumps([TOKEN_RULE, source.key, split, sources.CHUNK_CHARACTERS]) + serialized
        self.folder = cache_folder() / hashlib.sha256(identity.encode()).hexdigest()[:24]
        self.chunks = []  # the tokens of the chunks loaded so far, mapped from their files
        self.complete = False  # whether these are all chunks of the text
        self.text = None  # an iterator over the source's chunks, once one is missing from the cache
        self.text_chunks_read = 0

    def chunk(self, i: int) -> np.ndarray | None:
        """The tokens of chunk i, from the cache or encoded now; None after the last chunk."""
        while i >= len(self.chunks) and not self.complete:
            self._load_next_chunk()
        return self.chunks[i] if i < len(self.chunks) else None

    def text_hash(self) -> str:
        """A hash of the first chunk of tokens, by which a resumed run recognises its text."""
        return hashlib.sha256(self.chunk(0)).hexdigest()[:16]

    def _path(self, i: int):
        return self.folder / f"{i:05d}.npy"

    def _load_next_chunk(self):
        i = len(self.chunks)
        path = self._path(i)
        if not path.exists():
            self._write_chunk(i)

        with explaining(path, "read as tokens", "delete it, it is then made anew"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if tokens.dtype != self.dtype or tokens.ndim != 1 or tokens.max(initial=0) > self.largest_token:
                raise ValueError("not tokens of this tokenizer")
        if len(tokens) == 0:  # an empty file marks the end of the text
            self.complete = True
        else:
            self.chunks.append(tokens)

    def _write_chunk(self, i: int):
        if self.text is None:
            self.text = self.source.chunks(self.split)
        missing = range(self.text_chunks_read, i)  # chunks that were in the cache already
        for _ in tqdm(missing, desc="finding the place in the text", leave=False, delay=1, disable=RANK > 0):
            next(self.text, None)
        documents, is_last = next(self.text, ([], True))
        self.text_chunks_read = i + 1

        self._save_chunk(i, self._encode(documents))
        if is_last:
            self._save_chunk(i + 1, np.zeros(0, self.dtype))

    def _save_chunk(self, i: int, tokens: np.ndarray):
        replace_file(self._path(i), lambda part: np.save(part, tokens, allow_pickle=False))

    def _encode(self, documents: list[str]) -> np.ndarray:
        """The tokens of the documents, with an end-of-text token after each."""
        kind = "held-out" if self.split == "val" else "training"
        total = sum(map(len, documents))
        parts = [np.zeros(0, self.dtype)]
        with tqdm(
            total=total,
            desc=f"tokenizing {kind} text",
            unit=" characters",
            unit_scale=True,
            leave=False,
            delay=0.5,
            disable=RANK > 0,
        ) as bar:
            for texts in neighbours(documents, ENCODED_AT_ONCE):
                for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                    parts.append(np.array([*encoding.ids, self.end_token], self.dtype))
                bar.update(sum(map(len, texts)))
        return np.concatenate(parts)


def neighbours(documents: list[str], size: int):
    """Lists of the documents that are not blank, of about `size` characters together."""
    texts = []
    characters = 0
    for document in documents:
        if document.strip():
            texts.append(document.encode("utf-8", "replace").decode())  # a lone surrogate becomes "?"
            characters += len(document)
        if characters >= size:
            yield texts
            texts = []
            characters = 0
    yield texts


@lru_cache(maxsize=2)
def without_special_tokens(serialized: str) -> Tokenizer:
    """A copy of a tokenizer that reads <|endoftext|> and its like in a text as text.

    Some marks, such as <|fim_prefix|> and <tool_call> of Qwen2.5, are not called special in tokenizer.json.
    They are treated alike. Runs of spaces, which some tokenizers add as tokens, stay tokens.
    """
    tokenizer = Tokenizer.from_str(serialized)
    marks = []
    for token in tokenizer.get_added_tokens_decoder().values():
        if not token.special and token.content.startswith("<") and token.content.endswith(">"):
            marks.append(token.content)
    if marks:
        content = json.loads(serialized)
        for token in content["added_tokens"]:
            if token["content"] in marks:
                token["special"] = True
        tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


# ---- Batches ---------------------------------------------------------------------------------------------


class Batches(Tokens):
    """Fixed-length (input, target) pairs of one split, "train" or "val", of a source.

    A sequence is `length` inputs and the `length` tokens that lie `offset` further on; offset 1 is the
    next token. Targets are shifted here and nowhere else. The training order goes chunk after chunk, each
    shuffled by (seed, epoch, chunk), and then from the beginning again.

    Raises UserError if the tokenizer has no end-of-text token or the text is too short for one sequence.
    """

    def __init__(self, source, split: str, tokenizer: Tokenizer, length: int, offset=1, seed=0):
        super().__init__(source, split, tokenizer)
        self.length = length
        self.offset = offset
        self.seed = seed
        if self.sequences_in(0) == 0:
            self._refuse_short_text(tokenizer)

    def _refuse_short_text(self, tokenizer: Tokenizer):
        """Raise a UserError with a length that fits both splits."""
        sizes = {}
        for split in ("train", "val"):
            tokens = Tokens(self.source, split, tokenizer).chunk(0)
            sizes[split] = 0 if tokens is None else len(tokens)

        kind = "held-out" if self.split == "val" else "training"
        longest_that_fits = min(sizes.values()) - 2  # a target lies at most two tokens after its input
        if longest_that_fits >= 8:
            advice = f"--seq-len {longest_that_fits} or less fits; otherwise give more text"
        else:
            advice = "give more text"
        raise UserError(
            f"{self.source.name}: the {kind} text is too short for one sequence of {self.length} tokens, it "
            f"has {sizes[self.split]}; {advice}"
        )

    def count(self) -> Count:
        """How much text this split has. Of a text that is longer than a chunk, the first chunk is counted."""
        first = self.chunk(0)
        if self._path(1).exists():  # it may be the end of the text, which then costs nothing to read
            self.chunk(1)
        documents = int(np.count_nonzero(first == self.end_token))
        is_all = self.complete and len(self.chunks) == 1
        return Count(documents, len(first), self.sequences_in(0), is_all)

    def at_most(self, limit: int) -> int:
        """How many different sequences there are, counted up to `limit`."""
        total = 0
        i = 0
        while total < limit and self.chunk(i) is not None:
            total += self.sequences_in(i)
            i += 1
        return min(total, limit)

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
        """Sequences first .. first+size-1 of the training order: (inputs, targets), [size, length] each."""
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
