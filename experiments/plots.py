"""Draw a run's loss.png again: python experiments/plots.py runs/NAME ..."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qwen import handling, read_json, replace_file


def plot_losses(run: Path):
    """loss.png: training and held-out loss by step, with the full and the cut model as lines."""
    results = read_json(run / "results.json")
    with handling(run / "log.jsonl", "read as a line of JSON for each step"):
        rows = [json.loads(line) for line in (run / "log.jsonl").open()]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], color="0.7", linewidth=0.8, label="training")
    held_out = [r for r in rows if "held_out" in r]
    axes.plot([r["step"] for r in held_out], [r["held_out"] for r in held_out], "o-", color="black", label="held-out")
    for name, style in (("cut", ":"), ("full", "--")):
        axes.axhline(results[name]["held-out"], color="black", linestyle=style, label=f"{name} model, held-out")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=run.name)
    axes.legend()
    replace_file(run / "loss.png", lambda part: figure.savefig(part, dpi=130, format="png"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        plot_losses(Path(name))
