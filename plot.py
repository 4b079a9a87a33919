"""Draw loss.png for runs: python plot.py runs/NAME ..."""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from files import UserError, exit_on_user_error, read_json, replace_file
from run_folder import holds_checkpoint, no_such_run, read_log


def plot_losses(run: Path):
    """Draw run/loss.png: training and held-out loss by step, and the full and the cut model as lines.

    A run that has not ended has no such lines yet. Raises UserError if there is no such run.
    """
    if not holds_checkpoint(run):
        raise no_such_run(run)
    rows = read_log(run)
    if not rows:
        raise UserError(f"{run}: has taken no step yet; there is nothing to draw")

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*column(rows, "loss"), color="0.7", linewidth=0.8, label="training")
    axes.plot(*column(rows, "held_out"), "o-", color="black", label="held-out")
    if (run / "results.json").exists():
        results = read_json(run / "results.json")
        for name, style in (("cut", ":"), ("full", "--")):
            loss = results[name]["held-out"]
            if isinstance(loss, list):  # of each sequence; older runs have the mean
                loss = sum(loss) / len(loss)
            axes.axhline(loss, color="black", linestyle=style, label=f"{name} model, held-out")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=run.name)
    axes.legend()

    replace_file(run / "loss.png", lambda part: figure.savefig(part, dpi=130, format="png"))


def column(rows: list[dict], key: str) -> tuple[list, list]:
    """The steps at which a log has a value for this key, and the values; nan for a step without a number."""
    steps = []
    values = []
    for row in rows:
        if key in row:
            steps.append(row["step"])
            values.append(float("nan") if row[key] is None else row[key])
    return steps, values


def main():
    if len(sys.argv) < 2:
        raise UserError("name the folder of a run: python plot.py runs/NAME")
    for name in sys.argv[1:]:
        plot_losses(Path(name))
        print(Path(name) / "loss.png")


if __name__ == "__main__":
    exit_on_user_error(main)
