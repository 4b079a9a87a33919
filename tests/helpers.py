"""What the tests share: small random models, the folders that hold them, and small texts."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from patch import Patched
from qwen import Qwen
from test_ouroboros import SMALL, small_model, small_qwen
from test_ouroboros import tokens as tokens

ROOT = Path(__file__).resolve().parents[1]  # the folder of the programs

# ---- Small models ----------------------------------------------------------------------------------------


def small_patched(dtype=torch.float32, randomise=True, **settings) -> Patched:
    """The same with the seams, the opening and the adapters of patch.py."""
    return small_model(dtype, randomise, kind=Patched, **settings)


def relative(a, b) -> float:
    """The size of a - b in relation to that of b."""
    return ((a - b).norm() / b.norm()).item()


def loss_and_gradients(model, ids, targets):
    """The loss, and name -> gradient of all that is trained."""
    model.zero_grad()
    loss = model.loss(ids, targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.trained_parameters().items()}
    return loss.detach(), gradients


# ---- Models as folders of the Hub ------------------------------------------------------------------------


def folder_of(qwen: Qwen, folder: Path, **changes) -> Path:
    """Write config.json and model.safetensors. changes: other values for config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = asdict(qwen.config)
    del config["attention_bias"]  # whether there are biases, the names of the tensors say
    config.update(
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        hidden_act="silu",
        use_sliding_window=False,
        max_position_embeddings=512,
        eos_token_id=list(qwen.config.eos_token_id) or None,
    )
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))

    state = {}
    for name, tensor in qwen.state_dict().items():
        if name != "lm_head.weight":
            name = f"model.{name}"
        state[name] = tensor.contiguous()
    save_file(state, folder / "model.safetensors")
    return folder


def shard(folder: Path) -> Path:
    """Spread model.safetensors over two files and an index, as the Hub does."""
    state = load_file(folder / "model.safetensors")
    files = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    weight_map = {}
    for i, name in enumerate(sorted(state)):
        file = list(files)[i % 2]
        files[file][name] = state[name]
        weight_map[name] = file

    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def make_pretrained(folder: Path) -> Path:
    """A small random model with a tokenizer in folder/model, beside a text of 400 documents.

    Returns the model's folder. The text is text.txt beside it.
    """
    config = replace(SMALL, vocab_size=400, eos_token_id=(0,))
    model = folder_of(small_qwen(config=config), folder / "model")
    TOKENIZER.save(str(model / "tokenizer.json"))
    write_text(folder / "text.txt", 400)
    return model


# ---- Texts -----------------------------------------------------------------------------------------------


def small_tokenizer(vocabulary=400) -> Tokenizer:
    """A byte-level BPE like Qwen2.5's, trained on a text that does not change."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    return tokenizer


TOKENIZER = small_tokenizer()


def write_text(path: Path, documents=60) -> Path:
    """A .txt of so many documents, in which every word names its document."""
    texts = []
    for n in range(documents):
        texts.append(" ".join([f"doc{n}"] * (20 + n % 7)))
    path.write_text("\n<|endoftext|>\n".join(texts))
    return path


def write_shard(path: Path, ids: list[int]) -> Path:
    """A token shard in FineWeb-Edu's format, see data.read_shard."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    return path
