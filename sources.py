"""Where text comes from, and which of it is held out.

A source has a name for messages, a key that changes when the text or the rule of its split does, notes for
the person who starts a run, and chunks(split), which yields pairs: a list of documents of about
CHUNK_CHARACTERS together, and whether it is the last list. split is "train" or "val". The order of the
documents never changes.
"""

import hashlib
import json
import re
import stat
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from documents import SUFFIXES, kind_of, read_documents
from files import UserError, explaining
from hub import load_tokenizer, locate
from processes import RANK
from run_folder import STEP_FOLDER

CHUNK_CHARACTERS = 8_000_000  # of text in a chunk, about two million tokens
FINEWEB = "kjj0/finewebedu10B-gpt2"  # a data set of the Hub
GPT2 = "openai-community/gpt2"
GPT2_END_OF_TEXT = 50256


def open_source(name: str):
    """The source for --data: "python", "fineweb-edu", or the path of a file or folder."""
    if name in BUILT_IN_SOURCES:
        return BUILT_IN_SOURCES[name]()
    return TextSource(Path(name))


def grouped(texts, size: int):
    """Pairs: a list of neighbouring texts of about `size` characters together, whether it is the last."""
    group = []
    characters = 0
    for text in texts:
        if characters >= size:
            yield group, False
            group = []
            characters = 0
        group.append(text)
        characters += len(text)
    yield group, True


# ---- Python source code ----------------------------------------------------------------------------------


class PythonSource:
    """The .py files of the standard library and of the installed torch package, without their tests.

    One file in twenty is held out, by a hash of its path, the same on every machine. The built-in model was
    pretrained without the files that are held out here.
    """

    SKIPPED_FOLDERS = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages"}
    name = "python"
    notes = []

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


# ---- A person's own text ---------------------------------------------------------------------------------


class TextSource:
    """A file that documents.py can read, or a folder of such files.

    Held out: the files of a folder that are named for it, such as val.txt, otherwise about 5% of all
    characters by split_by_size. The key depends on the content of the files, in their order, and not on
    where they are.

    Raises UserError if there is no such file, and later if a file is not what its name says.
    """

    SPLIT_RULE = "by size, 1"  # part of the key: change it when the documents or their split change

    def __init__(self, path: Path):
        self.name = str(path)
        self.notes = []
        if path.is_dir():
            found = FolderSearch(path)
            self.files = found.files
            self.notes += found.notes()
        else:
            self.files = [path] if path.is_file() and kind_of(path) else []
        if not self.files:
            refuse_path(path, self.notes)

        self.held_out_files = []
        if path.is_dir():
            self.held_out_files = [file for file in self.files if is_named_held_out(file.relative_to(path))]
        if len(self.held_out_files) == len(self.files):
            self.held_out_files = []
        held_out = set(self.held_out_files)
        self.training_files = [file for file in self.files if file not in held_out]
        if self.held_out_files:
            self.notes.append(
                f"held out: {short_list(self.held_out_files)}; for training: the other "
                f"{len(self.training_files)} of {len(self.files)} files"
            )

        content = hashlib.sha256()
        self.states = {file: state_of(file) for file in self.files}
        hashes = hash_files(self.files)
        for file in self.files:
            content.update(f"{kind_of(file)} {file in held_out} {hashes[file]}\n".encode())
        self.key = [self.SPLIT_RULE, content.hexdigest()]

    def chunks(self, split: str):
        # The held-out text is spread over twenty times as much. A smaller chunk of it is found sooner.
        size = CHUNK_CHARACTERS if split == "train" else CHUNK_CHARACTERS // 4
        return grouped(self._texts(split), size)

    def _texts(self, split: str):
        """The documents of one split, or parts of them, blank ones left out."""
        want_held_out = split == "val"
        if self.held_out_files:
            files = self.held_out_files if want_held_out else self.training_files
            pieces = in_pieces(self._documents(files), LARGEST_CYCLE)
        else:
            cycle = cycle_for(self._documents(self.files))
            pieces = split_by_size(self._documents(self.files), cycle)
        for text, held_out in pieces:
            if text.strip() and (self.held_out_files or held_out == want_held_out):
                yield text

    def _documents(self, files: list[Path]):
        for file in files:
            if state_of(file) != self.states[file]:
                raise UserError(f"{file}: was changed while it was in use; run the command again")
            yield from read_documents(file)


def state_of(file: Path) -> tuple[int, int]:
    """The size of a file and when it was last written."""
    with explaining(file, "read"):
        status = file.stat()
        return status.st_size, status.st_mtime_ns


def refuse_path(path: Path, notes: list[str]):
    """Raise a UserError that says why there is no text at this path."""
    advice = f"--data takes {', '.join(SUFFIXES)}, a folder of them, python or fineweb-edu"
    skipped = f" ({'; '.join(notes)})" if notes else ""
    if path.is_dir():
        reason = f"no text in this folder{skipped}"
    elif path.exists():
        reason = "not a kind of text that can be read"
    elif path.is_symlink():
        reason = "a link to a file that is not there"
    else:
        reason = "no such file or folder"
    raise UserError(f"{path}: {reason}; {advice}")


def hash_files(files: list[Path]) -> dict[Path, str]:
    """The SHA-256 of the content of each file. One GB takes about a second."""
    hashes = {}
    total = sum(file.stat().st_size for file in files)
    with tqdm(
        total=total,
        desc="reading the text",
        unit="B",
        unit_scale=True,
        leave=False,
        delay=1,
        disable=RANK > 0,
    ) as bar:
        for file in files:
            content_hash = hashlib.sha256()
            with explaining(file, "read"), open(file, "rb") as content:
                block = content.read(2**20)
                while block:
                    content_hash.update(block)
                    bar.update(len(block))
                    block = content.read(2**20)
            hashes[file] = content_hash.hexdigest()
    return hashes


# ---- Which files of a folder are text --------------------------------------------------------------------


class FolderSearch:
    """The text files of a folder and of its subfolders, sorted, and what was left out.

    Left out are files of other kinds. Skipped are hidden and unfinished files, and what a program left: runs
    of train.py, models, virtual environments. A file or folder that is reached twice, through links, is
    taken once.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = []
        self.skipped = []  # "name (reason)"
        self.other_kinds = []  # names
        self.seen = set()  # (device, inode) of each file and folder that was reached
        self._search(folder)

    def notes(self) -> list[str]:
        notes = []
        if self.skipped:
            notes.append(f"skipped: {short_list(self.skipped)}")
        if self.other_kinds:
            notes.append(
                f"left out, because only {', '.join(SUFFIXES)} are read: {short_list(self.other_kinds)}"
            )
        return notes

    def _search(self, folder: Path):
        self._is_new(folder.stat())
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            # once for each path, because a folder may have a hundred thousand
            status = path.stat() if path.exists() else None
            is_folder = status is not None and stat.S_ISDIR(status.st_mode)
            if is_folder and path.name.startswith("."):
                continue
            reason = what_left_it(path) if is_folder else self._reason_to_skip(path, status)
            if reason:
                self.skipped.append(f"{path.relative_to(self.folder)} ({reason})")
            elif is_folder and self._is_new(status):
                files_before = len(self.files)
                self._search(path)
                if kind_of(path) and len(self.files) == files_before:
                    self.skipped.append(f"{path.relative_to(self.folder)} (a folder without text)")
            elif not is_folder and kind_of(path) and status.st_size > 0 and self._is_new(status):
                self.files.append(path)
            elif not is_folder and kind_of(path) is None and not path.name.startswith("."):
                self.other_kinds.append(str(path.relative_to(self.folder)))

    def _is_new(self, status) -> bool:
        """Whether a file or folder is reached for the first time."""
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen:
            return False
        self.seen.add(identity)
        return True

    def _reason_to_skip(self, path: Path, status) -> str | None:
        """Why a text file is left out; None for all else. status: None for a link to nothing."""
        if kind_of(path) is None:
            return None
        if path.name.startswith("."):
            return "hidden"
        if ".part" in path.suffixes:
            return "not finished"
        if status is None:
            return "a link to a file that is not there"
        if not stat.S_ISREG(status.st_mode):
            return "not a file"
        if path.name == "log.jsonl" and is_run(path.parent):
            return "the log of a run"
        return None


def is_run(folder: Path) -> bool:
    """Whether train.py made this folder."""
    if (folder / "args.json").exists() and (folder / "log.jsonl").exists():
        return True
    return any(folder.glob(STEP_FOLDER))


def what_left_it(folder: Path) -> str | None:
    """What a folder is, if a program made it and the .txt and .jsonl files in it are no text to train on."""
    if is_run(folder):
        return "a run of train.py"
    if (folder / "config.json").exists() and (folder / "tokenizer.json").exists():
        return "a model"  # with merges.txt
    if (folder / "pyvenv.cfg").exists():
        return "a virtual environment"
    return None


def is_named_held_out(path: Path) -> bool:
    """Whether a path of a data folder has one of the usual names for text that is not trained on."""
    names = r"(^|[^a-z])(val|valid|validation|dev|test|eval|evaluation|held.?out)($|[^a-z])"
    return any(re.search(names, part.lower()) for part in path.parts)


def short_list(items: list) -> str:
    """At most five of the items, and how many more there are."""
    names = [item.name if isinstance(item, Path) else item for item in items[:5]]
    if len(items) > 5:
        names.append(f"{len(items) - 5} more")
    return ", ".join(names)


# ---- The split by size -----------------------------------------------------------------------------------
#
# Along the whole text, a spot of unit_of(cycle) characters in the middle of each `cycle` characters is held
# out. A document no longer than a spot belongs where it begins. A longer one is cut where a spot begins or
# ends. Whatever the documents are, both splits get text, and what is read so far is all that must be known.

LARGEST_CYCLE = 200_000  # characters; its spot has 10,000


def cycle_for(documents) -> int:
    """The length of a cycle, so that a small text has several spots, but none too small for a sequence."""
    characters = 0
    for part, _ in documents:
        characters += len(part)
        if characters >= 10 * LARGEST_CYCLE:
            return LARGEST_CYCLE
    spots = max(1, characters // 40_000)
    return max(1, characters // min(10, spots))


def unit_of(cycle: int) -> int:
    """The length of a spot: a twentieth of the cycle, in a text below 40,000 characters up to an eighth."""
    return max(1, cycle // 20, min(2_000, cycle // 8))


def split_by_size(documents, cycle: int):
    """(text, whether it is held out) for each document, or for each part of a document that is cut."""
    unit = unit_of(cycle)
    spot = (cycle - unit) // 2  # where the spot begins in which we are, or the next one
    position = 0  # characters before `text`
    held_out = False
    filled = 0  # characters held out in this spot
    text = ""  # of the document at hand

    for part, ends in documents:
        text += part
        while len(text) > unit:
            room = unit - filled if held_out else spot - position
            if room > len(text):
                break  # the next part may belong to it, too
            end = place_to_cut(text, room, unit // 4)
            yield text[:end], held_out
            text = text[end:]
            position += end
            filled = 0
            if held_out:
                spot += cycle
            held_out = not held_out

        if ends:
            yield text, held_out
            position += len(text)
            if held_out:
                filled += len(text)
            text = ""
            if held_out and position >= spot + unit:
                held_out = False
                filled = 0
                spot += cycle
            elif position >= spot:
                held_out = True


def in_pieces(documents, longest: int):
    """(text, None) for each document, or for each part of a document longer than `longest` characters."""
    text = ""
    for part, ends in documents:
        text += part
        while len(text) > longest:
            end = place_to_cut(text, longest, longest // 4)
            yield text[:end], None
            text = text[end:]
        if ends:
            yield text, None
            text = ""


def place_to_cut(text: str, end: int, window: int) -> int:
    """Where to cut a text: after a line or else a space in the `window` characters before `end`, or there."""
    first = max(0, end - window)
    for mark in ("\n", " "):
        place = text.rfind(mark, first, end)
        if place >= 0:
            return place + 1
    return end


# ---- FineWeb-Edu -----------------------------------------------------------------------------------------


class FineWebSource:
    """FineWeb-Edu, which the Hub holds as GPT-2 tokens: 99 shards of 100M tokens and one that is held out.

    GPT-2's tokenizer loses nothing, so decoding gives the text itself.
    """

    name = "fineweb-edu"
    key = [FINEWEB, CHUNK_CHARACTERS]
    notes = []

    def chunks(self, split: str):
        gpt2 = load_tokenizer(GPT2)
        names = ["val_000000"]
        if split == "train":
            names = [f"train_{i:06d}" for i in range(1, 100)]
        for name in names:
            tokens = read_shard(locate(FINEWEB, f"finewebedu_{name}.bin", repo_type="dataset"))
            for documents, _ in grouped(shard_documents(tokens, gpt2), CHUNK_CHARACTERS):
                yield documents, False  # the last of its shard, but not of the text


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


BUILT_IN_SOURCES = {"python": PythonSource, "fineweb-edu": FineWebSource}
