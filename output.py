"""What the programs print is never the reason for which a run fails.

A character that the terminal cannot show is replaced. A reader that goes away, such as `| head` or a closed
terminal, is noted, and train.py then stops as if it had been told to.
"""

import os
import sys


class SafeStream:
    """A text stream that replaces what cannot be encoded and goes on without its reader.

    Each line is written at once, also into a file or a pipe.
    """

    def __init__(self, stream):
        self.stream = stream
        self.reader_is_gone = False
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, function, *arguments):
        if self.reader_is_gone:
            return
        try:
            function(*arguments)
        except OSError:  # a broken pipe, a terminal that is gone, a full disk behind a redirection
            self.reader_is_gone = True
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())  # the interpreter flushes it once more when it ends
            os.close(nothing)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def make_output_safe():
    """Let standard output and standard error be SafeStreams. A closed one leads to nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115 (open as long as the program runs)
        if not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))


def reader_is_gone(*streams) -> bool:
    """Whether nobody reads one of these streams any more, by default standard output and standard error."""
    return any(getattr(stream, "reader_is_gone", False) for stream in streams or (sys.stdout, sys.stderr))
