"""Reading, writing and fetching files: what a person can mend is one line, and nothing that was saved is
lost.

Every reader names the file that is absent, damaged or of another kind. Every writer writes a temporary file
and renames it. No pickle is loaded.
"""

import hashlib
import json
import os
import re
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

BUILT_IN_MODELS = {"tiny": Path(__file__).resolve().parents[1] / "tiny"}
CHECKPOINT = "ouroboros.safetensors"
HTTP_ERRORS = HfHubHTTPError.__bases__  # those of the library that the Hub's client takes for HTTP
FORMAT = 4  # of a checkpoint; format 3 is that of commit 4bfd857


class UserError(Exception):
    """A problem that the person at the keyboard can solve. Its message is one line that says how.

    The programs print the message and exit with code 2.
    """


# ---- Numbers and choices ---------------------------------------------------------------------------------


def check_number(name: str, value, low, high):
    """Raise UserError unless low <= value <= high. Where low is an int, value must be one too."""
    kind = "a whole number" if isinstance(low, int) else "a number"
    fits = isinstance(value, int) or (isinstance(low, float) and isinstance(value, float))
    if isinstance(value, bool) or not fits or not low <= value <= high:
        raise UserError(f"{name} {value!r}: give {kind} from {low:,} to {high:,}")


def check_choice(name: str, value, choices):
    """Raise UserError unless the value is one of the choices."""
    if value not in choices:
        raise UserError(f"{name} {value!r}: give one of {', '.join(map(str, choices))}")


# ---- Reading ---------------------------------------------------------------------------------------------

# What a missing, damaged or foreign file can raise while it is read. All else is a bug, with a traceback.
FILE_ERRORS = (OSError, EOFError, ValueError, KeyError, TypeError, SafetensorError, zlib.error)


@contextmanager
def reading(path, what: str):
    """Turn what a file raises inside the block into a UserError of one line that names the file.

    what: what the file should be, for example "a JSON object".
    """
    try:
        yield
    except FileNotFoundError as error:
        advice = "check the name, or bring the file back"
        if Path(HF_HUB_CACHE) in Path(path).parents:
            advice = "the repository lacks it, or it was not fetched while there was a network"
        raise UserError(f"{path}: no such file; {advice}") from error
    except FILE_ERRORS as error:
        reason = one_line(error)
        raise UserError(f"{path}: is not {what} ({reason}); mend the file, or get it again") from error


def one_line(error: Exception) -> str:
    """The message of an error on one line, with the name of its class."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError if it holds anything else."""
    with reading(path, "a JSON object"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """name -> tensor for a safetensors file. The tensors are mapped: each is read when it is first used."""
    with reading(path, "a whole safetensors file"), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# ---- Writing ---------------------------------------------------------------------------------------------


@contextmanager
def writing(path):
    """Turn what a disk raises inside the block into a UserError of one line that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); make room or change the place") from error


def replace_file(path: Path, write):
    """Call write(temporary path), then rename the temporary file to `path`.

    A reader of `path` finds the old file or the new one, never half a file.
    """
    part = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            with open(part, "r+b") as file:
                os.fsync(file.fileno())  # otherwise a power cut may keep the new name and lose the content
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str):
    """Replace a file by this text."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, content):
    """Replace a file by this content as JSON. Raises ValueError for a number that JSON does not have."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


# ---- Checkpoints: tensors and a JSON object in one safetensors file, with a checksum ---------------------


def checksum(tensors: dict, about: str) -> str:
    """The SHA-256 of names, types, shapes and values of the tensors, and of `about`, in hexadecimal."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_checkpoint(folder, tensors: dict, about: dict):
    """Write tensors and a JSON object to folder/ouroboros.safetensors, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **about})
    metadata = {"about": text, "sha256": checksum(tensors, text)}
    replace_file(Path(folder) / CHECKPOINT, lambda part: save_file(tensors, part, metadata))


def read_checkpoint(folder) -> tuple[dict, dict]:
    """The (tensors, about) that write_checkpoint stored in a folder, or in a Hub repository.

    Raises UserError for a file that is absent, damaged or of another version of this program.
    """
    path = model_folder(folder, [CHECKPOINT]) / CHECKPOINT
    with reading(path, "a whole checkpoint"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            about = metadata["about"]
            # clone: get_tensor maps the file, which may be replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if checksum(tensors, about) != metadata["sha256"]:
            raise ValueError("its checksum does not fit")
        about = json.loads(about)
    if about.get("format") != FORMAT:
        raise UserError(f"{path}: is of another version of this program; commit 4bfd857 reads format 3")
    return tensors, about


# ---- Where a model is: a folder, a built-in model, or a Hub repository -----------------------------------


def is_hub_name(name: str) -> bool:
    """Whether a name can only mean OWNER/REPOSITORY: runs/NAME and what lies in a folder here cannot."""
    has_form = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
    owner = name.partition("/")[0]
    return has_form and owner != "runs" and not Path(owner).exists()


def model_folder(folder_or_repo, patterns: list[str]) -> Path:
    """The folder of a model or run. Of a Hub repository, the files that fit the patterns are fetched once.

    Raises UserError for a name that is neither a folder nor a Hub repository, or if the Hub fails.
    """
    name = str(folder_or_repo)
    folder = BUILT_IN_MODELS.get(name, Path(name))
    if folder.is_dir():
        return folder
    if not is_hub_name(name):
        raise UserError(f"{name}: no such folder; give a folder, or a Hub name such as Qwen/Qwen2.5-0.5B")
    return fetch(name, patterns)


def fetch(repo: str, patterns: list[str], repo_type="model") -> Path:
    """The folder of the Hub's cache with the files of a repository that fit the patterns, fetched if needed.

    A dropped connection is tried again by the Hub's client. What is in the cache works without a network.
    """
    try:
        return Path(snapshot_download(repo, repo_type=repo_type, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: no folder here, and no {repo_type} on the Hub that you may read; check the name, or "
            "log in: hf auth login"
        ) from error
    # The network, sockets and the disk, hf_xet, a name that the Hub does not allow.
    except (*HTTP_ERRORS, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{repo}: could not be fetched from the Hub ({one_line(error)}); check the network, and that "
            f"{HF_HUB_CACHE} can be written (or set HF_HOME), and try again"
        ) from error


def full_name(folder_or_repo) -> str:
    """A name that holds in any current folder: the absolute path of what is here, or the name as it is."""
    name = str(folder_or_repo)
    if name not in BUILT_IN_MODELS and os.path.exists(name):
        return os.path.abspath(name)  # a link keeps its own name, whose suffix may say what it is
    return name


# ---- The programs ----------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on the CPU or on an accelerator."""
    words = "out of memory|(can't|cannot) allocate memory|not enough memory|alloc(ation)?_failed"
    is_the_kind = isinstance(error, (RuntimeError, OSError))
    says_so = re.search(words, str(error).lower()) is not None
    return isinstance(error, MemoryError) or (is_the_kind and says_so)


def run_program(main):
    """Run main() and exit with the code that it returns.

    What its user can mend becomes one line on stderr and exit code 2. A bug keeps its traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller of the program has closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # what is no UTF-8, or cannot be shown, becomes "?"
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        sys.exit(report_error(error))
    except BrokenPipeError:  # the reader of the output has gone away, as with | head
        silence(sys.stdout)
        sys.exit(128 + 13)
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            advice = "give a smaller --batch-size, --seq-len, --depth or --model, or shorter prompts"
            sys.exit(report_error(f"out of memory; {advice} ({one_line(error)})"))
        if isinstance(error, OSError):  # of the machine: a full disk, a folder that cannot be read
            sys.exit(report_error(error))
        raise


def silence(stream):
    """Let a stream without a reader lead to nowhere. Python flushes it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report_error(message) -> int:
    """Print an error as one line on stderr. Returns the exit code."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2
