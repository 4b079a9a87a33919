"""The pictures of a study: losses by step, and losses by depth at test time."""

from pathlib import Path

from matplotlib.figure import Figure

from experiments.measure import DEPTHS
from experiments.records import CUT, FULL, Records
from files import replace_file
from plot import write_beside

# The colours get darker from the first to the last and the markers differ, for pictures that are grey.
COLORS = ("#c88a00", "#d55e00", "#009e73", "#0057a8", "black")
MARKERS = "osD^v"
SYMBOLS = "●■◆▲▼"  # the markers as text

LONG_RUNS = {  # configuration -> label
    "long depth1 controller": "the paper's system, depth 1",
    "long patch": "--patch",
}
TRAINED_DEPTHS = {  # configuration -> the depths of its training
    "depth1 controller": (1,),
    "depth4 controller": (4,),
    "depth8 controller": (8,),
    "drawn depth": (1, 2, 4, 8),
}


def save_picture(folder: Path, name: str, figure: Figure):
    for kind in ("png", "svg"):
        path = folder / f"{name}.{kind}"
        replace_file(path, lambda part, kind=kind: figure.savefig(part, dpi=130, format=kind))


def draw_curves(records: Records, folder: Path):
    """The losses of the long runs by step: on the validation sample, as the training has measured them."""
    names = [name for name in LONG_RUNS if records.results(name)]
    if not names:
        return
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = []  # (height, text, colour) of what is written beside the right end
    for name, marker, symbol, color in zip(names, MARKERS, SYMBOLS, COLORS[1:]):
        steps = []
        losses = []
        for step, _, held_out in records.first(name)["log"]:
            if held_out is not None:  # the others were not evaluated
                steps.append(step)
                losses.append(held_out)
        axes.plot(steps, losses, color=color, marker=marker, markersize=4)
        labels.append((losses[-1], f"{symbol} {LONG_RUNS[name]}", color))
    for which, line_style in ((CUT, ":"), (FULL, "--")):
        loss = records.mean(which, ("loss", "held-out", "validation")).mean
        axes.axhline(loss, color="black", linewidth=1.2, linestyle=line_style)
        labels.append((loss, f"{which} model", "black"))
    axes.margins(x=0.02)
    axes.set(xlabel="optimizer step", ylabel="held-out loss of the next token, nats")
    write_beside(axes, labels)
    save_picture(folder, "curves", figure)


def draw_depths(records: Records, folder: Path):
    """The held-out loss by depth at test time. A ring marks the depth with which a model was trained."""
    names = [name for name in TRAINED_DEPTHS if records.has(name, ("depths",))]
    if not names:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = []  # (height, text, colour) of what is written beside the right end
    for name, marker, symbol, color in zip(names, MARKERS, SYMBOLS, COLORS):
        losses = {}  # depth -> mean; without the depths at which a loss is not finite
        for depth, numbers in records.first(name)["depths"].items():
            if None not in numbers:
                losses[int(depth)] = records.mean(name, ("depths", depth)).mean
        axes.plot(losses.keys(), losses.values(), color=color, marker=marker, markersize=4, linewidth=1.2)
        for depth in TRAINED_DEPTHS[name]:
            if depth in losses:
                axes.plot(depth, losses[depth], "o", color=color, markersize=13, fillstyle="none")
        depths = ", ".join(map(str, TRAINED_DEPTHS[name]))
        labels.append((losses[max(losses)], f"{symbol} trained with depth {depths}", color))
    cut = records.mean(CUT).mean
    axes.axhline(cut, color="black", linewidth=1.2, linestyle=":")
    labels.append((cut, "cut model", "black"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEPTHS, DEPTHS)
    axes.set(xlabel="depth at test time (ring: depth in training)", ylabel="held-out loss, nats per token")
    write_beside(axes, labels)
    save_picture(folder, "depth", figure)
