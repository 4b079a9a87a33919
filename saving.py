"""Saving and loading of looped models: their own weights, and which pretrained model they belong to.

A saved model holds the trained weights and the SVD bases. The pretrained weights are not copied: the file
has their name and a fingerprint, a hash of samples of them, and loading checks it.
"""

import torch

from checkpoint import fingerprint, read_checkpoint, write_checkpoint
from files import UserError
from qwen import Qwen


def save_model(model, folder, more_tensors: dict | None = None, **about):
    """Write the model to folder/ouroboros.safetensors, with more tensors and more about it (JSON values).

    The file is written whole or not at all.
    """
    tensors = {**model.saved_tensors(), **(more_tensors or {})}
    about["model"] = {
        "class": type(model).__name__,
        "base": model.source,
        "fingerprint": fingerprint(model.pretrained_tensors()),
        "num_layers": model.config.num_hidden_layers,
        "settings": model.settings,
    }
    write_checkpoint(folder, tensors, about)


def load_model(cls, folder, base=None, dtype=torch.float32, device="cpu", checkpoint=None):
    """The model of class cls that save_model wrote. Only the kept layers of the pretrained model are read.

    base: where the pretrained model is now, if it was moved. checkpoint: what read_checkpoint(folder)
    returned, if it was called already. Raises UserError if the folder is damaged, the pretrained model is
    another one, or the saved model is of another class.
    """
    tensors, about = checkpoint or read_checkpoint(folder)
    saved = about["model"]
    settings = saved["settings"]
    if saved["class"] != cls.__name__:
        raise UserError(
            f"{folder}: {cls.__name__}.load cannot open a run of the class {saved['class']}; load_run of "
            "patch.py opens any run"
        )

    first_of_coda = saved["num_layers"] - settings["coda"]
    kept = {*range(settings["prelude"]), settings["recurrent"], *range(first_of_coda, saved["num_layers"])}
    qwen = Qwen.from_pretrained(base or saved["base"], dtype, device, layers=kept)
    model = cls(qwen, bases=saved_bases(tensors), **settings)
    if fingerprint(model.pretrained_tensors()) != saved["fingerprint"]:
        raise UserError(
            f"{base or saved['base']} is not the model on which {folder} was trained ({saved['base']})"
        )

    own = {}
    for name, tensor in model.saved_tensors().items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            shape = list(tensor.shape)
            raise UserError(f"{folder}: was saved by other code: it has no {name} of shape {shape}")
        own[name] = tensors[name]
    model.load_state_dict(own, strict=False)
    return model


def saved_bases(tensors: dict) -> dict:
    """{k: (A_k, B_k)} of a saved model."""
    bases = {}
    for name, tensor in tensors.items():
        if name.startswith("lora.") and name.endswith(".A"):
            k = name.split(".")[1]
            bases[k] = (tensor, tensors[f"lora.{k}.B"])
    return bases
