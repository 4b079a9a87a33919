"""Losses on fixed samples of text:

of the model, of the full model it was cut from, and of the cut model.
"""

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
def evaluate(loss_of, batches: Batches, sequences: int, batch_size: int, device, name="the model") -> float:
    """The mean cross entropy, in nats per target, over the first `sequences` sequences of `batches`.

    loss_of(ids, targets) returns the mean over a batch. In a text with fewer sequences, each is read once.
    name: what is evaluated, for the bar.
    """
    sequences = batches.at_most(sequences)
    total = torch.zeros((), device=device)
    with tqdm(
        total=sequences,
        desc=f"evaluating {name}",
        unit=" sequences",
        leave=False,
        delay=BAR_DELAY,
        disable=RANK > 0,
    ) as bar:
        for first in range(0, sequences, batch_size):
            size = min(batch_size, sequences - first)
            ids, targets = batches.batch(first, size, device)
            total += loss_of(ids, targets) * size
            total.item()  # waits for the device, so that the bar tells what is done
            bar.update(size)
    return total.item() / sequences


def evaluate_columns(
    loss_of, columns: dict[str, Batches], args, device, name="the model"
) -> dict[str, float]:
    """{column: loss} for each column of the results table. name: what is evaluated, for the bar.

    Raises UserError if a loss is not finite.
    """
    losses = {}
    for column, batches in columns.items():
        bar_name = f"{name}, {column}"
        loss = evaluate(loss_of, batches, args.eval_sequences, args.batch_size, device, bar_name)
        if not math.isfinite(loss):
            raise UserError(
                f"{name} has a loss of {loss} on {column} text; try --dtype float32, or a smaller --lr"
            )
        losses[column] = loss
    return losses


def evaluate_baselines(
    model: Ouroboros, qwen: Qwen | None, columns: dict[str, Batches], args, device
) -> dict:
    """{"full": {column: loss}, "cut": {column: loss}}, measured once for a model, a text and a setting,
    then kept.

    qwen: the full model; None if it is not loaded, then it is loaded here if its losses are not in the
    cache. The losses of a model that was not loaded from files are not kept.
    """
    dtype = model.norm.weight.dtype
    key = {
        "model": model.fingerprint,
        "cut": [len(model.prelude), model.settings["recurrent"], len(model.coda)],
        "texts": [batches.folder.name for batches in columns.values()],
        "sample": [args.seq_len, args.eval_sequences],
        "computed in": [device.type, str(dtype)],
    }
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    path = cache_folder() / "baselines" / f"{name}.json"

    if model.fingerprint is None or not path.exists():
        print("evaluating the full and the cut model, once for this model and text", flush=True)
        if qwen is None:
            qwen = Qwen.from_pretrained(model.source, dtype, device)
        losses = {
            "full": evaluate_columns(qwen.loss, columns, args, device, "the full model"),
            "cut": evaluate_columns(model.cut.loss, columns, args, device, "the cut model"),
        }
        write_json(path, losses)

    with explaining(path, "read as losses", "delete it, it is then made anew"):
        losses = read_json(path)
        return {"full": losses["full"], "cut": losses["cut"]}


def gap_recovered(results: dict, column: str) -> float | None:
    """The share of the loss between the cut and the full model that training has recovered.

    1 is the full model. None if the full model is no better than the cut one, so that there is no gap.
    """
    full = results["full"][column]
    cut = results["cut"][column]
    if full >= cut:
        return None
    return (cut - results["ouroboros"][column]) / (cut - full)
