"""Write the tables and the pictures of the runs of paper.py.

The command is: python experiments/paper_tables.py experiments/paper/tiny
"""

import sys
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import UserError, exit_on_user_error, explaining, read_json, replace_file

TESTED_DEPTHS = (1, 2, 4, 8, 16, 32)
RUN_FIELDS = ("name", "parameters", "tokens", "loss", "log")  # which every run's JSON file has

ALTERNATIVES = {
    "scale": "a scale per channel at the cut",
    "matrix": "one d x d matrix at the cut",
    "lora": "LoRA on all kept layers, no loop",
    "lora one": "LoRA on the recurrent layer, no loop",
    "layer": "the recurrent layer trained whole",
}
RATES = {"third": "a third of the rate", "three": "three times the rate", "ten": "ten times the rate"}
PROJECTION_LABELS = ("q", "k", "v", "o", "gate", "up", "down")


class Results:
    """The JSON files of a folder.

    runs: {name with seed: result of a run}. base: {"full" or "cut": {text: loss}}. Raises UserError for a
    folder without results, and for a file that holds something else.
    """

    def __init__(self, folder: Path):
        path = folder / "baselines.json"
        with explaining(path, "read as the losses of the baselines", "name a folder that paper.py wrote"):
            baselines = read_json(path)
            self.base = {"full": baselines["full"], "cut": baselines["cut"]}

        self.runs = {}
        for path in sorted(folder.glob("*-seed*.json")):
            with explaining(path, "read as the results of a run", "delete it and run paper.py again"):
                run = read_json(path)
                for field in RUN_FIELDS:
                    if field not in run:
                        raise ValueError(f"it has no {field}")
                self.runs[run["name"]] = run

    def seeds(self, name: str) -> list[dict]:
        """The runs of a configuration, one for each seed."""
        return [run for run_name, run in self.runs.items() if run_name.rpartition(" seed")[0] == name]

    def first_seed(self, name: str) -> dict | None:
        """The first run of a configuration, or None if there is none."""
        for run in self.seeds(name):
            return run
        return None

    def held_out(self, name: str) -> float:
        """The held-out loss of the first run of a configuration."""
        return self.first_seed(name)["loss"]["held-out"]

    def gap(self, loss: float, text: str) -> float:
        """The share of the way from the cut model to the full one, 0 to 1."""
        full = self.base["full"][text]
        cut = self.base["cut"][text]
        return (cut - loss) / (cut - full)

    def cells(self, name: str, texts) -> list[str]:
        """For each text, the mean loss and the mean share of the gap.

        With several seeds, each mean is followed by the standard deviation.
        """
        cells = []
        for text in texts:
            losses = [run["loss"][text] for run in self.seeds(name) if text in run["loss"]]
            gaps = [100 * self.gap(loss, text) for loss in losses]
            if not losses:
                cells += ["", ""]
            elif len(losses) == 1:
                cells += [f"{losses[0]:.3f}", f"{gaps[0]:.1f}%"]
            else:
                cells.append(f"{mean(losses):.3f} ± {stdev(losses):.3f}")
                cells.append(f"{mean(gaps):.1f} ± {stdev(gaps):.1f}%")
        return cells


# ---- Tables ----------------------------------------------------------------------------------------------
#
# Each function returns a table in Markdown, or "" for a table without rows.

HEAD = ["", "trained parameters", "seeds", "held-out", "of the gap", "other", "of the gap"]


def table(title: str, head: list[str], rows: list[list]) -> str:
    if not rows:
        return ""
    lines = [f"### {title}\n"]
    for row in [head, ["---"] * len(head), *rows]:
        cells = " | ".join(str(cell) for cell in row)
        lines.append(f"| {cells} |")
    return "\n".join(lines) + "\n"


def rows_of(results: Results, labels: dict[str, str]) -> list[list]:
    """A row under HEAD for each configuration that has runs. labels: {name: label}."""
    rows = []
    for name, label in labels.items():
        runs = results.seeds(name)
        if runs:
            parameters = f"{runs[0]['parameters']:,}"
            rows.append([label, parameters, len(runs), *results.cells(name, ("held-out", "other"))])
    return rows


def objective(results: Results) -> str:
    texts = ("train", "held-out", "other", "held-out t+2")
    head = ["trained on", "train", "held-out", "other", "held-out, t+2", "of the held-out gap"]
    head += ["own task, every 16th position", "the same, without the future"]
    labels = {
        "offset2 sequence": "token t+2, sequence pooling (published)",
        "offset1 sequence": "next token, sequence",
        "depth8 controller": "next token, prefix (ours)",
        "long offset2 sequence": "published, long",
        "long offset1 prefix": "ours, long",
        "long depth1 offset2 sequence": "published, depth 1, long",
        "long depth1 controller": "ours, depth 1, long",
    }

    rows = []
    for which in ("full", "cut"):
        rows.append([f"{which} model", *loss_cells(results.base[which], texts), "", "", ""])
    for name, label in labels.items():
        run = results.first_seed(name)
        if run:
            gap = results.gap(run["loss"]["held-out"], "held-out")
            leak = loss_cells(run, ("leak", "leak cut"))
            rows.append([label, *loss_cells(run["loss"], texts), f"{100 * gap:.1f}%", *leak])
    return table("1. As published and mended", head, rows)


def loss_cells(losses: dict, names) -> list[str]:
    """The loss of each name, or an empty cell for one that was not measured."""
    cells = []
    for name in names:
        if name in losses:
            cells.append(f"{losses[name]:.3f}")
        else:
            cells.append("")
    return cells


def modulations(results: Results) -> str:
    labels = {}
    for depth in (1, 4, 8, 16):
        for modulation in ("controller", "static", "none"):
            labels[f"depth{depth} {modulation}"] = f"depth {depth}, {modulation}"
    return table("2. Controller, static, none", HEAD, rows_of(results, labels))


def ranks_and_rates(results: Results) -> str:
    labels = {
        "rank8": "rank 8",
        "depth8 controller": "rank 32",
        "rank64": "rank 64",
        "rank8 static": "rank 8, static",
        "depth8 static": "rank 32, static",
        "rank64 static": "rank 64, static",
        "lr third": "rank 32, rate / 3",
        "lr three": "rank 32, rate x 3",
    }
    return table("3. Rank and learning rate", HEAD, rows_of(results, labels))


def ablations(results: Results) -> str:
    labels = {
        "depth8 controller": "all",
        "no gate": "without the gate",
        "no step norm": "without the step norm",
        "random bases": "random orthogonal bases",
    }
    return table("4. Gate, step norm and bases", HEAD, rows_of(results, labels))


def depths(results: Results) -> str:
    names = []
    for modulation in ("controller", "none"):
        for depth in (1, 4, 8, 16):
            names.append(f"depth{depth} {modulation}")
    names.append("drawn depth")

    rows = []
    for name in names:
        run = results.first_seed(name)
        if run and "depths" in run:
            row = [name]
            for depth in TESTED_DEPTHS:
                losses = run["depths"][str(depth)]
                row.append(f"{losses['held-out']:.3f} / {losses['other']:.3f}")
            rows.append(row)
    head = ["trained with", *(f"depth {depth}" for depth in TESTED_DEPTHS)]
    return table("5. Depth at test time: loss, held-out / other", head, rows)


def alternatives(results: Results) -> str:
    labels = {
        "depth1 controller": "Controller, gate, step norm, depth 1",
        "depth8 controller": "Controller, gate, step norm, depth 8",
    }
    for kind, label in ALTERNATIVES.items():
        rates = {kind: "the same rate"}
        for rate, rate_label in RATES.items():
            rates[f"{kind} lr {rate}"] = rate_label
        tried = [name for name in rates if results.seeds(name)]
        if tried:
            best = min(tried, key=results.held_out)
            labels[best] = f"{label} ({rates[best]})"
    title = "6. Is the hypernetwork worth its parameters? (alternatives: best of up to four rates)"
    return table(title, HEAD, rows_of(results, labels))


def past_the_paper(results: Results) -> str:
    labels = {}  # on tiny, some runs of the earlier tables saw as many tokens; their names have no "past"
    for depth in (1, 4, 8):
        label = f"the paper's system, depth {depth}"
        labels[f"past paper depth{depth}"] = label
        labels[f"depth{depth} controller"] = label
        labels[f"past paper depth{depth} three"] = "the same, three times the rate"
    labels["past paper no step norm"] = "the same without the step norm"
    labels["no step norm"] = "the same without the step norm"

    for depth in (1, 4):
        for modulation in ("none", "controller"):
            label = f"started as the cut model, no patch, depth {depth}, {modulation}"
            labels[f"past start depth{depth} {modulation}"] = label
    labels["past seam in"] = "a patch at one seam (before the loop), depth 1, none"
    labels["past seam out"] = "a patch at one seam (after the loop), depth 1, none"
    labels["past low rank"] = "a patch of rank d / 8 at both, depth 1, none"

    for depth in (1, 2, 4, 8):
        for modulation in ("none", "static", "controller"):
            label = f"a patch at both, depth {depth}, {modulation}"
            labels[f"past patch depth{depth} {modulation}"] = label
    labels["past coda norms"] = "both and the coda's norms, depth 1, none"
    labels["past coda lora"] = "both, the coda's norms and a LoRA of rank 4 on it, depth 1, none"
    labels["past all lora"] = "both, norms and a LoRA of rank 2 of all kept layers, depth 1, none (--patch)"
    labels["past lora"] = "no patch, a LoRA on all kept layers, no loop"
    labels["lora lr three"] = "no patch, a LoRA on all kept layers, no loop"
    return table_after("7. Past the paper", "past all lora", results, labels)


def longer(results: Results) -> str:
    labels = {
        "long depth1 controller": "the paper's system, depth 1",
        "long offset1 prefix": "the paper's system, depth 8",
    }
    for depth in (1, 4, 8):
        for modulation in ("none", "controller"):
            label = f"a patch at both seams, depth {depth}, {modulation}"
            labels[f"long patch depth{depth} {modulation}"] = label
    labels["long all lora"] = "--patch"
    return table_after("8. Longer", "long all lora", results, labels)


def table_after(title: str, name: str, results: Results, labels: dict[str, str]) -> str:
    """A table of those configurations that saw as many tokens as the configuration `name`."""
    run = results.first_seed(name)
    tokens = run["tokens"] if run else 0
    as_long = {}
    for other_name, label in labels.items():
        if all(other["tokens"] == tokens for other in results.seeds(other_name)):
            as_long[other_name] = label
    return table(f"{title}, after {tokens:,} tokens", HEAD, rows_of(results, as_long))


def rounded_weights(results: Results) -> str:
    rows = []
    for kind in ("bf16", "float32"):
        run = results.first_seed(f"{kind} weights paper rate")
        if run:
            moved = run["moved"]
            row = [kind, f"{moved['step norm']:.4f}", f"{moved['gate']:.4f}"]
            rows.append([*row, f"{run['loss']['held-out']:.3f}"])
    title = "Trained weights in bf16, at the paper's rate: how far they moved, on average"
    return table(title, ["trained weights", "step norm", "gate biases", "held-out"], rows)


# ---- Pictures --------------------------------------------------------------------------------------------


def save_picture(folder: Path, name: str, figure: Figure):
    for kind in ("png", "svg"):
        path = folder / f"{name}.{kind}"
        replace_file(path, lambda part, kind=kind: figure.savefig(part, dpi=130, format=kind))


def draw_curves(results: Results, folder: Path):
    """The held-out losses of the long runs by step."""
    system = "the paper's system"
    published = "as published: token t+2, sequence pooling"
    patch = "long all lora" if results.seeds("long all lora") else "past all lora"
    curves = [  # configuration, label, colour, line style
        ("long offset1 prefix", system, "black", "-"),
        ("long offset2 sequence", published, "0.5", "-."),
        ("long depth1 controller", f"{system}, depth 1", "black", "-"),
        ("long depth1 offset2 sequence", published, "0.5", "-."),
        ("past paper depth8", f"{system}, depth 8", "black", "--"),
        (patch, "--patch", "black", ":"),
    ]
    curves = [curve for curve in curves if results.seeds(curve[0])]

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    if curves:
        name, label, _, _ = curves[0]
        draw_training_loss(axes, results.first_seed(name), label)
    for (name, label, colour, line_style), marker in zip(curves, "osD^v"):
        log = results.first_seed(name)["log"]
        steps = [step for step, _, held_out in log if held_out]  # the others were not evaluated
        losses = [held_out for _, _, held_out in log if held_out]
        axes.plot(
            steps,
            losses,
            color=colour,
            linestyle=line_style,
            marker=marker,
            markersize=4,
            markevery=max(1, len(steps) // 10),
            label=f"{label}, held-out",
        )
    for which, line_style in (("cut", ":"), ("full", "--")):
        loss = results.base[which]["held-out"]
        label = f"{which} model, held-out"
        axes.axhline(loss, color="black", linewidth=0.8, linestyle=line_style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss of the next token, nats")
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    save_picture(folder, "curves", figure)


def draw_training_loss(axes, run: dict, label: str):
    steps = [step for step, _, _ in run["log"]]
    losses = [loss for _, loss, _ in run["log"]]
    axes.plot(steps, losses, color="0.8", linewidth=0.6, label=f"{label}, training", zorder=1)


def draw_depths(results: Results, folder: Path):
    """The held-out loss by depth at test time, for each trained depth."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    trained = {}  # label -> run
    for label in ("depth1", "depth4", "depth8", "depth16"):
        trained[label] = results.first_seed(f"{label} controller")
    trained["drawn depth"] = results.first_seed("drawn depth")

    markers = iter("osD^v")
    for label, run in trained.items():
        if run is None or "depths" not in run:
            continue
        losses = [run["depths"][str(depth)]["held-out"] for depth in TESTED_DEPTHS]
        axes.plot(
            TESTED_DEPTHS,
            losses,
            marker=next(markers),
            color="black",
            markerfacecolor="white",
            linewidth=0.8,
            label=f"trained: {label}",
        )
    axes.axhline(results.base["cut"]["held-out"], color="0.5", linestyle=":", label="cut model")
    axes.set_xscale("log", base=2)
    axes.set_xticks(TESTED_DEPTHS, TESTED_DEPTHS)
    axes.set(xlabel="depth at test time", ylabel="held-out loss, nats per token")
    axes.legend(fontsize="small")
    save_picture(folder, "depth", figure)


def draw_inside(results: Results, folder: Path):
    """The size of the Controller's diagonals and the opening of the gate, if a run measured them."""
    inside = None  # {text: {"gate": [depth], "diagonals": [8 sequences, depth, 7]}}
    for run in results.runs.values():
        if inside is None and "inside" in run:
            inside = run["inside"]
    if inside is None:
        return

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    largest = max(largest_number(text["diagonals"]) for text in inside.values())
    for axes, (name, text) in zip(panels, inside.items()):
        image = draw_diagonals(axes, name, text["diagonals"][:4], largest)
    figure.colorbar(image, ax=panels[1], label="root mean square of the diagonal")

    for (name, text), line_style in zip(inside.items(), ("-", "--")):
        steps = range(1, len(text["gate"]) + 1)
        panels[2].plot(steps, text["gate"], "ko" + line_style, markersize=3, label=name)
    panels[2].set(title="gate", xlabel="step of the loop", ylabel="mean opening g")
    panels[2].legend(fontsize="small")
    save_picture(folder, "inside", figure)


def draw_diagonals(axes, name: str, sequences: list, largest: float):
    """The sizes of the diagonals of a few sequences, one below the other, step after step in each."""
    depth = len(sequences[0])
    rows = []
    for steps in sequences:
        rows += steps
    image = axes.imshow(rows, aspect="auto", cmap="Greys", vmin=0, vmax=largest)
    title = f"Controller, four {name} texts"
    axes.set(title=title, xlabel="projection", ylabel=f"text, in it steps 1 to {depth}")
    axes.set_xticks(range(len(PROJECTION_LABELS)), PROJECTION_LABELS, fontsize="small")
    axes.set_yticks([depth * n - 0.5 for n in range(1, len(sequences))], [])
    return image


def largest_number(nested) -> float:
    """The largest number in nested lists."""
    if isinstance(nested, list):
        return max(largest_number(item) for item in nested)
    return nested


# ---- All of it -------------------------------------------------------------------------------------------


def write_all(folder: Path):
    """Write tables.md and the pictures into the folder of the results.

    Raises UserError for a folder that paper.py did not write.
    """
    results = Results(folder)
    tables = [
        objective(results),
        modulations(results),
        ranks_and_rates(results),
        ablations(results),
        depths(results),
        alternatives(results),
        past_the_paper(results),
        longer(results),
        rounded_weights(results),
    ]
    text = "\n".join(part for part in tables if part)
    replace_file(folder / "tables.md", lambda part: part.write_text(text))

    draw_curves(results, folder)
    draw_depths(results, folder)
    draw_inside(results, folder)


def main():
    if len(sys.argv) != 2:
        raise UserError(
            "name the folder of the results: python experiments/paper_tables.py experiments/paper/tiny"
        )
    write_all(Path(sys.argv[1]))


if __name__ == "__main__":
    exit_on_user_error(main)
