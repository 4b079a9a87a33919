"""The tables and pictures from the runs of paper.py: python experiments/paper_tables.py experiments/paper/tiny"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qwen import UserError, exit_on_user_error, read_json

ALTERNATIVES = {"scale": "a scale per channel at the cut", "matrix": "one d x d matrix at the cut",
                "lora": "LoRA on all kept layers, no loop", "lora one": "LoRA on the recurrent layer, no loop",
                "layer": "the recurrent layer trained whole"}
RATES = {"third": "a third of the rate", "three": "three times the rate", "ten": "ten times the rate"}
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Results:
    """The JSON files of a folder. gap(loss, text): the share of the way from the cut model to the full one."""

    def __init__(self, folder: Path):
        runs = map(json.loads, map(Path.read_text, sorted(folder.glob("*-seed*.json"))))
        self.runs = {run["name"]: run for run in runs}
        self.base = read_json(folder / "baselines.json")

    def seeds(self, name: str) -> list[dict]:
        return [run for n, run in self.runs.items() if n.rpartition(" seed")[0] == name]

    def gap(self, loss: float, text: str) -> float:
        full, cut = self.base["full"][text], self.base["cut"][text]
        return (cut - loss) / (cut - full)

    def cells(self, name: str, texts) -> list[str]:
        """For each text, the loss and the share of the gap; with several seeds, their mean and standard deviation."""
        cells = []
        for text in texts:
            losses = [run["loss"][text] for run in self.seeds(name) if text in run["loss"]]
            if not losses:
                cells += ["", ""]
                continue
            gaps = [self.gap(loss, text) for loss in losses]
            spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
            points = f" ± {100 * stdev(gaps):.1f}" if len(gaps) > 1 else ""
            cells += [f"{mean(losses):.3f}{spread}", f"{100 * mean(gaps):.1f}{points}%"]
        return cells


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"### {title}\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def rows_of(results: Results, names: dict, texts=("held-out", "other")) -> list[list[str]]:
    rows = []
    for name, label in names.items():
        if runs := results.seeds(name):
            rows.append([label, f"{runs[0]['parameters']:,}", len(runs), *results.cells(name, texts)])
    return rows


HEAD = ["", "trained parameters", "seeds", "held-out", "of the gap", "other", "of the gap"]


def objective(results: Results) -> str:
    texts = ("train", "held-out", "other", "held-out t+2")
    rows = [[f"{which} model", *(f"{results.base[which][text]:.3f}" for text in texts), "", "", ""]
            for which in ("full", "cut")]
    names = {"offset2 sequence": "token t+2, sequence pooling (published)", "offset1 sequence": "next token, sequence",
             "depth8 controller": "next token, prefix (ours)", "long offset2 sequence": "published, long",
             "long offset1 prefix": "ours, long", "long depth1 offset2 sequence": "published, depth 1, long",
             "long depth1 controller": "ours, depth 1, long"}
    for name, label in names.items():
        for run in results.seeds(name)[:1]:
            leak = [f"{run[key]:.3f}" if key in run else "" for key in ("leak", "leak cut")]
            rows.append([label, *(f"{run['loss'][text]:.3f}" if text in run["loss"] else "" for text in texts),
                         f"{100 * results.gap(run['loss']['held-out'], 'held-out'):.1f}%", *leak])
    head = ["trained on", "train", "held-out", "other", "held-out, t+2", "of the held-out gap", "own task, every 16th "
            "position", "the same, without the future"]
    return table("1. As published and mended", head, rows)


def depths(results: Results) -> str:
    rows, tested = [], (1, 2, 4, 8, 16, 32)
    names = [f"depth{d} {m}" for m in ("controller", "none") for d in (1, 4, 8, 16)] + ["drawn depth"]
    for name in names:
        for run in results.seeds(name)[:1]:
            if "depths" in run:
                losses = [run["depths"][str(d)] for d in tested]
                rows.append([name, *(" / ".join(f"{value:.3f}" for value in loss.values()) for loss in losses)])
    head = ["trained with", *(f"depth {d}" for d in tested)]
    return table("5. Depth at test time: loss, held-out / other", head, rows)


def alternatives(results: Results) -> str:
    rows = rows_of(results, {"depth1 controller": "Controller, gate, step norm, depth 1",
                             "depth8 controller": "Controller, gate, step norm, depth 8"})
    for kind, label in ALTERNATIVES.items():
        tried = [name for name in (kind, *(f"{kind} lr {rate}" for rate in RATES)) if results.seeds(name)]
        if tried:
            best = min(tried, key=lambda name: results.seeds(name)[0]["loss"]["held-out"])
            rate = RATES.get(best.split()[-1], "the same rate")
            rows += rows_of(results, {best: f"{label} ({rate})"})
    return table("6. Is the hypernetwork worth its parameters? (alternatives: best of up to four rates)", HEAD, rows)


def past_the_paper(results: Results) -> str:
    names = {}  # on tiny the runs of the tables before were trained as long
    for depth in (1, 4, 8):
        label = f"the paper's system, depth {depth}"
        names |= {f"past paper depth{depth}": label, f"depth{depth} controller": label,
                  f"past paper depth{depth} three": "the same, three times the rate"}
    names |= dict.fromkeys(("past paper no step norm", "no step norm"), "the same without the step norm")
    for depth in (1, 4):
        names |= {f"past start depth{depth} {m}": f"started as the cut model, no patch, depth {depth}, {m}"
                  for m in ("none", "controller")}
    names |= {f"past seam {seam}": f"a patch at one seam ({where} the loop), depth 1, none"
              for seam, where in (("in", "before"), ("out", "after"))}
    names["past low rank"] = "a patch of rank d / 8 at both, depth 1, none"
    names |= {f"past patch depth{depth} {m}": f"a patch at both, depth {depth}, {m}"
              for depth in (1, 2, 4, 8) for m in ("none", "static", "controller")}
    names |= {"past coda norms": "both and the coda's norms, depth 1, none",
              "past coda lora": "both, the coda's norms and a LoRA of rank 4 on it, depth 1, none",
              "past all lora": "both, norms and a LoRA of rank 2 of all kept layers, depth 1, none (--patch)",
              **dict.fromkeys(("past lora", "lora lr three"), "no patch, a LoRA on all kept layers, no loop")}
    return table_after("7. Past the paper", "past all lora", results, names)


def longer(results: Results) -> str:
    names = {"long depth1 controller": "the paper's system, depth 1",
             "long offset1 prefix": "the paper's system, depth 8"}
    names |= {f"long patch depth{depth} {m}": f"a patch at both seams, depth {depth}, {m}"
              for depth in (1, 4, 8) for m in ("none", "controller")}
    names["long all lora"] = "--patch"
    return table_after("8. Longer", "long all lora", results, names)


def table_after(title: str, name: str, results: Results, names: dict) -> str:
    """The rows of runs that saw as many tokens as the run `name`."""
    tokens = next((run["tokens"] for run in results.seeds(name)), 0)
    names = {n: label for n, label in names.items() if all(run["tokens"] == tokens for run in results.seeds(n))}
    return table(f"{title}, after {tokens:,} tokens", HEAD, rows_of(results, names))


def write_all(folder: Path):
    results = Results(folder)
    modulated = {f"depth{d} {m}": f"depth {d}, {m}" for d in (1, 4, 8, 16) for m in ("controller", "static", "none")}
    ranks = {"rank8": "rank 8", "depth8 controller": "rank 32", "rank64": "rank 64", "rank8 static": "rank 8, static",
             "depth8 static": "rank 32, static", "rank64 static": "rank 64, static", "lr third": "rank 32, rate / 3",
             "lr three": "rank 32, rate x 3"}
    switches = {"depth8 controller": "all", "no gate": "without the gate", "no step norm": "without the step norm",
                "random bases": "random orthogonal bases"}
    parts = [objective(results), table("2. Controller, static, none", HEAD, rows_of(results, modulated)),
             table("3. Rank and learning rate", HEAD, rows_of(results, ranks)),
             table("4. Gate, step norm and bases", HEAD, rows_of(results, switches)), depths(results),
             alternatives(results), past_the_paper(results), longer(results)]
    parts = [part for part in parts if part.count("\n") > 4]  # with a row
    moved = [[kind, *(f"{run['moved'][part]:.4f}" for part in ("step norm", "gate")),
              f"{run['loss']['held-out']:.3f}"] for kind in ("bf16", "float32")
             for run in results.seeds(f"{kind} weights paper rate")]
    if moved:
        parts.append(table("Trained weights in bf16, at the paper's rate: how far they moved, on average",
                           ["trained weights", "step norm", "gate biases", "held-out"], moved))
    (folder / "tables.md").write_text("\n".join(parts))
    for draw in (draw_curves, draw_depths, draw_inside):
        draw(results, folder)


# ---- Pictures --------------------------------------------------------------------------------------------------------


def picture(folder: Path, name: str, figure):
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=130)


def draw_curves(results: Results, folder: Path):
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    system, published = "the paper's system", "as published: token t+2, sequence pooling"
    names = {"long offset1 prefix": (system, "black", "-"), "long offset2 sequence": (published, "0.5", "-."),
             "long depth1 controller": (f"{system}, depth 1", "black", "-"),
             "long depth1 offset2 sequence": (published, "0.5", "-."),
             "past paper depth8": (f"{system}, depth 8", "black", "--"),
             ("long all lora" if results.seeds("long all lora") else "past all lora"): ("--patch", "black", ":")}
    there = [(results.seeds(name)[0], *look) for name, look in names.items() if results.seeds(name)]
    for n, ((run, label, colour, style), marker) in enumerate(zip(there, "osD^v")):
        steps, losses, held_out = zip(*run["log"])
        if n == 0:
            axes.plot(steps, losses, color="0.8", linewidth=0.6, label=f"{label}, training", zorder=1)
        points = [(s, h) for s, h in zip(steps, held_out) if h]
        axes.plot(*zip(*points), color=colour, linestyle=style, marker=marker, markersize=4,
                  markevery=max(1, len(points) // 10), label=f"{label}, held-out")
    for which, style in (("cut", ":"), ("full", "--")):
        axes.axhline(results.base[which]["held-out"], color="black", linewidth=0.8, linestyle=style,
                     label=f"{which} model, held-out")
    axes.set(xlabel="optimizer step", ylabel="loss of the next token, nats")
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    picture(folder, "curves", figure)


def draw_depths(results: Results, folder: Path):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    markers = iter("osD^v")
    for name in ("depth1 controller", "depth4 controller", "depth8 controller", "depth16 controller", "drawn depth"):
        for run in results.seeds(name)[:1]:
            if "depths" in run:
                losses = {int(d): loss["held-out"] for d, loss in run["depths"].items()}
                axes.plot(losses.keys(), losses.values(), marker=next(markers), color="black", markerfacecolor="white",
                          linewidth=0.8, label=f"trained: {name.removesuffix(' controller')}")
    axes.axhline(results.base["cut"]["held-out"], color="0.5", linestyle=":", label="cut model")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tested := (1, 2, 4, 8, 16, 32), tested)
    axes.set(xlabel="depth at test time", ylabel="held-out loss, nats per token")
    axes.legend(fontsize="small")
    picture(folder, "depth", figure)


def draw_inside(results: Results, folder: Path):
    runs = [run for run in results.runs.values() if "inside" in run]
    if not runs:
        return
    inside = runs[0]["inside"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    top = max(size for text in inside.values() for m in text["diagonals"] for step in m for size in step)
    for axes, (name, text) in zip(panels, inside.items()):
        rows = [step for m in text["diagonals"][:4] for step in m]  # four texts, step after step
        image = axes.imshow(rows, aspect="auto", cmap="Greys", vmin=0, vmax=top)
        depth = len(text["diagonals"][0])
        axes.set(title=f"Controller, four {name} texts", xlabel="projection", ylabel=f"text, in it steps 1 to {depth}")
        axes.set_xticks(range(7), PROJECTIONS, fontsize="small")
        axes.set_yticks([depth * n - 0.5 for n in range(1, 4)], [])
    figure.colorbar(image, ax=panels[1], label="root mean square of the diagonal")
    for (name, text), style in zip(inside.items(), ("-", "--")):
        panels[2].plot(range(1, len(text["gate"]) + 1), text["gate"], "ko" + style, markersize=3, label=name)
    panels[2].set(title="gate", xlabel="step of the loop", ylabel="mean opening g")
    panels[2].legend(fontsize="small")
    picture(folder, "inside", figure)


def main():
    if len(sys.argv) != 2:
        raise UserError("name the folder of the results, experiments/paper/tiny for example")
    write_all(Path(sys.argv[1]))


if __name__ == "__main__":
    exit_on_user_error(main)
