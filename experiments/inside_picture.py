"""Draw how the Controller's diagonals depend on the step and on the text:

    python experiments/inside_picture.py RUN OUT.png

The texts are sequences of the test sample: held-out text of the run, and text of another kind (the READMEs of
packages for Python source code, and Python source code otherwise). The left panel has the root mean square
of the mean diagonal, by step and projection, and the right panel that of the difference of two texts.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import read_checkpoint
from device import pick_device, pick_dtype
from experiments.measure import FIRST_OF_TEST
from experiments.study import Texts, readme_folder
from files import UserError, exit_on_user_error, replace_file
from inside import Comparison, compare, look_inside, stacked_diagonals
from patch import load_run
from qwen import PROJECTIONS

SEQUENCES = 8  # of each of the two texts


def mean_diagonals(run: Path) -> torch.Tensor:
    """The diagonals of each sequence, averaged over its tokens: [2 * SEQUENCES, steps, 7, r].

    The held-out sequences come first. Raises UserError for a run without modulation or without options.
    """
    checkpoint = read_checkpoint(run)
    _, about = checkpoint
    if "options" not in about:
        raise UserError(f"{run}: was not saved by train.py, so its text is not known; give a run of train.py")
    options = about["options"]
    if options["modulation"] == "none":
        raise UserError(f"{run}: has no modulation, so there is nothing to draw; give another run")
    device = pick_device("auto")
    model = load_run(run, None, pick_dtype("auto", device), device, checkpoint)
    other = readme_folder() if options["data"] == "python" else "python"
    texts = Texts(options["model"], options["data"], other, options["seq_len"])

    means = []
    for batches in (texts.held_out(), texts.batches(other, "val")):
        needed = FIRST_OF_TEST + SEQUENCES
        found = batches.at_most(needed)
        if found < needed:
            raise UserError(f"{run}: a text has {found} sequences, {needed} are needed; give more text")
        ids, _ = batches.batch(FIRST_OF_TEST, SEQUENCES, device)
        for sequence in ids:
            means.append(stacked_diagonals(look_inside(model, sequence)).mean(0))
    return torch.stack(means)


def directions(diagonals, share=0.99) -> int:
    """How many directions hold this share of the squares of all diagonals [N, steps, 7, r].

    All entries of all diagonals of a text and step are one vector here. If they only grow and shrink
    together, one direction holds everything.
    """
    vectors = diagonals.flatten(2).flatten(0, 1)  # [N * steps, 7 * r]
    squares = torch.linalg.svdvals(vectors.double()).square()
    shares = squares.cumsum(0) / squares.sum()
    return int((shares < share).sum()) + 1


def draw(comparison: Comparison, path: Path):
    """Two panels with a row for each step and a column for each projection, in the same shades of grey."""
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(comparison.size)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("Mean of the texts", "Difference of two texts")
    top = comparison.size.max().item()
    for axes, title, table in zip(panels, titles, (comparison.size, comparison.difference)):
        axes.imshow(table.numpy(), cmap="Greys", vmin=0, vmax=top, aspect="auto")
        for t, row in enumerate(table.tolist()):
            for k, value in enumerate(row):
                color = "white" if value > 0.55 * top else "black"
                axes.text(k, t, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(PROJECTIONS)), [k.removesuffix("_proj") for k in PROJECTIONS])
        axes.set_yticks(range(len(table)), range(1, len(table) + 1))
        axes.set(title=title, xlabel="projection")
    panels[0].set_ylabel("step of the loop")
    replace_file(path, lambda part: figure.savefig(part, dpi=130, format=path.suffix[1:]))


def main():
    if len(sys.argv) != 3 or Path(sys.argv[2]).suffix not in (".png", ".svg"):
        raise UserError(
            "give a run and a picture: python experiments/inside_picture.py RUN OUT.png (or OUT.svg)"
        )
    run, path = Path(sys.argv[1]), Path(sys.argv[2])
    diagonals = mean_diagonals(run)
    comparison = compare(diagonals)
    draw(comparison, path)
    print(f"{path}: two texts differ by {comparison.between_texts:.3f} at the same step")
    if comparison.between_steps is not None:
        print(f"two steps differ by {comparison.between_steps:.3f} for the same text")
    entries = diagonals[0, 0].numel()
    print(f"{directions(diagonals)} of {entries} directions hold 99% of the diagonals' squares")


if __name__ == "__main__":
    exit_on_user_error(main)
