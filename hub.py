"""The files of a pretrained model, from a folder or from the Hub: where they are, and whether they fit.

A model has config.json, tokenizer.json and its weights, in model.safetensors or in several files that
model.safetensors.index.json names.
"""

import math
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from tokenizers import Tokenizer

from files import UserError, explaining, read_json

BUILT_IN = {"tiny": Path(__file__).resolve().parent / "tiny"}  # models that come with this repository

LARGEST = 10**6  # no number in the config.json of a Qwen2.5 is larger; a damaged one may be


# ---- Where a file is -------------------------------------------------------------------------------------


def locate(folder_or_repo, filename: str, repo_type="model", required=True) -> Path | None:
    """The path of a file of a folder, of a built-in model or of a Hub repository, which is downloaded once.

    Returns None for a file that is absent and not required. Raises UserError if a required file is absent
    or the Hub cannot be read.
    """
    name = str(folder_or_repo)
    folder = BUILT_IN.get(name, Path(name))

    if folder.is_dir():
        if (folder / filename).is_file():
            return folder / filename
        problem = (
            f"{folder / filename}: no such file; a model has config.json, tokenizer.json, model.safetensors"
        )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            return download(name, filename, repo_type)
        except EntryNotFoundError:
            problem = f"{name}: this Hub repository has no {filename}"
    else:
        raise UserError(
            f"{name}: no such folder; give a folder, a Hub name such as Qwen/Qwen2.5-0.5B, or tiny"
        )

    if required:
        raise UserError(problem)
    return None


def full_name(folder_or_repo) -> str:
    """The name of a model that holds in any current folder:

    a folder's absolute path, or the name as it is.
    """
    name = str(folder_or_repo)
    if name not in BUILT_IN and Path(name).is_dir():
        return str(Path(name).resolve())
    return name


def download(repo: str, filename: str, repo_type: str) -> Path:
    """The path of a Hub file in the local cache, downloaded if needed.

    Raises EntryNotFoundError if the repository lacks the file, UserError for every other failure.
    """
    try:
        return Path(hf_hub_download(repo, filename, repo_type=repo_type))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: no folder here and no {repo_type} on the Hub that you may read; check the name, log in"
        ) from error
    except (
        LocalEntryNotFoundError
    ) as error:  # the network failed; a subclass of EntryNotFoundError all the same
        raise UserError(
            f"{repo}: the Hub cannot be reached and {filename} is not in the cache; try again when online"
        ) from error
    except EntryNotFoundError:
        raise
    except (
        Exception
    ) as error:  # the client raises the errors of several HTTP libraries, after retries of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{repo}: {filename} could not be downloaded ({lines[0]}); run the command again"
        ) from error


# ---- config.json -----------------------------------------------------------------------------------------


def read_config(folder_or_repo) -> dict:
    """The numbers that the decoder in qwen.py needs, under the names of config.json, defaults filled in.

    Raises UserError for a model that the decoder cannot run: another architecture, scaled rotary positions,
    sliding windows, sizes that do not fit together.
    """
    path = locate(folder_or_repo, "config.json")
    raw = read_json(path)
    with explaining(path, "read as the config.json of a Qwen2.5 model"):
        # transformers 5 keeps rope_theta inside rope_parameters; rope_scaling is the older name
        raw.update(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        check_architecture(path, raw)

        config = {
            "vocab_size": whole_number(raw, "vocab_size"),
            "hidden_size": whole_number(raw, "hidden_size"),
            "intermediate_size": whole_number(raw, "intermediate_size"),
            "num_hidden_layers": whole_number(raw, "num_hidden_layers"),
            "num_attention_heads": whole_number(raw, "num_attention_heads"),
            "rms_norm_eps": positive_number(raw, "rms_norm_eps", 1e-6),
            "rope_theta": positive_number(raw, "rope_theta", 10000.0),
            "tie_word_embeddings": raw.get("tie_word_embeddings") is True,
        }
        heads = config["num_attention_heads"]
        config["num_key_value_heads"] = whole_number(raw, "num_key_value_heads", heads)
        config["head_dim"] = whole_number(raw, "head_dim", config["hidden_size"] // heads)
        config["eos_token_id"] = end_tokens(raw.get("eos_token_id"), config["vocab_size"])

        if config["num_hidden_layers"] > 1000:
            raise ValueError(f"num_hidden_layers is {config['num_hidden_layers']}")
        if config["head_dim"] % 2 or heads % config["num_key_value_heads"]:
            raise ValueError(f"sizes that do not fit together: {config}")
    return config


def check_architecture(path: Path, raw: dict):
    """Raise UserError for a config.json that asks for more than the plain Qwen2.5 decoder."""
    supported = {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "rope_type": "default",
        "type": "default",  # the older name of rope_type
        "use_sliding_window": False,
    }
    raw.setdefault("model_type", None)
    for key, value in supported.items():
        if raw.get(key, value) != value:
            found = {key: raw[key]}
            raise UserError(
                f"{path}: {found}: this program runs the plain Qwen2.5 decoder; name another model"
            )


def whole_number(raw: dict, key: str, default=None) -> int:
    """raw[key] as an int from 1 to LARGEST; the default where the key is absent or null."""
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{key} is missing")
    number = int(value)
    if not 1 <= number <= LARGEST:
        raise ValueError(f"{key} is {value}")
    return number


def positive_number(raw: dict, key: str, default: float) -> float:
    """raw[key] as a finite float above zero; the default where the key is absent."""
    number = float(raw.get(key, default))
    if not 0 < number < math.inf:
        raise ValueError(f"{key} is {number}")
    return number


def end_tokens(value, vocab_size: int) -> tuple[int, ...]:
    """eos_token_id, which may be a number, a list or null, as a tuple of tokens of the vocabulary."""
    if value is None:
        return ()
    if isinstance(value, int):
        value = [value]
    return tuple(int(token) for token in value if 0 <= int(token) < vocab_size)


# ---- Weights and tokenizer -------------------------------------------------------------------------------


def weight_files(folder_or_repo) -> list[Path]:
    """The files of the weights: model.safetensors, or those that model.safetensors.index.json names."""
    index = locate(folder_or_repo, "model.safetensors.index.json", required=False)
    if index is None:
        return [locate(folder_or_repo, "model.safetensors")]

    with explaining(index, "read as an index of safetensors files beside it"):
        weight_map = read_json(index)["weight_map"]
        if not isinstance(weight_map, dict):
            raise ValueError("weight_map is no object")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):  # never a path that leads elsewhere
                raise ValueError(f"it names {name!r}")
    return [locate(folder_or_repo, name) for name in names]


def read_tensors(folder_or_repo, needed, dtype, device) -> dict:
    """name -> tensor for the weights whose name satisfies needed(name), in the given type, on the device."""
    tensors = {}
    for path in weight_files(folder_or_repo):
        with (
            explaining(path, "read as a whole safetensors file"),
            safe_open(path, framework="pt") as file,
        ):
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                if needed(name):
                    # copy: get_tensor maps the file into memory, and the file may change later
                    tensors[name] = file.get_tensor(name).to(device, dtype, copy=True)
    return tensors


def check_fit(source, expected: dict, tensors: dict):
    """Raise UserError unless `tensors` has the names and shapes of `expected`; both map name -> tensor."""
    problem = None
    for name, tensor in expected.items():
        if name not in tensors:
            problem = f"{name} is missing"
        elif tensors[name].shape != tensor.shape:
            problem = f"{name} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}"
    for name in tensors:
        if name not in expected:
            problem = f"{name} is not a part of the model"
    if problem:
        raise UserError(f"{source}: its weights do not fit its config.json: {problem}; get both files again")


def load_tokenizer(folder_or_repo, vocab_size=None) -> Tokenizer:
    """The tokenizer.json of a folder, a built-in model or a Hub repository.

    Raises UserError if the file is no tokenizer or has tokens beyond the vocab_size of the model.
    """
    path = locate(folder_or_repo, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises no narrower class
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be read as a tokenizer ({reason}); get the file again") from error

    tokenizer.no_truncation()  # some checkpoints store a truncation or a padding
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab().values(), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"{path}: the tokenizer has token {largest}, but the model knows {vocab_size} tokens; "
            "get the tokenizer.json of this very model"
        )
    return tokenizer
