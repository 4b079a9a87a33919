"""How well the full, the cut and the looped model predict a whole text file:

python train.py --eval runs/NAME --data FILE.txt

Every token of the file is predicted once, the first one from the end-of-text token before it. The file is
read in windows of nearly equal length, and a token is predicted from those before it in its window.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Tokens
from documents import read_documents
from estimates import gap_recovered, mean_loss
from evaluate import BAR_DELAY
from files import UserError
from ouroboros import Ouroboros
from patch import full_model_of
from report import model_names, print_row
from sources import TextSource, in_pieces

LONGEST_PIECE = 1_000_000  # characters; a longer document is read as several


class WholeFile(TextSource):
    """A text file as a source of which nothing is split off: both splits are all of it."""

    SPLIT_RULE = "the whole file"

    def _texts(self, split: str):
        for text, _ in in_pieces(self._documents(self.files), LONGEST_PIECE):
            if text.strip():
                yield text


def is_another_file(source, tokenizer, options) -> bool:
    """Whether --data is a single file, and not the one on which the run was trained."""
    if not Path(options.data).is_file():
        return False
    training = Tokens(source, "train", tokenizer)
    return training.chunk(0) is None or training.text_hash() != options.text_hash


def print_perplexities(model: Ouroboros, file: Path, tokenizer, options, device):
    """Print loss, perplexity and bits per byte of a file for the full, the cut and the looped model.

    options: those of train.py; seq_len is the most tokens of a window. Raises UserError for a file without
    text, and for a loss that is not finite.
    """
    tokens = Tokens(WholeFile(file), "val", tokenizer)
    if tokens.chunk(0) is None:
        raise UserError(f"{file}: has no text; name another file")
    models = {
        "full": full_model_of(model).loss,
        "cut": model.cut.loss,
        "ouroboros": partial(model.loss, depth=options.depth),
    }
    windows = list(windows_of(tokens, options.seq_len))
    losses = losses_of_windows(models, windows, file, device)
    sizes = [len(window) - 1 for window in windows]  # in tokens that are predicted
    total = sum(sizes)
    size = bytes_of(file)
    print(f"\n{file}: {total:,} tokens, {size:,} bytes")
    print(f"read in {len(sizes)} windows of up to {options.seq_len} tokens\n")
    print_row(["", "loss", "perplexity", "bits per byte"])
    columns = {}
    for name, label in model_names(model, options.depth).items():
        # weighted by the length of the window, so that the mean is that over all tokens
        weighted = [loss * n * len(sizes) / total for loss, n in zip(losses[name], sizes)]
        columns[name] = {"file": weighted}
        loss = mean_loss(weighted)
        bits = loss.mean * total / size / math.log(2)
        print_row([label, str(loss), f"{math.exp(loss.mean):.2f}", f"{bits:.3f}"])
    share = gap_recovered(columns, "file")
    print_row(["gap recovered", "no gap" if share is None else share.percent()])


@torch.no_grad()
def losses_of_windows(models: dict, windows: list, file: Path, device) -> dict[str, list[float]]:
    """{name: the loss of each window} for models {name: loss_of(ids, targets)}.

    file: where the windows are from, for the error. Raises UserError for a loss that is not finite.
    """
    losses = {name: [] for name in models}
    for window in tqdm(windows, desc="evaluating", unit=" windows", leave=False, delay=BAR_DELAY):
        ids = torch.from_numpy(window.astype(np.int64)).to(device)[None]  # [1, T + 1]
        for name, loss_of in models.items():
            loss = loss_of(ids[:, :-1], ids[:, 1:]).item()
            if not math.isfinite(loss):
                raise UserError(f"{name}: a loss of {loss} on {file}; give an earlier checkpoint, RUN/step-N")
            losses[name].append(loss)
    return losses


def windows_of(tokens: Tokens, length: int):
    """Yield windows of at most length + 1 tokens, each of which begins with the last token of the one before.

    The first window of a chunk begins with the end-of-text token. So every token is predicted once.
    """
    i = 0
    while tokens.chunk(i) is not None:
        chunk = np.concatenate([[tokens.end_token], tokens.chunk(i)])
        targets = len(chunk) - 1
        bounds = np.linspace(0, targets, math.ceil(targets / length) + 1).round().astype(int)
        for first, end in zip(bounds, bounds[1:]):
            yield chunk[first : end + 1]
        i += 1


def bytes_of(file: Path) -> int:
    """The length of all documents of a file in UTF-8."""
    return sum(len(part.encode("utf-8", "replace")) for part, _ in read_documents(file))
