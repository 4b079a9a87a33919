"""The files of a pretrained model, in a folder or on the Hub: config.json, the weights and tokenizer.json.

What the decoder in qwen.py cannot run is refused here, before the weights are fetched where config.json tells
it.
"""

import math
from pathlib import Path

from tokenizers import Tokenizer

from support.files import UserError, model_folder, one_line, read_json, read_tensors, reading

JSON_FILES = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"]
END_OF_TEXT = "<|endoftext|>"  # the token between the documents of a training text

# ---- config.json -----------------------------------------------------------------------------------------


def read_config_numbers(folder_or_repo) -> dict:
    """The numbers that the decoder needs, under the names of config.json, with the defaults of transformers.

    eos_token_id holds all tokens that end a text: those of config.json and of generation_config.json, and the
    end-of-text token of the tokenizer. Raises UserError for a model that the decoder cannot run.
    """
    folder = model_folder(folder_or_repo, JSON_FILES)
    path = folder / "config.json"
    raw = read_json(path)
    with reading(path, "the config.json of a Qwen2.5 or Llama model"):
        # transformers 5 keeps rope_theta inside rope_parameters; rope_scaling is the older name
        raw.update(raw.get("rope_scaling") or {})
        raw.update(raw.get("rope_parameters") or {})
        check_architecture(path, raw)
        heads = whole_number(raw, "num_attention_heads")
        if raw["model_type"] == "qwen2":
            raw.setdefault("num_key_value_heads", 32)  # Qwen2Config's default, whatever the number of heads
        numbers = dict(
            vocab_size=whole_number(raw, "vocab_size"),
            hidden_size=whole_number(raw, "hidden_size"),
            intermediate_size=whole_number(raw, "intermediate_size"),
            num_hidden_layers=whole_number(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=whole_number(raw, "num_key_value_heads", heads),
            head_dim=whole_number(raw, "head_dim", raw["hidden_size"] // heads),
            rms_norm_eps=positive_number(raw, "rms_norm_eps", 1e-6),
            rope_theta=positive_number(raw, "rope_theta", 10000.0),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        )
        if numbers["head_dim"] % 2 or heads % numbers["num_key_value_heads"]:
            raise ValueError(f"sizes that do not fit together: {numbers}")
        ends = token_list(raw.get("eos_token_id"))

    path = folder / "generation_config.json"
    if path.exists():
        with reading(path, "a generation_config.json"):
            ends += token_list(read_json(path).get("eos_token_id"))
    if (folder / "tokenizer.json").exists():
        ends += token_list(load_tokenizer(folder).token_to_id(END_OF_TEXT))
    known = [token for token in ends if 0 <= token < numbers["vocab_size"]]
    numbers["eos_token_id"] = tuple(dict.fromkeys(known))  # each once, those of config.json first
    return numbers


def check_architecture(path: Path, raw: dict):
    """Raise UserError for a config.json that asks for more than the plain decoder of Qwen2.5 and Llama."""
    supported = {
        "model_type": ("qwen2", "llama"),
        "hidden_act": ("silu",),
        "rope_type": ("default",),
        "type": ("default",),  # the older name of rope_type
        "partial_rotary_factor": (1.0,),
        "full_attention": (),  # rotary positions that differ from layer to layer
        "sliding_attention": (),
        "use_sliding_window": (False, None),
        "tie_word_embeddings": (True, False, None),
        "quantization_config": ({}, None),
        "compression_config": ({}, None),
        "quantization": ({}, None),
    }
    raw.setdefault("model_type", None)
    if raw["model_type"] == "llama":  # in a Qwen2.5, the names of the tensors say which biases there are
        supported["attention_bias"] = (False, None)
        supported["mlp_bias"] = (False, None)
    for key, values in supported.items():
        if key in raw and raw[key] not in values:
            raise UserError(
                f"{path}: {key} is {raw[key]}: this program runs the plain decoder of Qwen2.5, and of Llama "
                "without biases, rope scaling or quantised weights; name another model"
            )


def whole_number(raw: dict, key: str, default=None) -> int:
    """raw[key], or the default where it is absent or null. Raises ValueError unless it is from 1 to 10**6."""
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**6:
        raise ValueError(f"{key} is {value!r}")
    return value


def positive_number(raw: dict, key: str, default: float) -> float:
    """raw[key], a number above zero, as a float; the default where the key is absent."""
    value = raw.get(key, default)
    if not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise ValueError(f"{key} is {value!r}")
    return float(value)


def token_list(value) -> list[int]:
    """eos_token_id, which may be a number, a list of numbers or null, as a list."""
    if value is None:
        return []
    tokens = value if isinstance(value, list) else [value]
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"eos_token_id is {value!r}")
    return tokens


# ---- Weights and tokenizer -------------------------------------------------------------------------------


def weight_files(folder_or_repo) -> list[Path]:
    """model.safetensors, or else the files that model.safetensors.index.json names. They are fetched once."""
    folder = model_folder(folder_or_repo, [*JSON_FILES, "model*.safetensors"])
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]
    with reading(index, "an index of safetensors files beside it"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        return [folder / name for name in names]


def read_weights(folder_or_repo):
    """Yield (name, tensor) for each weight. The tensors are mapped: each is read when it is first used.

    Raises UserError for a damaged file and for quantised weights.
    """
    for path in weight_files(folder_or_repo):
        for name, tensor in read_tensors(path).items():
            if name.endswith("rotary_emb.inv_freq"):  # a constant that older checkpoints store
                continue
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise UserError(
                    f"{path}: {name} is {tensor.dtype}: quantised weights cannot be run; name the model from "
                    "which they were made"
                )
            yield name, tensor


def load_tokenizer(folder_or_repo) -> Tokenizer:
    """The tokenizer.json of a folder, a built-in model or a Hub repository.

    Raises UserError if it is no tokenizer, or if it has tokens that the model does not know.
    """
    folder = model_folder(folder_or_repo, JSON_FILES)
    path = folder / "tokenizer.json"
    with reading(path, "a tokenizer"):
        content = path.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:
        if type(error) is not Exception:  # the class of all that the tokenizers package raises for a file
            raise
        raise UserError(f"{path}: is not a tokenizer ({one_line(error)}); get the file again") from error
    tokenizer.no_truncation()  # some checkpoints store a truncation or a padding
    tokenizer.no_padding()

    largest = max(tokenizer.get_vocab().values(), default=0)
    config = folder / "config.json"
    if config.exists() and largest >= read_json(config).get("vocab_size", math.inf):
        raise UserError(
            f"{path}: has token {largest}, which the vocabulary of config.json has not; get both files again"
        )
    return tokenizer
