"""Losses on fixed samples of text: those of the full model, of the cut one and of the looped one."""

import hashlib
import json
import math

import torch
from tqdm import tqdm

from data import Batches
from files import UserError, cache_folder, explaining, read_json, write_json
from ouroboros import Ouroboros
from processes import RANK
from qwen import Qwen

EVALUATION_SEED = 2**32  # evaluation reads the text in an order of its own, which no --seed gives
BAR_DELAY = 1  # seconds; a shorter evaluation shows no bar


@torch.no_grad()
def evaluate(loss_of, batches: Batches, sequences: int, device, first=0, name="the model") -> list[float]:
    """The cross entropy of so many sequences of `batches`, in nats per target: one number for each sequence.

    loss_of(ids, targets) returns the mean over a batch, which here is one sequence. first: the number of the
    first sequence. Of a text with fewer sequences, each is read once. name: what is evaluated, for the bar.
    """
    numbers = range(first, batches.at_most(first + sequences))
    losses = []
    with tqdm(
        numbers,
        desc=f"evaluating {name}",
        unit=" sequences",
        leave=False,
        delay=BAR_DELAY,
        disable=RANK > 0,
    ) as bar:
        for n in bar:
            ids, targets = batches.batch(n, 1, device)  # [1, T] each
            losses.append(loss_of(ids, targets).item())
    return losses


def evaluate_columns(
    loss_of, columns: dict[str, Batches], options, device, name="the model"
) -> dict[str, list[float]]:
    """{column: losses of the sequences} for each column of the results table. name: what is evaluated.

    Raises UserError if a loss is not finite.
    """
    losses = {}
    for column, batches in columns.items():
        bar_name = f"{name}, {column}"
        losses[column] = evaluate(loss_of, batches, options.eval_sequences, device, name=bar_name)
        for loss in losses[column]:
            if not math.isfinite(loss):
                advice = "try --dtype float32, or a smaller --lr"
                if getattr(options, "eval", None):  # of a run that is trained already
                    advice = "give an earlier checkpoint, RUN/step-N"
                raise UserError(f"{name} has a loss of {loss} on {column} text; {advice}")
    return losses


def evaluate_baselines(
    model: Ouroboros, qwen: Qwen | None, columns: dict[str, Batches], options, device
) -> dict:
    """{"full": {column: losses}, "cut": {column: losses}}, as in evaluate_columns, measured once for a model,
    a text and a setting, then kept.

    qwen: the full model; None if it is not loaded, then it is loaded here if its losses are not in the
    cache. The losses of a model that was not loaded from files are measured each time.
    """
    dtype = model.norm.weight.dtype
    key = {
        "model": model.fingerprint,
        "cut": [len(model.prelude), model.settings["recurrent"], len(model.coda)],
        "texts": [batches.folder.name for batches in columns.values()],
        "sample": [options.seq_len, options.eval_sequences],
        "computed in": [device.type, str(dtype)],
    }
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    path = cache_folder() / "baseline-losses" / f"{name}.json"

    if model.fingerprint is not None and path.exists():
        advice = "delete it, it is then made anew"
        with explaining(path, "read as losses", advice):
            losses = read_json(path, advice)
            return {"full": losses["full"], "cut": losses["cut"]}

    print("evaluating the full and the cut model, once for this model and text", flush=True)
    if qwen is None:
        qwen = Qwen.from_pretrained(model.source, dtype, device)
    losses = {
        "full": evaluate_columns(qwen.loss, columns, options, device, "the full model"),
        "cut": evaluate_columns(model.cut.loss, columns, options, device, "the cut model"),
    }
    if model.fingerprint is not None:
        write_json(path, losses)
    return losses
