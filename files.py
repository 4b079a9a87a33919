"""Reading and writing files: what a person can mend is one line, and nothing that was saved is lost."""

import errno
import json
import os
import sys
import tokenize
import zlib
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from output import make_output_safe

# What a missing, damaged or foreign file can raise while it is read. All else is a bug, with a traceback.
FILE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    SafetensorError,
    zlib.error,
    SyntaxError,  # numpy reads the header of a .npy with Python's own parser
    tokenize.TokenError,
)
# What a disk can raise while a file is written. A value that cannot be written is a bug.
WRITE_ERRORS = (OSError, SafetensorError)


class UserError(Exception):
    """A problem that the person at the keyboard can solve. Its message is one line that says how.

    The programs print the message and exit with code 2.
    """


@contextmanager
def explaining(path, action: str, advice="check the name or get the file again", errors=FILE_ERRORS):
    """Turn what a file raises inside the block into a UserError of one line that names the file.

    action completes "the file cannot be ...", for example "read as a JSON object". errors: the classes of
    what the file can raise there. All else passes: it is a bug.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {advice}") from error
    except errors as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be {action} ({type(error).__name__}: {reason}); {advice}") from error


def read_json(path: Path, advice="check the name or get the file again") -> dict:
    """The JSON object in a file. Raises UserError if it holds anything else. advice: what to do then."""
    with explaining(path, "read as a JSON object", advice):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content


def replace_file(path: Path, write):
    """Call write(temporary path), then rename the temporary file to `path`.

    A reader of `path` finds the old file or the new one, never half a file. Raises UserError if the disk
    is full, read-only or gone.
    """
    part = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    with explaining(path, "written", "make room or name another folder", WRITE_ERRORS):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            with open(part, "r+b") as file:
                os.fsync(file.fileno())  # otherwise a power cut may keep the new name and lose the content
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: Path, content: dict, indent: int | None = 2):
    """Replace a file by this JSON object. Raises ValueError for a number that JSON does not have."""
    text = json.dumps(content, indent=indent, allow_nan=False) + "\n"
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def cache_folder() -> Path:
    """The folder for what can be made again: tokens and the losses of the baselines."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent) / "ouroboros"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory has run out, on the CPU or on an accelerator."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    phrases = (
        "out of memory",
        "can't allocate memory",
        "cannot allocate memory",
        "not enough memory",
        "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, and cuDNN's and cuSOLVER's
        "allocation_failed",
    )
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in message for phrase in phrases)


def exit_on_user_error(main, memory_advice="take a smaller model or text, or a machine with more memory"):
    """Run a program. What its user can solve becomes one line on stderr and exit code 2.

    memory_advice: what to do where the program runs out of memory.
    """
    make_output_safe()
    try:
        main()
    except KeyboardInterrupt:
        print("ended by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if is_out_of_memory(error):
            message = f"out of memory; {memory_advice}: {message or type(error).__name__}"
        elif isinstance(error, RuntimeError):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
