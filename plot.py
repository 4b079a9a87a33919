"""Draw a run's loss.png again: python plot.py runs/NAME ..."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from files import UserError, exit_on_user_error, explaining, read_json, replace_file


def plot_losses(run: Path):
    """Draw run/loss.png: training and held-out loss by step, with the full and the cut model as lines."""
    results = read_json(run / "results.json")
    with explaining(run / "log.jsonl", "read as a line of JSON for each step"):
        lines = (run / "log.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
    evaluated = [row for row in rows if "held_out" in row]

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], color="0.7", linewidth=0.8, label="training")
    steps = [row["step"] for row in evaluated]
    axes.plot(steps, [row["held_out"] for row in evaluated], "o-", color="black", label="held-out")
    for name, style in (("cut", ":"), ("full", "--")):
        loss = results[name]["held-out"]
        axes.axhline(loss, color="black", linestyle=style, label=f"{name} model, held-out")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=run.name)
    axes.legend()

    replace_file(run / "loss.png", lambda part: figure.savefig(part, dpi=130, format="png"))


def main():
    if len(sys.argv) < 2:
        raise UserError("name the folder of a finished run: python plot.py runs/NAME")
    for name in sys.argv[1:]:
        plot_losses(Path(name))


if __name__ == "__main__":
    exit_on_user_error(main)
