"""Draw a run's loss.png again: python plot.py runs/NAME ..."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from files import UserError, exit_on_user_error, explaining, read_json, replace_file


def plot_losses(run: Path):
    """Draw run/loss.png: training and held-out loss by step, with the full and the cut model as lines."""
    results = read_json(run / "results.json")
    training, held_out = read_losses(run / "log.jsonl")

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(training.keys(), training.values(), color="0.7", linewidth=0.8, label="training")
    axes.plot(held_out.keys(), held_out.values(), "o-", color="black", label="held-out")
    for name, style in (("cut", ":"), ("full", "--")):
        loss = results[name]["held-out"]
        axes.axhline(loss, color="black", linestyle=style, label=f"{name} model, held-out")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=run.name)
    axes.legend()

    replace_file(run / "loss.png", lambda part: figure.savefig(part, dpi=130, format="png"))


def read_losses(log: Path) -> tuple[dict, dict]:
    """{step: training loss} and {step: held-out loss} of a log.jsonl."""
    training = {}
    held_out = {}
    with explaining(log, "read as a line of JSON for each step"):
        for line in log.read_text().splitlines():
            row = json.loads(line)
            training[row["step"]] = row["loss"]
            if "held_out" in row:
                held_out[row["step"]] = row["held_out"]
    return training, held_out


def main():
    if len(sys.argv) < 2:
        raise UserError("name the folder of a finished run: python plot.py runs/NAME")
    for name in sys.argv[1:]:
        plot_losses(Path(name))


if __name__ == "__main__":
    exit_on_user_error(main)
