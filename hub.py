"""The files of a pretrained model, from a folder or from the Hub: where they are, whether they fit, and
which model they are.

A model has config.json, tokenizer.json and its weights, in model.safetensors or in several files that
model.safetensors.index.json names. It may have generation_config.json.
"""

import hashlib
import math
import re
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from tokenizers import Tokenizer

from files import UserError, explaining, read_json

BUILT_IN = {"tiny": Path(__file__).resolve().parent / "tiny"}  # models that come with this repository

# What the Hub's client can raise, after tries of its own: the errors of its HTTP library, which are a base
# class of HfHubHTTPError, OSError of sockets and of the disk, RuntimeError of hf_xet, ValueError for a name
# that the Hub does not allow. All else is a bug.
HUB_ERRORS = (*HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError)

LARGEST = 10**6  # no number in the config.json of a Qwen2.5 is larger; a damaged one may be
END_OF_TEXT = "<|endoftext|>"  # the token that data.py puts after each document


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
    elif is_hub_name(name):
        try:
            return download(name, filename, repo_type, required)
        except EntryNotFoundError:
            problem = f"{name}: this Hub repository has no {filename}"
            if repo_type == "model":
                problem += "; name a model that has config.json, tokenizer.json and model.safetensors"
    else:
        raise UserError(
            f"{name}: no such folder; give a folder, a Hub name such as Qwen/Qwen2.5-0.5B, or tiny"
        )

    if required:
        raise UserError(problem)
    return None


def full_name(folder_or_repo) -> str:
    """A name of a model that holds in any current folder: a folder's absolute path, or the name as it is."""
    name = str(folder_or_repo)
    if name not in BUILT_IN and Path(name).is_dir():
        return str(Path(name).resolve())
    return name


def is_hub_name(name: str) -> bool:
    """Whether a name has the form OWNER/REPOSITORY."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def is_cached(repo: str, filename: str, repo_type="model") -> bool:
    """Whether a Hub file was downloaded before."""
    return isinstance(try_to_load_from_cache(repo, filename, repo_type=repo_type), str)


def size_to_fetch(repo: str, filenames: list[str], repo_type="model") -> int | None:
    """The bytes of those Hub files that are not in the cache. None if the Hub does not tell a size."""
    total = 0
    for filename in filenames:
        if is_cached(repo, filename, repo_type):
            continue
        try:
            size = get_hf_file_metadata(hf_hub_url(repo, filename, repo_type=repo_type)).size
        except HUB_ERRORS:  # the download itself will say what is wrong
            return None
        if size is None:
            return None
        total += size
    return total


def download(repo: str, filename: str, repo_type: str, required=True) -> Path | None:
    """The path of a Hub file in the local cache, downloaded if needed.

    None for a file that is not required if the Hub cannot be reached and the model is in the cache: which
    optional files it has is then not known. Raises EntryNotFoundError if the repository lacks the file,
    UserError for every other failure.
    """
    try:
        return Path(hf_hub_download(repo, filename, repo_type=repo_type))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: no folder here and no {repo_type} on the Hub that you may read; check the name, or "
            "log in: hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError, but the network failed
        if not required and is_cached(repo, "config.json"):
            return None
        raise UserError(
            f"{repo}: the Hub cannot be reached and {filename} is not in the cache; try again when online"
        ) from error
    except EntryNotFoundError:
        raise
    except HUB_ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{repo}: {filename} could not be downloaded ({lines[0]}); run the command again"
        ) from error


# ---- config.json -----------------------------------------------------------------------------------------


def read_config(folder_or_repo) -> dict:
    """The numbers that the decoder in qwen.py needs, under the names of config.json, defaults filled in.

    eos_token_id holds all tokens that end a text: those of config.json and of generation_config.json, and
    the end-of-text token of the tokenizer, which stands between the documents of the training text.
    Raises UserError for a model that the decoder cannot run.
    """
    config = read_numbers(folder_or_repo)
    ends = list(config["eos_token_id"])

    path = locate(folder_or_repo, "generation_config.json", required=False)
    if path is not None:
        with explaining(path, "read as a generation_config.json"):
            ends += end_tokens(read_json(path).get("eos_token_id"), config["vocab_size"])
    if locate(folder_or_repo, "tokenizer.json", required=False) is not None:
        end_of_text = load_tokenizer(folder_or_repo).token_to_id(END_OF_TEXT)
        ends += end_tokens(end_of_text, config["vocab_size"])

    config["eos_token_id"] = tuple(dict.fromkeys(ends))  # each once, those of config.json first
    return config


def read_numbers(folder_or_repo) -> dict:
    """The numbers of config.json alone. A number that is absent has the default of transformers."""
    path = locate(folder_or_repo, "config.json")
    raw = read_json(path)
    with explaining(path, "read as the config.json of a Qwen2.5 or Llama model"):
        # transformers 5 keeps rope_theta inside rope_parameters; rope_scaling is the older name
        raw.update(raw.get("rope_scaling") or {})
        raw.update(raw.get("rope_parameters") or {})
        check_not_quantised(path, raw)
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
        if raw["model_type"] == "qwen2":
            raw.setdefault("num_key_value_heads", 32)  # Qwen2Config's default, whatever the number of heads
        else:
            raw.setdefault("eos_token_id", 2)  # LlamaConfig's
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
    """Raise UserError for a config.json that asks for more than the plain decoder of Qwen2.5 and Llama."""
    raw.setdefault("model_type", None)
    supported = {
        "model_type": ("qwen2", "llama"),
        "hidden_act": ("silu",),
        "rope_type": ("default",),
        "type": ("default",),  # the older name of rope_type
        "partial_rotary_factor": (1.0,),
        "full_attention": (),  # rotary positions that differ from layer to layer
        "sliding_attention": (),
        "use_sliding_window": (False, None),
    }
    if raw["model_type"] == "llama":  # in a Qwen2.5, the names of the tensors say which biases there are
        supported["attention_bias"] = (False, None)
        supported["mlp_bias"] = (False, None)

    for key, values in supported.items():
        if key in raw and raw[key] not in values:
            found = {key: raw[key]}
            raise UserError(
                f"{path}: {found}: this program runs the plain decoder of Qwen2.5, and of Llama without "
                "biases and without rope scaling; name another model"
            )


QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTISED_TENSORS = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".weight_scale",
    ".weight_scale_inv",
    ".absmax",
    ".SCB",
)
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")  # the names of safetensors


def check_not_quantised(path: Path, raw: dict):
    """Raise UserError for a config.json of quantised weights (GPTQ, AWQ, bitsandbytes, fp8, MLX)."""
    for key in QUANTISED_KEYS:
        details = raw.get(key)
        if details:
            method = key
            if isinstance(details, dict):
                method = details.get("quant_method", key)
            raise refuse_quantised(path, method)
    stored_type = str(raw.get("dtype") or raw.get("torch_dtype") or "")
    if stored_type.removeprefix("torch.").startswith(("float8", "int", "uint")):
        raise refuse_quantised(path, stored_type)


def refuse_quantised(path: Path, what: str) -> UserError:
    """The error for quantised weights."""
    return UserError(
        f"{path}: quantised weights ({what}), which this program cannot run; name the model from which they "
        "were made, with weights in bfloat16, float16 or float32"
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
    """The paths of the files of the weights, which are downloaded if needed."""
    return [locate(folder_or_repo, name) for name in weight_names(folder_or_repo)]


def weight_names(folder_or_repo) -> list[str]:
    """The files of the weights: model.safetensors, or those that model.safetensors.index.json names."""
    index = locate(folder_or_repo, "model.safetensors.index.json", required=False)
    if index is None:
        return ["model.safetensors"]

    with explaining(index, "read as an index of safetensors files beside it"):
        weight_map = read_json(index)["weight_map"]
        if not isinstance(weight_map, dict):
            raise ValueError("weight_map is no object")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):  # never a path that leads elsewhere
                raise ValueError(f"it names {name!r}")
        for name in weight_map:
            if name.endswith(QUANTISED_TENSORS):
                raise refuse_quantised(index, name)
    return names


def is_weight(name: str, tied: bool) -> bool:
    """Whether the model computes with the tensor of this name. tied: the head is the embedding."""
    if name.endswith("rotary_emb.inv_freq"):  # a constant that older checkpoints store
        return False
    return not (tied and name == "lm_head.weight")


def stored_tensors(folder_or_repo):
    """Yield (name, tensor) for each tensor of the weights, mapped from its file and not read yet.

    Raises UserError for a damaged file and for types in which only quantised weights are stored.
    """
    for path in weight_files(folder_or_repo):
        with explaining(path, "read as a whole safetensors file"):
            file = safe_open(path, framework="pt")
            names = list(file.keys())
        with file:
            for name in names:
                with explaining(path, "read as a whole safetensors file"):
                    stored_type = file.get_slice(name).get_dtype()
                    if stored_type in PLAIN_TYPES:
                        tensor = file.get_tensor(name)
                if stored_type in PLAIN_TYPES:
                    yield name, tensor
                elif not name.endswith("rotary_emb.inv_freq"):
                    raise refuse_quantised(path, f"{name} is {stored_type}")


def read_tensors(folder_or_repo, needed, dtype, device) -> dict:
    """name -> tensor for the weights whose name satisfies needed(name), in the given type, on the device."""
    tensors = {}
    for name, tensor in stored_tensors(folder_or_repo):
        if needed(name):
            tensors[name] = tensor.to(device, dtype, copy=True)  # a copy, since the file may change later
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
        raise UserError(
            f"{source}: its weights do not fit its config.json: {problem}; get both files again, or "
            "undo your changes of qwen.py"
        )


def load_tokenizer(folder_or_repo, vocab_size=None) -> Tokenizer:
    """The tokenizer.json of a folder, a built-in model or a Hub repository.

    Raises UserError if the file is no tokenizer or has tokens beyond the vocab_size of the model.
    """
    path = locate(folder_or_repo, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # the class of all that the tokenizers package raises for a file
            raise
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


# ---- Which model it is -----------------------------------------------------------------------------------

RUNS = 16  # of neighbouring values that are read of each tensor,
RUN = 64  # and the values in each


def fingerprint(folder_or_repo) -> dict:
    """{"config": the numbers of config.json, "weights": a hash of samples of all tensors}.

    It is the same wherever the files lie and however the weights are spread over them. It covers all
    layers, so also those that a cut removes.
    """
    config = read_numbers(folder_or_repo)
    config["eos_token_id"] = list(config["eos_token_id"])  # as JSON gives it back

    samples = {}
    for name, tensor in stored_tensors(folder_or_repo):
        if is_weight(name, config["tie_word_embeddings"]):
            digest = hashlib.sha256(f"{name} {list(tensor.shape)}".encode())
            digest.update(sampled(tensor).numpy())
            samples[name] = digest.hexdigest()
    whole = hashlib.sha256(str(sorted(samples.items())).encode()).hexdigest()
    return {"config": config, "weights": whole[:16]}


def sampled(tensor):
    """About RUNS * RUN values of a tensor, in float32. A mapped file is read only where they lie."""
    values = tensor.flatten()
    if len(values) <= RUNS * RUN:
        return values.float()
    runs = []
    for i in range(RUNS):
        first = i * (len(values) - RUN) // (RUNS - 1)
        runs.append(values[first : first + RUN].float())
    return torch.cat(runs)


def check_same_model(folder_or_repo, expected: dict, needed_by):
    """Raise UserError if the fingerprint of a model is not the expected one, with what differs.

    needed_by: the run that was made from the expected model.
    """
    found = fingerprint(folder_or_repo)
    differences = []
    for key, value in expected["config"].items():
        if found["config"].get(key) != value:
            differences.append(f"{key} in config.json is {found['config'].get(key)}, and was {value}")
    if found["weights"] != expected["weights"]:
        differences.append("the weights differ")
    if len(differences) > 3:
        differences[3:] = [f"{len(differences) - 3} more differences"]
    if differences:
        raise UserError(
            f"{folder_or_repo} is not the model on which {needed_by} was trained: {'; '.join(differences)}; "
            "name the right one with --model FOLDER or --model HUB_NAME (in Python: base=...)"
        )
