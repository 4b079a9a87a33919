"""Saving and loading of looped models: their own weights, and which pretrained model they belong to.

A saved model holds the trained weights and the SVD bases. The pretrained weights are not copied: the file
has their name and their fingerprint (hub.py), and loading checks it.
"""

import inspect
from pathlib import Path

import torch

from checkpoint import read_checkpoint, write_checkpoint
from files import UserError
from hub import BUILT_IN, check_same_model, fingerprint, is_hub_name
from qwen import PROJECTIONS, Qwen
from run_folder import FILE_NAME, STEP_FOLDER


def save_model(model, folder, more_tensors: dict | None = None, **about):
    """Write the model to folder/ouroboros.safetensors, with more tensors and more about it (JSON values).

    The file is written whole or not at all. A pretrained model that was not loaded from files has no name
    and no fingerprint: load() then needs `base` and cannot check it. Raises UserError for a folder in which
    something would be lost.
    """
    check_folder(Path(folder), is_training="step" in about)
    expected = model.fingerprint
    if expected is None and model.source is not None:
        expected = fingerprint(model.source)
    own = model.saved_tensors()
    tensors = {**own, **(more_tensors or {})}
    about["model"] = {
        "class": type(model).__name__,
        "base": model.source,
        "fingerprint": expected,  # None if the pretrained model was not loaded from files
        "num_layers": model.config.num_hidden_layers,
        "settings": model.settings,
        "tensors": sorted(own),
    }
    write_checkpoint(folder, tensors, about)


def check_folder(folder: Path, is_training: bool):
    """Raise UserError for a folder in which a saved model would hide or replace the checkpoints of a run."""
    if any(folder.glob(STEP_FOLDER)):
        raise UserError(
            f"{folder}: holds the checkpoints of a run, which would be loaded instead; choose another folder"
        )
    if folder.match(STEP_FOLDER) and (folder / FILE_NAME).exists() and not is_training:
        raise UserError(f"{folder}: is a checkpoint from which a run can go on; choose another folder")


def load_model(cls, folder, base=None, dtype=torch.float32, device="cpu", checkpoint=None):
    """The model of class cls that save_model wrote. Only the kept layers of the pretrained model are read.

    base: where the pretrained model is now, if it was moved. checkpoint: what read_checkpoint(folder)
    returned, if it was called already. Raises UserError if the folder is damaged, the pretrained model is
    another one, or the saved model is of another class.
    """
    tensors, about = checkpoint or read_checkpoint(folder)
    saved = saved_model(folder, about)
    for name in saved.get("tensors", ()):  # older files have no such list
        if name not in tensors:
            raise other_code(folder, f"it has no {name}")
    settings = saved["settings"]
    if saved["class"] != cls.__name__:
        raise UserError(
            f"{folder}: {cls.__name__}.load cannot open a run of the class {saved['class']}; load_run of "
            "patch.py opens any run"
        )

    check_settings(cls, folder, settings)
    if base is None:
        base = saved["base"]
        check_base_is_there(base, folder)
    if saved["fingerprint"] is not None:
        check_same_model(base, saved["fingerprint"], folder)

    first_of_coda = saved["num_layers"] - settings["coda"]
    kept = {*range(settings["prelude"]), settings["recurrent"], *range(first_of_coda, saved["num_layers"])}
    qwen = Qwen.from_pretrained(base, dtype, device, layers=kept)
    model = cls(qwen, bases=saved_bases(tensors), **settings)

    own = {}
    for name, tensor in model.saved_tensors().items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise other_code(folder, f"it has no {name} of shape {list(tensor.shape)}")
        own[name] = tensors[name]
    for name in saved.get("tensors", ()):
        if name not in own:
            raise other_code(folder, f"it has {name}, for which a {cls.__name__} has no place here")
    model.load_state_dict(own, strict=False)
    return model


def other_code(folder, difference: str) -> UserError:
    """The error for a file that is whole, but does not fit this code."""
    return UserError(f"{folder}: was saved by other code: {difference}; load it with the code that saved it")


def saved_model(folder, about: dict) -> dict:
    """What save_model wrote about the model. Raises UserError if something is missing."""
    if "model" not in about:
        raise other_code(folder, "it holds no model")
    saved = about["model"]
    for key in ("class", "base", "fingerprint", "num_layers", "settings"):
        if key not in saved:
            raise other_code(folder, f"it does not say its {key}")
    for key in ("prelude", "recurrent", "coda"):
        if key not in saved["settings"]:
            raise other_code(folder, f"it does not say its {key}")
    return saved


def check_base_is_there(base: str | None, folder):
    """Raise UserError if the pretrained model of a saved model has no name, or is a folder that is gone."""
    advice = "say where it is now, with --model FOLDER or --model HUB_NAME (in Python: base=...)"
    if base is None:
        raise UserError(f"{folder}: its pretrained model was not loaded from files; {advice}")
    if not (base in BUILT_IN or is_hub_name(base) or Path(base).is_dir()):
        raise UserError(
            f"{base}: no such folder here; it held the pretrained model of {folder} when that was trained; "
            f"{advice}"
        )


def check_settings(cls, folder, settings: dict):
    """Raise UserError for a saved setting that the class does not have."""
    known = set()
    for parent in cls.__mro__:
        known.update(inspect.signature(parent.__init__).parameters)
    for name in settings:
        if name not in known:
            raise other_code(folder, f"{cls.__name__} has no setting {name}")


def saved_bases(tensors: dict) -> dict:
    """{k: (A_k, B_k)} of a saved model."""
    bases = {}
    for k in PROJECTIONS:
        if f"lora.{k}.A" in tensors and f"lora.{k}.B" in tensors:  # some subclasses have none
            bases[k] = (tensors[f"lora.{k}.A"], tensors[f"lora.{k}.B"])
    return bases
