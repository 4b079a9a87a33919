"""Draw loss.png for runs: python plot.py runs/NAME ..."""

import math
import textwrap
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

from matplotlib.figure import Figure

from estimates import gap_recovered, mean_loss
from files import UserError, exit_on_user_error, replace_file
from run_folder import holds_checkpoint, no_such_run, read_log, read_results

# The colours differ in brightness too, so that the picture can be read in grey.
EACH_STEP = "0.82"
TRAINING = "0.45"
HELD_OUT = "#0057a8"
BASELINE = "black"
SHADE = {"color": HELD_OUT, "alpha": 0.2, "linewidth": 0}


def plot_losses(run: Path):
    """Draw run/loss.png. Raises UserError if there is no such run, or if it has taken no step."""
    if not holds_checkpoint(run):
        raise no_such_run(run)
    rows = read_log(run)
    if not rows:
        raise UserError(f"{run}: has taken no step yet; there is nothing to draw")
    figure = loss_figure(run.resolve().name, rows, read_results(run, rows[-1]["step"]))
    replace_file(run / "loss.png", lambda part: figure.savefig(part, dpi=130, format="png"))


def loss_figure(title: str, rows: list[dict], results: dict | None) -> Figure:
    """Training and held-out loss by step.

    rows: those of a run's log. results: what read_results returned. If the run has ended, the full and the
    cut model are lines, and what the looped model recovers of the gap between them is shaded.
    """
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = []  # (height, text, colour) of what is written beside the right end

    # ---- Training
    steps, losses = column(rows, "loss")
    window = max(1, len(rows) // 20)
    means = running_means(losses, window)
    axes.plot(steps, losses, color=EACH_STEP, linewidth=0.7)
    axes.plot(steps, means, color=TRAINING, linewidth=1.5)
    text = "training" if window == 1 else f"training, mean of {window} steps"
    labels.append((last_number(means), text, TRAINING))

    # ---- Held out
    steps, losses = column(rows, "held_out")
    if "held_out_at_start" in rows[0]:  # not in the log of an older run
        steps.insert(0, 0)
        losses.insert(0, number(rows[0]["held_out_at_start"]))
    axes.plot(steps, losses, "o-", color=HELD_OUT, markersize=5)
    last = last_number(losses)
    labels.append((last, f"held-out: {last:.2f}", HELD_OUT))

    # ---- The full and the cut model
    if results is not None:
        for name, style in (("cut", ":"), ("full", "--")):
            loss = mean_loss(results[name]["held-out"]).mean
            axes.axhline(loss, color=BASELINE, linestyle=style, linewidth=1.2)
            labels.append((loss, f"{name} model, held-out: {loss:.2f}", BASELINE))
        share = gap_recovered(results, "held-out")
        if share is not None:
            cut = mean_loss(results["cut"]["held-out"]).mean
            is_recovered = [loss < cut for loss in losses]
            axes.fill_between(steps, losses, cut, is_recovered, interpolate=True, **SHADE)
            labels.append(((cut + last) / 2, f"{share.percent()} of the gap", HELD_OUT))

    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.set_title(textwrap.fill(title, 70), fontsize="medium")
    write_beside(axes, labels)
    return figure


def write_beside(axes, labels: list[tuple[float, str, str]]):
    """Write each (height, text, colour) to the right of the axes, at its height and none over another.

    The limits of the axes have to be final. A label without a height, which is nan, is left out.
    """
    bottom, top = axes.get_ylim()
    labels = sorted(label for label in labels if math.isfinite(label[0]))
    # In fractions of the height of the axes:
    places = [(height - bottom) / (top - bottom) for height, _, _ in labels]
    line = 0.055  # the distance that two lines of text need
    for _ in range(200):  # push neighbours apart, until none overlap
        for i in range(len(places) - 1):
            overlap = places[i] + line - places[i + 1]
            if overlap > 0:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    for place, (_, text, color) in zip(places, labels):
        axes.text(1.01, place, text, color=color, fontsize="small", va="center", transform=axes.transAxes)


# ---- Numbers ---------------------------------------------------------------------------------------------


def column(rows: list[dict], key: str) -> tuple[list, list]:
    """The steps at which a log has a value for this key, and the values; nan for a step without a number."""
    steps = []
    values = []
    for row in rows:
        if key in row:
            steps.append(row["step"])
            values.append(number(row[key]))
    return steps, values


def number(value: float | None) -> float:
    """nan for None, which a log has instead of what is not finite."""
    return math.nan if value is None else value


def running_means(values: list[float], window: int) -> list[float]:
    """For each value the mean of the last `window` values up to it. What is not finite does not count."""
    means = []
    for i in range(len(values)):
        finite = [value for value in values[max(0, i + 1 - window) : i + 1] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def last_number(values: list[float]) -> float:
    """The last of the values that is finite, or nan."""
    finite = [value for value in values if math.isfinite(value)]
    return finite[-1] if finite else math.nan


def main():
    parser = ArgumentParser(description="Draw loss.png in the folders of runs.", usage=SUPPRESS)
    parser.add_argument("runs", nargs="*", type=Path, help="Folders that train.py wrote, such as runs/NAME.")
    runs = parser.parse_args().runs
    if not runs:
        raise UserError("name the folder of a run: python plot.py runs/NAME")
    for run in runs:
        plot_losses(run)
        print(run / "loss.png")


if __name__ == "__main__":
    exit_on_user_error(main)
