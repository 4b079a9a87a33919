"""Checkpoints: one safetensors file each, written whole or not at all, verified when read.

A file holds tensors and `about`, a JSON object. Its header stores the SHA-256 of both. A run's folder
holds one folder per checkpoint, step-0000100 for example; see prune_checkpoints for which are kept.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from files import UserError, explaining, replace_file
from hub import is_hub_name, locate
from run_folder import FILE_NAME, STEP_FOLDER, holds_checkpoint, no_such_run, step_folder

FORMAT = 3  # changes when the names in a checkpoint change


def checksum(tensors: dict, about: str) -> str:
    """The SHA-256 of names, types, shapes and values of the tensors, and of `about`, in hexadecimal."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_checkpoint(folder, tensors: dict, about: dict):
    """Write tensors and a JSON object to folder/ouroboros.safetensors.

    Raises UserError if the disk does not take it.
    """
    text = json.dumps({"format": FORMAT, **about})
    metadata = {"about": text, "sha256": checksum(tensors, text)}
    replace_file(Path(folder) / FILE_NAME, lambda part: save_file(tensors, part, metadata))


def read_checkpoint(folder) -> tuple[dict, dict]:
    """The (tensors, about) of a checkpoint's folder or, for a run's folder, of its newest whole checkpoint.

    folder may be a Hub repository that holds ouroboros.safetensors. A damaged checkpoint is named on
    stderr and the one before it is read. Raises UserError if none is whole.
    """
    if is_on_hub(folder):
        return read_hub_checkpoint(str(folder))
    if not holds_checkpoint(Path(folder)):
        raise no_such_run(folder)

    candidates = sorted(Path(folder).glob(STEP_FOLDER), reverse=True)
    if not candidates:
        candidates = [Path(folder)]

    for candidate in candidates[:-1]:
        try:
            return read_one_checkpoint(candidate / FILE_NAME)
        except UserError as error:
            print(f"{error}; the checkpoint before it is read instead", file=sys.stderr)
    return read_one_checkpoint(candidates[-1] / FILE_NAME)


def is_on_hub(folder) -> bool:
    """Whether a name can only mean a Hub repository.

    runs/NAME never does, and OWNER/NAME does not if there is a folder OWNER here: it is a mistyped run.
    """
    path = Path(folder)
    return is_hub_name(str(folder)) and not path.parent.exists() and str(path.parent) not in ("runs", "..")


def read_hub_checkpoint(repo: str) -> tuple[dict, dict]:
    """The (tensors, about) of a Hub repository to which the folder of a checkpoint was uploaded."""
    path = locate(repo, FILE_NAME, required=False)
    if path is None:
        raise UserError(
            f"{repo}: this Hub repository is no run, for it has no {FILE_NAME} at its top; a run is put "
            "there with hf upload YOU/NAME runs/NAME/step-N"
        )
    return read_one_checkpoint(path, f"fetch it again: hf download {repo} {FILE_NAME} --force-download")


def read_one_checkpoint(path: Path, advice="bring back a copy") -> tuple[dict, dict]:
    """The (tensors, about) of one file. Raises UserError if it is damaged or of another format.

    advice: what to do about a damaged file.
    """
    with (
        explaining(path, "read as a whole checkpoint", advice),
        safe_open(path, "pt") as file,
    ):
        metadata = file.metadata() or {}
        tensors = {}
        for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            tensors[name] = file.get_tensor(name).clone()  # get_tensor maps the file, which may be replaced

    if "about" not in metadata or "sha256" not in metadata:
        raise UserError(
            f"{path}: was not saved by this program, or is damaged; give a folder of train.py or save()"
        )
    if checksum(tensors, metadata["about"]) != metadata["sha256"]:
        raise UserError(f"{path}: cannot be read as a whole checkpoint (its checksum does not fit); {advice}")
    about = json.loads(metadata["about"])
    if about.get("format") != FORMAT:
        raise UserError(f"{path}: was saved by another version of this program; open it with that version")
    return tensors, about


def prune_checkpoints(run: Path, newest: int, first_bad_step: int | None = None):
    """Keep the checkpoint of step `newest` and the one before it; remove all others of the run.

    Where a step had no finite loss, the newest good checkpoint is kept too. first_bad_step: the number of
    the first such step, if there was one. Checkpoints of later steps than `newest` are left from before
    the run was resumed at an earlier one.
    """
    folders = sorted(run.glob(STEP_FOLDER))
    up_to_newest = [folder for folder in folders if folder <= step_folder(run, newest)]
    kept = up_to_newest[-2:]
    if first_bad_step is not None:
        kept.append(newest_good_checkpoint(run, first_bad_step))
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def newest_good_checkpoint(run: Path, first_bad_step: int) -> Path | None:
    """The newest checkpoint with a good step after it: one before `first_bad_step`. None if there is none."""
    good = None
    for folder in sorted(run.glob(STEP_FOLDER)):
        next_step = 1 + int(folder.name.removeprefix("step-"))
        if next_step < first_bad_step:
            good = folder
    return good


# ---- The optimizer ---------------------------------------------------------------------------------------

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")  # torch's names of what AdamW keeps for each parameter


def optimizer_tensors(optimizer, parameters: dict) -> dict[str, torch.Tensor]:
    """AdamW's state for the named parameters, as tensors of a checkpoint: exp_avg/NAME and so on."""
    tensors = {}
    for name, p in parameters.items():
        for key, tensor in optimizer.state[p].items():
            tensors[f"{key}/{name}"] = tensor
    return tensors


def restore_optimizer(optimizer, parameters: dict, tensors: dict):
    """Put the state that optimizer_tensors returned back into AdamW."""
    state = {}
    for i, name in enumerate(parameters):
        if f"step/{name}" in tensors:  # the checkpoint of step 0 has none
            state[i] = {key: tensors[f"{key}/{name}"] for key in ADAM_STATE}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
