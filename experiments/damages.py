"""The damaged inputs that experiments/trust.py gives to the programs.

A maker writes a damaged input into an empty folder. It returns the command of the program that meets the
input, and a word that the program's line must hold. Beside that folder lie whole things to copy: a run, a
text and a cache of its tokens.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from hub import BUILT_IN

WHOLE_RUN = "whole-run"
WHOLE_CACHE = "whole-cache"
TEXT = "Call me Ishmael. Some years ago - never mind how long precisely - I went to sea.\n" * 400


@dataclass(frozen=True)
class Damage:
    """One damaged input."""

    name: str
    make: Callable[[Path, random.Random], tuple[list, str]]
    seed: int  # of the random numbers that make() gets
    is_of_cache: bool = False  # whether the folder is also the program's cache folder


def write_inputs(folder: Path):
    """Write a copy of the built-in model and a text, both whole."""
    shutil.copytree(BUILT_IN["tiny"], folder / "model")
    (folder / "text.txt").write_text(TEXT)


def train_command(folder: Path, **changes) -> list:
    """A short training on the model and the text in the folder, with other options if they are given."""
    options = {
        "model": folder / "model",
        "data": folder / "text.txt",
        "out": folder / "run",
        "device": "cpu",
        "steps": 1,
        "seq-len": 32,
        "batch-size": 1,
        "eval-sequences": 1,
    }
    options.update(changes)
    command = ["train.py"]
    for name, value in options.items():
        command += [f"--{name}", value]
    return command


# ---- Damages to any file ---------------------------------------------------------------------------------


def truncate(path: Path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip_a_bit(path: Path, rng):
    """Flip a bit in the second half of a file."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) // 2, len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def remove(path: Path, rng):
    path.unlink()


# ---- A run's checkpoints ---------------------------------------------------------------------------------


def damaged_checkpoints(damage, program: str, folder: Path, rng):
    """A run in which every checkpoint is damaged. program: "resume", "eval" or "sample"."""
    run = folder / "run"
    shutil.copytree(folder.parent / WHOLE_RUN, run)
    for path in run.glob("step-*/ouroboros.safetensors"):
        damage(path, rng)
    if program == "sample":
        return ["sample.py", run, "--prompt", "x"], "ouroboros.safetensors"
    return ["train.py", f"--{program}", run], "ouroboros.safetensors"


# ---- The weights of the model ----------------------------------------------------------------------------


def damaged_weights(damage, folder: Path, rng):
    write_inputs(folder)
    damage(folder / "model" / "model.safetensors", rng)
    return train_command(folder), "model"


def break_header(path: Path, rng):
    """Change a byte of the header's length, which a safetensors file begins with."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(8)] ^= 0x55
    path.write_bytes(content)


def crop_a_tensor(path: Path, rng):
    tensors = load_file(path)
    name = a_layer_tensor(tensors, rng)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path)


def drop_a_tensor(path: Path, rng):
    tensors = load_file(path)
    del tensors[a_layer_tensor(tensors, rng)]
    save_file(tensors, path)


def add_a_tensor(path: Path, rng):
    tensors = load_file(path)
    name = a_layer_tensor(tensors, rng)
    tensors[name + "s"] = tensors[name].clone()
    save_file(tensors, path)


def a_layer_tensor(tensors: dict, rng) -> str:
    """The name of a random tensor of a layer."""
    return rng.choice([name for name in sorted(tensors) if name.startswith("model.layers.")])


# ---- The index of the weights ----------------------------------------------------------------------------


def damaged_index(content: str, folder: Path, rng):
    write_inputs(folder)
    (folder / "model" / "model.safetensors.index.json").write_text(content)
    return train_command(folder), "model"


def index_contents() -> list[str]:
    """Wrong weight maps, wrong names in a weight map, and an object that is nested and cut off."""
    contents = []
    for weight_map in ([], "model.safetensors", {}, None):
        contents.append(json.dumps({"weight_map": weight_map}))
    names = [
        "../model/model.safetensors",
        str(BUILT_IN["tiny"] / "model.safetensors"),
        "other.safetensors",
        "model.bin",
        7,
        None,
        "",
        ["model.safetensors"],
        "..",
        "model.safetensors\u0000",
        "sub/model.safetensors",
        {"a": 1},
    ]
    for name in names:
        contents.append(json.dumps({"weight_map": {"model.norm.weight": name}}))
    for depth in (16, 17, 18, 19):
        contents.append('{"weight_map": {"a": ' + "[" * depth)
    return contents


# ---- config.json and tokenizer.json ----------------------------------------------------------------------


def damaged_config(change, word: str, folder: Path, rng):
    """change(config) changes the content of config.json."""
    write_inputs(folder)
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return train_command(folder), word


def truncated_config(folder: Path, rng):
    write_inputs(folder)
    truncate(folder / "model" / "config.json", rng)
    return train_command(folder), "config.json"


def config_makers() -> list:
    keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    makers = []
    for value in (0, -1, "many", None, [], {}, 1e30, 10**18):
        for key in keys:
            makers.append(partial(damaged_config, partial(set_key, key, value), "model"))
    for key in keys[:4]:
        makers.append(partial(damaged_config, partial(delete_key, key), "config.json"))
    makers.append(partial(damaged_config, partial(set_key, "model_type", "mistral"), "config.json"))
    makers += [truncated_config] * 5
    return makers


def set_key(key: str, value, content: dict):
    content[key] = value


def delete_key(key: str, content: dict):
    del content[key]


def damaged_tokenizer(damage, folder: Path, rng):
    write_inputs(folder)
    damage(folder / "model" / "tokenizer.json", rng)
    return train_command(folder), "tokenizer"


def replace_by_another_value(path: Path, rng):
    path.write_text(rng.choice(["{}", "[]", "null", "\u0000", '{"model": 1}']))


def add_a_token_too_many(path: Path, rng):
    content = json.loads(path.read_text())
    content["model"]["vocab"]["unheard"] = 10**6
    path.write_text(json.dumps(content))


def drop_the_end_of_text(path: Path, rng):
    content = json.loads(path.read_text())
    added = content["added_tokens"]
    content["added_tokens"] = [token for token in added if token["content"] != "<|endoftext|>"]
    content["model"]["vocab"].pop("<|endoftext|>", None)
    path.write_text(json.dumps(content))


# ---- Tokens and text -------------------------------------------------------------------------------------

READ_SHARD = """
from pathlib import Path
from files import exit_on_user_error
from sources import read_shard
exit_on_user_error(lambda: read_shard(Path({path!r})))
"""


def damaged_shard(damage, folder: Path, rng):
    """A shard of FineWeb tokens."""
    header = np.zeros(256, "<i4")
    header[0] = 20240520  # the magic number
    header[1] = 1  # the version
    header[2] = 5000  # the number of tokens, two bytes each
    path = folder / "finewebedu_train_000001.bin"
    path.write_bytes(header.tobytes() + bytes(2 * 5000))
    damage(path, rng)
    return ["-c", READ_SHARD.format(path=str(path))], path.name


def change_header(field: int, path: Path, rng):
    """Flip a bit of one number of the header of a shard."""
    content = np.fromfile(path, "<i4")
    content[field] ^= 1 << rng.randrange(31)
    content.tofile(path)


def damaged_tokens(damage, folder: Path, rng):
    """A token file of the cache."""
    shutil.copytree(BUILT_IN["tiny"], folder / "model")
    shutil.copytree(folder.parent / WHOLE_CACHE / "ouroboros", folder / "ouroboros")
    path = rng.choice(sorted((folder / "ouroboros").glob("*/00000.npy")))
    damage(path, rng)
    text = folder.parent / "text.txt"  # of which the tokens are
    return train_command(folder, data=text), path.name


def store_floats(path: Path, rng):
    np.save(path, np.load(path).astype(np.float32))


def store_tokens_beyond_the_vocabulary(path: Path, rng):
    np.save(path, np.full(50_000, 65_535, np.uint16))


def store_a_pickle(path: Path, rng):
    np.save(path, np.array([print], dtype=object), allow_pickle=True)


def damaged_text(file_name: str, content: bytes, folder: Path, rng):
    write_inputs(folder)
    path = folder / file_name
    path.write_bytes(content)
    return train_command(folder, data=path), "text"


def text_makers() -> list:
    noise = random.Random(0).randbytes(50_000)
    files = [
        ("text.txt", b""),
        ("text.txt", b"short"),
        ("text.txt", noise),
        ("text.jsonl", b'{"no text": 1}\n' * 900),
        ("text.jsonl", b'{"text": [1]}\n' * 900),
        ("text.jsonl.gz", noise),
        ("text.txt", TEXT.encode() + b"\xff"),
    ]
    return [partial(damaged_text, file_name, content) for file_name, content in files]


# ---- Arguments -------------------------------------------------------------------------------------------

WRONG_ARGUMENTS = [
    ("depth", 0),
    ("depth", 65),
    ("depth", -3),
    ("depth", "deep"),
    ("rank", 0),
    ("rank", 4097),
    ("rank", 1.5),
    ("steps", 0),
    ("steps", "nan"),
    ("lr", 0),
    ("lr", -1),
    ("lr", "inf"),
    ("seq-len", 0),
    ("batch-size", -1),
    ("accumulation", 0),
    ("device", "tpu"),
    ("dtype", "int8"),
    ("pool", "max"),
    ("modulation", "all"),
    ("prelude", 12),
    ("coda", 12),
    ("recurrent", 0),
    ("target-offset", 3),
    ("seed", -1),
    ("save-every", 0),
    ("model", "no/such/folder"),
    ("data", "nothing.txt"),
    ("out", BUILT_IN["tiny"]),
    ("resume", "nowhere"),
    ("eval", "nowhere"),
    ("unknown", 1),
    ("eval-every", -2),
    ("eval-sequences", 0),
    ("warmup", -1),
]


def wrong_argument(name: str, value, folder: Path, rng):
    write_inputs(folder)
    is_path = name in ("model", "data", "out", "resume", "eval")
    word = str(value) if is_path else name
    return train_command(folder, **{name: value}), word


# ---- All of them -----------------------------------------------------------------------------------------


def all_damages() -> list[Damage]:
    damages = []

    def add(group: str, count: int, makers: list, is_of_cache=False):
        """Add so many damages of a group, the makers in turn."""
        for i in range(count):
            make = makers[i % len(makers)]
            damages.append(Damage(f"{group}-{i}", make, seed=i, is_of_cache=is_of_cache))

    def each(maker, damage_functions) -> list:
        return [partial(maker, damage) for damage in damage_functions]

    checkpoints = []
    for program in ("resume", "eval", "sample"):
        for damage in (truncate, flip_a_bit, remove):
            checkpoints.append(partial(damaged_checkpoints, damage, program))
    add("checkpoint", 25, checkpoints)

    weights = [truncate, break_header, crop_a_tensor, drop_a_tensor, add_a_tensor]
    add("weights", 22, each(damaged_weights, weights))
    add("index", 20, each(damaged_index, index_contents()))
    add("config", 50, config_makers())
    tokenizers = [truncate, replace_by_another_value, remove, add_a_token_too_many, drop_the_end_of_text]
    add("tokenizer", 15, each(damaged_tokenizer, tokenizers))

    headers = [partial(change_header, field) for field in (0, 1, 2)]
    add("shard", 12, each(damaged_shard, [*headers, truncate]))
    tokens = [truncate, store_floats, store_tokens_beyond_the_vocabulary, store_a_pickle]
    add("cached-tokens", 8, each(damaged_tokens, tokens), is_of_cache=True)
    add("text", 14, text_makers())
    add("argument", 34, [partial(wrong_argument, name, value) for name, value in WRONG_ARGUMENTS])
    return damages
