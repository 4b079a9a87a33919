"""The documents of a text file, in parts, so that a file or a document of any size fits into memory.

Every generator here yields pairs (part, ends): a part of a document, shorter than twice PART, and
whether the document ends with it.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from contextlib import contextmanager
from pathlib import Path

from files import explaining

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
SEPARATOR = "<|endoftext|>"  # a line of its own between two documents of a .txt
PART = 500_000  # characters
BYTE_ORDER_MARK = "\ufeff"
TEXT_ERRORS = (OSError, EOFError, ValueError, zlib.error)  # what a damaged text can raise while it is read


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, or None if it is no text.

    A link counts by its own name, and otherwise by the name of the file that it leads to.
    """
    kind = suffix_of(path.name)
    if kind is None and path.is_symlink():
        kind = suffix_of(os.path.basename(os.path.realpath(path)))
    return kind


def suffix_of(name: str) -> str | None:
    """Which of SUFFIXES the name of a file has; None if it has none of them."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return suffix
    return None


def read_documents(path: Path):
    """All documents of a file. Raises UserError if the file is not what its name says."""
    kind = kind_of(path)
    open_file = gzip.open if kind.endswith(".gz") else open
    with explaining_text(path, open_file), open_file(path, "rt", encoding="utf-8-sig") as file:
        if kind.startswith(".jsonl"):
            yield from jsonl_documents(file)
        else:
            yield from txt_documents(file)


@contextmanager
def explaining_text(path: Path, open_file):
    """Turn what reading a text raises into a UserError of one line that says where the text is wrong."""
    action = 'read as text: a .txt is UTF-8, a line of a .jsonl is {"text": "..."}'
    with explaining(path, action, "mend the file, or leave it out of --data", TEXT_ERRORS):
        try:
            yield
        except UnicodeDecodeError as error:
            with open_file(path, "rb") as file:
                raise ValueError(what_is_not_utf8(file)) from error


def what_is_not_utf8(file) -> str:
    """Where the bytes of a file stop being UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    block = file.read(PART)
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is UTF-16; save it as UTF-8"
    while block:
        try:
            decoder.decode(block)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            return f"line {line} is not UTF-8"
        line += block.count(b"\n")
        block = file.read(PART)
    return "it ends within a UTF-8 character"


# ---- .txt ------------------------------------------------------------------------------------------------


def txt_documents(file):
    """The documents of a .txt: what lies between lines of SEPARATOR, or the whole file."""
    lines = []
    characters = 0
    line_begins = True
    line = file.readline(PART)
    while line:
        if line_begins:
            line = line.removeprefix(BYTE_ORDER_MARK)  # where files were joined, each with a mark of its own
        if line_begins and line.startswith(SEPARATOR) and line.rstrip() == SEPARATOR:
            yield "".join(lines), True
            lines = []
            characters = 0
        else:
            lines.append(line)
            characters += len(line)
        if characters >= PART:
            yield "".join(lines), False
            lines = []
            characters = 0
        line_begins = line.endswith("\n")
        line = file.readline(PART)
    yield "".join(lines), True


# ---- .jsonl ----------------------------------------------------------------------------------------------


def jsonl_documents(file):
    """The "text" of each line of a .jsonl. Raises ValueError with the number of a line that has none."""
    number = 1
    line = file.readline(PART)
    while line:
        try:
            if len(line) < PART or line.endswith("\n"):
                yield text_of_line(line), True
            else:
                yield from LongLine(line, file).text()
                yield "", True
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        number += 1
        line = file.readline(PART)


def text_of_line(line: str) -> str:
    """The "text" of one line; "" for a blank line."""
    line = line.strip().strip(BYTE_ORDER_MARK)
    if not line:
        return ""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, where an object with a text belongs")
    if "text" not in row:
        keys = ", ".join(row) or "nothing"
        raise ValueError(f'it has no "text", but {keys[:100]}')
    if not isinstance(row["text"], str):
        raise ValueError(f'"text" is {row["text"]!r}'[:100])
    return row["text"].strip()


class LongLine:
    """A JSON object on a line that is read part by part, because it may not fit into memory."""

    # The inside of a JSON string, as far as it goes without cutting an escape. A character beyond U+FFFF is
    # a pair of escapes: \ud83d\ude00 must stay together.
    STRING = re.compile(
        r'(?:[^"\\]+|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}'
        r"|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[0-9a-fA-F]{4}|(?=[^\\]|\\[^u])))*"
    )
    PLAIN = re.compile(r'[^"\[\]{}]*')  # between the strings and brackets of a value that is passed over
    SCALAR = re.compile(r"[^,}\s]*")

    def __init__(self, beginning: str, file):
        self.file = file
        self.buffer = beginning
        self.place = 0  # what lies before it in the buffer is done with
        self.is_whole = False  # whether the buffer goes to the end of the line

    def text(self):
        """The value of "text" in parts, each (part, False).

        Raises ValueError if the line is no JSON object with a text.
        """
        found = False
        self._take("{")
        while True:
            key = "".join(self._string())
            self._take(":")
            if key == "text":
                found = True
                for part in self._string():
                    yield part, False
            else:
                self._pass_over_value()
            if self._take(",}") == "}":
                break

        if not found:
            raise ValueError('it has no "text"')
        self._finish_line()

    def _finish_line(self):
        rest = self.buffer[self.place :]
        while not rest.strip() and not self.is_whole:
            rest = self.file.readline(PART)
            self.is_whole = rest == "" or rest.endswith("\n")
        if rest.strip():
            raise ValueError("more follows after its JSON object")

    def _read_more(self):
        part = "" if self.is_whole else self.file.readline(PART)
        if not part:
            raise ValueError("it ends within its JSON object")
        self.is_whole = part.endswith("\n")
        self.buffer = self.buffer[self.place :] + part
        self.place = 0

    def _match(self, pattern) -> str:
        """What the pattern matches at the place, as far as the buffer goes. The place moves past it."""
        match = pattern.match(self.buffer, self.place)
        self.place = match.end()
        return match.group()

    def _take(self, characters: str) -> str:
        """The next character that is no space, which has to be one of these. The place moves past it."""
        character = self._next()
        if character not in characters:
            raise ValueError(f"{character!r} where one of {characters} belongs")
        self.place += 1
        return character

    def _next(self) -> str:
        """The next character that is no space. The place moves to it."""
        while True:
            while self.place < len(self.buffer):
                character = self.buffer[self.place]
                if not character.isspace() and character != BYTE_ORDER_MARK:
                    return character
                self.place += 1
            self._read_more()

    def _string(self):
        """The parts of a JSON string."""
        self._take('"')
        while True:
            inside = self._match(self.STRING)
            if inside:
                yield json.loads(f'"{inside}"')
            if self.buffer.startswith('"', self.place):
                self.place += 1
                return
            if len(self.buffer) - self.place > 12:  # longer than the longest escape
                raise ValueError("a string has an escape that JSON does not know")
            self._read_more()

    def _pass_over_value(self):
        depth = 0  # of the brackets around the place
        while True:
            character = self._next()
            if character == '"':
                for _ in self._string():
                    pass
            elif character in "[{":
                self.place += 1
                depth += 1
            elif character in "]}" and depth:
                self.place += 1
                depth -= 1
            elif depth:
                self._match(self.PLAIN)
            else:
                self._match(self.SCALAR)
                while self.place == len(self.buffer):  # it may go on
                    self._read_more()
                    self._match(self.SCALAR)
            if depth == 0:
                return
