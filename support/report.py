"""What a run tells at its end: means with their errors, the table, the picture, the model card.

Nothing here knows a model: it gets names, numbers and lists of losses.
"""

import math
import shlex
from pathlib import Path
from typing import NamedTuple

from support.files import is_hub_name, replace_file, write_json, write_text
from support.run import PICTURE, RESULTS, read_log

# ---- Means and their errors ------------------------------------------------------------------------------
#
# The standard errors are those over sequences: how much another sample of the same text might change a mean.


class Estimate(NamedTuple):
    """A mean and its standard error, which is nan for a single value."""

    mean: float
    error: float

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.error:.3f}"

    def percent(self) -> str:
        if math.isnan(self.error):
            return f"{self.mean:.1%}"
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}%"


def estimate(values: list[float]) -> Estimate:
    """The mean of independent values, nan if there are none, and the standard deviation of that mean."""
    if not values:
        return Estimate(math.nan, math.nan)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))


def gap_recovered(full: list[float], cut: list[float], looped: list[float]) -> Estimate | None:
    """The share of the loss between the cut and the full model that the looped one has recovered.

    Losses of the same sequences. 1 is the full model. None if the full model is no better than the cut one,
    so that there is no gap.
    """
    gap = estimate([c - f for c, f in zip(cut, full, strict=True)]).mean
    if not gap > 0:
        return None
    share = estimate([c - o for c, o in zip(cut, looped, strict=True)]).mean / gap
    # of each sequence; the error of a ratio of two means
    deviations = [(c - o) - share * (c - f) for c, f, o in zip(cut, full, looped)]
    return Estimate(share, estimate(deviations).error / gap)


# ---- The table -------------------------------------------------------------------------------------------


SHARES = ("copies text", "copies random", "chooses text", "chooses number")  # columns where more is better


def table_rows(results: dict, labels: dict) -> list[list[str]]:
    """The rows of the results table, with a head row.

    results: {model: {column: a number for each sequence}} for "full", "cut" and "ouroboros". labels: {model:
    its name in the table}.
    """
    columns = list(results["full"])
    rows = [["", *columns]]
    for model, label in labels.items():
        cells = []
        for column in columns:
            value = estimate(results[model][column])
            cells.append(value.percent() if column in SHARES else str(value))
        rows.append([label, *cells])
    recovered = []
    for column in columns:
        gap = None
        if column not in SHARES:
            gap = gap_recovered(*(results[model][column] for model in ("full", "cut", "ouroboros")))
        recovered.append("" if gap is None else gap.percent())
    rows.append(["gap recovered", *recovered])
    return rows


def print_table(rows: list[list[str]]):
    """Print the rows of the results table, and what its numbers are."""
    print()
    for row in rows:
        print((f"{row[0]:24}" + "".join(f" {cell:>17}" for cell in row[1:])).rstrip())
    print("Losses are in nats per token; copies and chooses are shares of right answers.")
    print("Errors are standard errors over the sequences, passages or questions.", flush=True)


# ---- The picture -----------------------------------------------------------------------------------------


def draw_losses(path: Path, rows: list[dict], results: dict | None):
    """Draw the training and held-out loss by step, from the rows of a log, into a PNG file.

    results: those of table_rows, or None for a run that has not ended. Without rows, nothing is drawn.
    """
    if not rows:
        return
    from matplotlib.figure import Figure  # here, since it takes a second

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    axes.plot(steps, losses, color="0.82", linewidth=0.7)
    window = max(1, len(rows) // 20)
    means = []
    for i in range(len(losses)):
        recent = losses[max(0, i + 1 - window) : i + 1]
        means.append(sum(recent) / len(recent))
    axes.plot(steps, means, color="0.45", label=f"training, mean of {window} steps")

    evaluated = [row for row in rows if "held_out" in row]
    if evaluated:
        last = evaluated[-1]["held_out"]
        steps = [row["step"] for row in evaluated]
        losses = [row["held_out"] for row in evaluated]
        axes.plot(steps, losses, "o-", color="#0057a8", label=f"held-out: {last:.2f}")
    for model, style in (("cut", ":"), ("full", "--")):
        if results is not None:
            loss = estimate(results[model]["held-out"]).mean
            axes.axhline(loss, color="black", linestyle=style, label=f"{model} model, held-out: {loss:.2f}")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=path.resolve().parent.name)
    copying = [row for row in evaluated if "copies_text" in row]  # not in runs of an earlier version
    if copying:
        steps = [row["step"] for row in copying]
        shares = [row["copies_text"] for row in copying]
        right = axes.twinx()
        right.plot(steps, shares, "s-", color="#b4540a", label=f"copies text: {shares[-1]:.0%}")
        right.set(ylabel="share of a held-out passage that is copied", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=3)  # of both axes
    replace_file(path, lambda part: figure.savefig(part, dpi=130, format="png"))


# ---- The model card --------------------------------------------------------------------------------------

CARD = """\
---
{base_metadata}library_name: ouroboros-from-scratch
pipeline_tag: text-generation
tags:
- ouroboros
- recursive-transformer
- lora
---

# {name}

An Ouroboros ([arXiv 2604.02051](https://arxiv.org/abs/2604.02051)), trained with `train.py` of "Ouroboros
from scratch". It holds what was trained; the pretrained weights of {base} are not in it, and loading checks
that they are the same. Their licence applies to this model too.

{table}

A loss is the mean over {sequences} sequences of {seq_len} tokens. *copies* is the share of a passage's tokens
that the model finds likeliest when it reads the passage again.

In the folder of "Ouroboros from scratch", where OWNER/NAME is this repository:

```sh
python sample.py OWNER/NAME --prompt "..."
```

`--model FOLDER` takes the base model from a folder. The weights are one safetensors file with a checksum, and
nothing of this repository is executed.

## Settings

{settings}
"""


def write_card(folder: Path, rows: list[list[str]], options, sequences: int):
    """Write the model card of a run beside its last checkpoint, from its table and its options."""
    base = Path(options.model).name
    base_metadata = ""
    if is_hub_name(options.model):
        base = f"[{options.model}](https://huggingface.co/{options.model})"
        base_metadata = f"base_model: {options.model}\nbase_model_relation: adapter\n"
    settings = [["setting", "value"]]
    for name, value in sorted(vars(options).items()):
        if name in ("model", "data"):
            value = Path(value).name  # never a path of this machine
        if name not in ("out", "resume"):
            settings.append([name, str(value)])
    text = CARD.format(
        base_metadata=base_metadata,
        name=folder.resolve().parent.name,
        base=base,
        table=markdown_table(rows),
        sequences=sequences,
        seq_len=options.seq_len,
        settings=markdown_table(settings),
    )
    write_text(folder / "README.md", text)


def markdown_table(rows: list[list[str]]) -> str:
    """A table in Markdown. The first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


# ---- All of it -------------------------------------------------------------------------------------------


def report(run, results: dict, labels: dict, prompt: str, texts: dict):
    """Print the table and the continuations of a run that has ended, and write its results, picture and card.

    run: that of support/run.py. results, labels: those of table_rows. prompt: a held-out text. texts: {model:
    how it continues the prompt}.
    """
    rows = table_rows(results, labels)
    if not run.writes:
        return
    last = run.step_folder(run.options.steps)
    write_json(run.folder / RESULTS, results)
    write_card(last, rows, run.options, len(results["full"]["held-out"]))
    draw_losses(run.folder / PICTURE, read_log(run.folder), results)
    print_table(rows)
    print(f"\na held-out text:\n{prompt}")
    for model, label in labels.items():
        print(f"\n{label} continues:\n{texts[model]}")

    place = shlex.quote(str(run.folder))
    print(f"\nAll of it is in {run.folder}.")
    print(f'To continue a prompt:      python sample.py {place} --compare --prompt "..."')
    print(f'To look inside the loop:   python look.py {place} --prompt "..."')
    print(f"To share it on the Hub:    hf upload YOU/NAME {shlex.quote(str(last))}")
