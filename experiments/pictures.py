"""The pictures of a study: losses by step, and losses by depth at test time."""

from pathlib import Path

from matplotlib.figure import Figure

from experiments.records import CUT, FULL, Records
from files import replace_file


def save_picture(folder: Path, name: str, figure: Figure):
    for kind in ("png", "svg"):
        path = folder / f"{name}.{kind}"
        replace_file(path, lambda part, kind=kind: figure.savefig(part, dpi=130, format=kind))


def draw_curves(records: Records, folder: Path):
    """The losses of the long runs by step: on the validation sample, as the training has measured them."""
    curves = [  # configuration, label, line style
        ("long depth8 controller", "the paper's system, depth 8", "-"),
        ("long depth1 controller", "the paper's system, depth 1", "-"),
        ("long released", "as released", "-."),
    ]
    curves = [curve for curve in curves if records.results(curve[0])]
    if not curves:
        return
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, label, line_style), marker in zip(curves, "osD"):
        steps = []
        losses = []
        for step, _, held_out in records.first(name)["log"]:
            if held_out is not None:  # the others were not evaluated
                steps.append(step)
                losses.append(held_out)
        axes.plot(
            steps, losses, color="black", linestyle=line_style, marker=marker, markersize=4, label=label
        )
    for which, line_style in ((CUT, ":"), (FULL, "--")):
        loss = mean_validation_loss(records, which)
        axes.axhline(loss, color="0.5", linewidth=0.8, linestyle=line_style, label=f"{which} model")
    axes.set(xlabel="optimizer step", ylabel="held-out loss of the next token, nats")
    axes.legend(fontsize="small")
    save_picture(folder, "curves", figure)


def mean_validation_loss(records: Records, name: str) -> float:
    return records.mean(name, ("loss", "held-out", "validation")).mean


def draw_depths(records: Records, folder: Path):
    """The held-out loss by depth at test time, for each trained depth."""
    names = [f"depth{depth} controller" for depth in (1, 4, 8, 16)]
    names = [name for name in [*names, "drawn depth"] if records.has(name, ("depths",))]
    if not names:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(names, "osD^v"):
        depths = []
        losses = []
        for depth in records.first(name)["depths"]:
            if None not in records.first(name)["depths"][depth]:
                depths.append(int(depth))
                losses.append(records.mean(name, ("depths", depth)).mean)
        axes.plot(
            depths,
            losses,
            marker=marker,
            color="black",
            markerfacecolor="white",
            linewidth=0.8,
            label=f"trained: {name}",
        )
    axes.axhline(records.mean(CUT).mean, color="0.5", linestyle=":", label="cut model")
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, depths)
    axes.set(xlabel="depth at test time", ylabel="held-out loss, nats per token")
    axes.legend(fontsize="small")
    save_picture(folder, "depth", figure)
