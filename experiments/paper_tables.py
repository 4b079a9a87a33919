"""Write the tables and the pictures of a study: python experiments/paper_tables.py experiments/results/tiny

claims.md says which claims of the paper hold (claims.py). tables.md has the numbers behind it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from estimates import mean_loss
from experiments.claims import claims_table
from experiments.configurations import ALTERNATIVES, TABLE_RATES
from experiments.halting import gain_over_fixed_depth
from experiments.measure import DEPTHS
from experiments.pictures import draw_curves, draw_depths
from experiments.records import CUT, FULL, HELD_OUT, OTHER, VALIDATION, Records
from experiments.tasks import binomial
from files import UserError, exit_on_user_error, replace_file

CAPTION = """Losses are in nats per token, on the test sample: 128 sequences on which nothing was chosen. ± is
the standard error over the sequences; the number in brackets is the standard deviation over the seeds, where
there are several. "Of the gap" is the share of the way from the cut model to the full model. "Minus" columns
are paired differences, sequence by sequence and seed by seed; a negative one is better than the row that it
is compared with."""

# ---- Rows ------------------------------------------------------------------------------------------------


def table(title: str, head: list[str], rows: list[list], caption="") -> str:
    """A table in Markdown, or "" for one without rows."""
    if not rows:
        return ""
    lines = [f"### {title}\n"]
    if caption:
        lines.append(caption + "\n")
    for row in [head, ["---"] * len(head), *rows]:
        cells = " | ".join(str(cell) for cell in row)
        lines.append(f"| {cells} |")
    return "\n".join(lines) + "\n"


def mean_cell(records: Records, name: str, path=HELD_OUT) -> str:
    return str(records.mean(name, path)) if records.has(name, path) else ""


def share_cell(records: Records, name: str, path=HELD_OUT) -> str:
    if not records.has(name, path):
        return ""
    share = records.share(name, path)
    return "no gap" if share is None else share.percent()


def difference_cell(records: Records, name: str, other: str, path=HELD_OUT, other_path=None) -> str:
    if name == other and other_path is None:
        return ""
    if not (records.has(name, path) and records.has(other, other_path or path)):
        return ""
    return str(records.difference(name, other, path, other_path))


def seeds_cell(records: Records, name: str) -> str:
    if records.has_diverged(name):
        return "diverged"
    return str(len(records.values(name)))


def parameters_cell(records: Records, name: str) -> str:
    return f"{sum(records.first(name)['parameters'].values()):,}" if records.results(name) else ""


def comparison(title: str, records: Records, labels: dict[str, str], reference: str, caption="") -> str:
    """A table of configurations beside a reference. labels: {configuration: label}."""
    head = ["", "parameters", "seeds", "held-out", "of the gap", f"minus {labels.get(reference, reference)}"]
    head += ["other", "of the gap"]
    rows = []
    for name, label in labels.items():
        if name not in records.configurations:
            continue
        rows.append(
            [
                label,
                parameters_cell(records, name),
                seeds_cell(records, name),
                mean_cell(records, name),
                share_cell(records, name),
                difference_cell(records, name, reference),
                mean_cell(records, name, OTHER),
                share_cell(records, name, OTHER),
            ]
        )
    if len(rows) < 2:  # nothing to compare
        return ""
    return table(title, head, rows, caption)


# ---- Tables ----------------------------------------------------------------------------------------------


def yardsticks(records: Records) -> str:
    labels = {
        FULL: "full model",
        "full adapted": "full model, adapted on the same tokens",
        CUT: "cut model",
        "unigrams": "unigram table",
        "bigrams": "bigram table",
    }
    for depth in (1, 8):
        labels[f"depth{depth} none"] = f"gate and step norm alone, depth {depth}"
        labels[f"depth{depth} static"] = f"static table, depth {depth}"
        best = best_static(records, depth)
        if best is not None:
            labels[best] = f"{best.replace(f'depth{depth} ', '')}, depth {depth}"
        labels[f"depth{depth} controller"] = f"Controller, depth {depth}"
    labels["patch"] = "--patch"
    labels["patch distill 0"] = "--patch, learning from the text alone"
    labels["patch distill 1"] = "--patch, learning from the full model alone"

    head = ["", "seeds", "held-out", "of the gap", "other", "of the gap"]
    head += ["true continuation of four", "copying: loss", "copying: right"]
    rows = []
    for name, label in labels.items():
        if not records.has(name):
            continue
        is_trained = None not in records.results(name)
        row = [label, seeds_cell(records, name) if is_trained else ""]
        for path in (HELD_OUT, OTHER):
            row += [mean_cell(records, name, path), share_cell(records, name, path)]
        rows.append([*row, choice_cell(records, name), *copy_cells(records, name)])
    grams = records.baselines["models"]["bigrams"]
    caption = f"""The adapted full model has the adapters of --patch (the norms and a LoRA of rank 2) on every
layer and was trained on the same tokens at the same rate. The tables of counts are of {grams["tokens"]:,}
training tokens; the unigram table adds one to each count, the bigram table adds {grams["k"]} times the
unigram table to the counts behind a token, which is what was best on the validation sample. "True
continuation": of the first seed; the error is binomial, and chance is 25%. "Copying": the second half of
repeated random tokens; the error is that over 32 sequences."""
    return table("1. Yardsticks", head, rows, caption)


def choice_cell(records: Records, name: str) -> str:
    right = records.first(name).get("choice")
    return binomial(right).percent() if right else ""


def copy_cells(records: Records, name: str) -> list[str]:
    if not records.has(name, ("copy loss",)):
        return ["", ""]
    accuracy = records.mean(name, ("copy accuracy",))
    return [str(records.mean(name, ("copy loss",))), accuracy.percent()]


def static_names(depth: int) -> list[str]:
    name = f"depth{depth} static"
    return [name, *(f"{name} rate x{rate}" for rate in TABLE_RATES)]


def best_static(records: Records, depth: int) -> str | None:
    """The static table at the rate that is best on the validation sample."""
    return records.best(static_names(depth))


def controller_against_static(records: Records, depth: int) -> str:
    controller = f"depth{depth} controller"
    labels = {controller: "Controller", f"depth{depth} none": "no modulation"}
    for name in static_names(depth):
        labels[name] = name.replace(f"depth{depth} ", "")
    for pool in ("zero", "mean", "token", "window", "sequence"):
        labels[f"depth{depth} {pool} input"] = f"Controller, {pool} input"

    head = ["", "seeds", "validation", "held-out", "of the gap", "minus Controller", "other", "of the gap"]
    head += ["with another text's pool, minus its own"]
    rows = []
    for name, label in labels.items():
        if name not in records.configurations:
            continue
        row = [label, seeds_cell(records, name), mean_cell(records, name, VALIDATION)]
        row += [mean_cell(records, name), share_cell(records, name)]
        row.append(difference_cell(records, name, controller))
        row += [mean_cell(records, name, OTHER), share_cell(records, name, OTHER)]
        rows.append([*row, difference_cell(records, name, name, ("swapped",), HELD_OUT)])
    caption = f"""The best rate of the static table is chosen on the validation sample: it is that of
"{best_static(records, depth)}". The inputs of the Controller: zeros; one mean vector of training text; the
state of the token; the mean over the last 16 positions; the mean over the whole sequence. The Controller's
own input is the mean over the prefix."""
    return table(f"2. Controller against static, depth {depth}", head, rows, caption)


def inputs(records: Records) -> str:
    rows = [[name, f"{cosine:.3f}"] for name, cosine in records.baselines["inputs"].items()]
    caption = """The mean cosine of what a pool gives of two different texts at the same position, before the
loop. At 1 the Controller sees the same whatever the text."""
    return table("3. How much the Controller's input varies", ["pool", "cosine"], rows, caption)


def bases(records: Records) -> str:
    columns = ["cosine", "input overlap", "input chance", "output overlap", "output chance", "layers"]
    rows = []
    for k, numbers in records.baselines["bases"].items():
        rows.append([k, *(f"{numbers[column]:.3f}" for column in columns)])
    head = ["", "cosine of R and -W", "overlap of input spaces", "of random ones"]
    head += ["overlap of output spaces", "of random ones", "mean absolute cosine of two layers"]
    caption = """R is the mean of the removed layers minus W, the recurrent layer. The spaces are those of the
top 32 singular vectors of R and of W; an overlap is a mean squared cosine, 1 for the same space."""
    return table("4. What the bases are", head, rows, caption)


def base_runs(records: Records, depth: int) -> str:
    name = f"depth{depth} controller"
    labels = {
        name: "the bases of R",
        f"depth{depth} own bases": "those of the recurrent layer",
        f"depth{depth} random bases": "random orthogonal ones",
    }
    return comparison(f"5. Trained with other bases, depth {depth}", records, labels, name)


def parts(records: Records, depth: int) -> str:
    name = f"depth{depth}"
    labels = {
        f"{name} controller": "all, step norm from 1 at 50 times the rate",
        f"{name} norm rate 1": "step norm from 1 at the common rate",
        f"{name} sized norm": "step norm from the size of the state at the common rate",
        f"{name} sized norm by channel": "the same for each channel",
        f"{name} no step norm": "without the step norm",
        f"{name} no gate": "without the gate",
        f"{name} gate bias -4": "gate started at -4",
        f"{name} gate bias 0": "gate started at 0",
    }
    return comparison(f"6. Step norm and gate, depth {depth}", records, labels, f"{name} controller")


def ranks_and_rates(records: Records, depth: int) -> str:
    name = f"depth{depth} controller"
    labels = {name: "Controller, rank 32"}
    for rank in (8, 64):
        labels[f"{name} rank{rank}"] = f"Controller, rank {rank}"
    labels[f"{name} lr third"] = "Controller, a third of the rate"
    labels[f"{name} lr three"] = "Controller, three times the rate"
    labels[f"depth{depth} static"] = "static, rank 32"
    for rank in (8, 64):
        labels[f"depth{depth} static rank{rank}"] = f"static, rank {rank}"
    if f"{name} rank8" not in records.configurations:
        return ""
    return comparison(f"7. Rank and learning rate, depth {depth}", records, labels, name)


def released(records: Records) -> str:
    names = {
        FULL: "full model",
        CUT: "cut model",
        "depth8 controller": "ours, depth 8",
        "depth1 controller": "ours, depth 1",
        "depth8 published objective": "ours, but token t+2 and sequence pool",
        "released": "as released",
        "released paper rate": "as released, rate 3e-4",
        "long depth1 controller": "ours, depth 1, four times the steps",
    }
    paths = {
        "train": ("objective", "train"),
        "train, t+2": ("objective", "train t+2"),
        "held-out, t+2": ("objective", "held-out t+2"),
        "held-out": HELD_OUT,
        "single sentences": ("sentences",),
    }
    rows = []
    for name, label in names.items():
        if records.has(name, ("sentences",)):
            row = [label, *(mean_cell(records, name, path) for path in paths.values())]
            row.append(difference_cell(records, name, CUT, ("sentences",)))
            rows.append([*row, difference_cell(records, name, CUT), *moved_cells(records.first(name))])
    head = ["", *paths, "single sentences, minus cut", "held-out, minus cut"]
    head += ["step norm moved by", "gate's biases moved by"]
    caption = """As released: trained on the token t+2 with the sequence pool, weights in bfloat16, a depth
drawn from 4, 8 and 16 for each step, a constant rate, and the step norm at the common rate. Its test on
held-out text gives the labels as they are, which judges the next token, on single sentences."""
    return table("8. As released, all at once", head, rows, caption)


def moved_cells(result: dict) -> list[str]:
    moved = result.get("moved")
    return [f"{moved['step norm']:.4f}", f"{moved['gate']:.4f}"] if moved else ["", ""]


def parameters(records: Records) -> str:
    names = ["depth8 controller", "depth1 controller", "depth8 static", "depth1 static", "patch"]
    rows = []
    for name in names:
        if records.results(name):
            counts = records.first(name)["parameters"]
            breakdown = ", ".join(f"{part} {count:,}" for part, count in counts.items())
            rows.append([name, f"{sum(counts.values()):,}", breakdown])
    return table("9. Trained parameters", ["", "all", "by part"], rows)


def depths(records: Records) -> str:
    rows = []
    for name in [*(f"depth{depth} controller" for depth in (1, 4, 8)), "drawn depth", "released"]:
        if records.has(name, ("depths",)):
            row = [name]
            for depth in DEPTHS:
                row.append(mean_cell(records, name, ("depths", str(depth))))
            rows.append(row)
    head = ["trained with", *(f"depth {depth}" for depth in DEPTHS)]
    caption = (
        "Of the first seed, on held-out text. The drawn depth is 1, 2, 4 or 8; that of released 4, 8 or 16."
    )
    return table("10. Depth at test time", head, rows, caption)


def past_the_paper(records: Records) -> str:
    labels = {
        "patch": "--patch",
        "patch paper cut": "--patch, with the layers that the paper keeps",
        "patch without closed form": "--patch --seam-tokens 0",
        "patch distill 0": "--patch --distill 0",
        "patch distill 1": "--patch --distill 1",
        "patch seams only": "matrices at both seams alone, from the cut model on",
        "patch seam in": "a matrix before the loop alone",
        "patch seam out": "a matrix behind the loop alone",
        "patch low rank": "matrices of rank d / 8 at both",
    }
    for kind in ALTERNATIVES:
        names = [f"alternative {kind}", f"alternative {kind} lr three"]
        best = records.best(names)
        if best is not None:
            labels[best] = f"{best} (best of two rates on the validation sample)"
    for depth in (1, 8):
        labels[f"depth{depth} controller"] = f"the paper's system, depth {depth}"
    caption = """The gap is that of the paper's cut in every row. --patch keeps as many layers, but others.
The alternatives have the paper's cut and no loop: a d x d matrix behind the recurrent layer, a LoRA on all
kept layers, or a LoRA on the recurrent layer."""
    return comparison("11. Past the paper", records, labels, "patch", caption)


def loops(records: Records) -> str:
    labels = {
        "patch": "--patch: no loop",
        "patch depth4": "--patch --depth 4",
        "patch depth8": "--patch --depth 8",
        "patch depth4 own adapters": "--patch --depth 4, an adapter for each step",
    }
    caption = """With the seams mended and the full model as target: does a loop help then? All saw as many
tokens."""
    return comparison("12. Loops in the patch", records, labels, "patch", caption)


def longer(records: Records) -> str:
    rows = []
    for name in (
        "patch closed form alone",
        "patch",
        "long patch",
        "long depth1 controller",
    ):
        if records.has(name):
            row = [name, f"{records.first(name)['tokens']:,}", seeds_cell(records, name)]
            row += [mean_cell(records, name), share_cell(records, name)]
            row += [mean_cell(records, name, OTHER), share_cell(records, name, OTHER)]
            rows.append([*row, choice_cell(records, name)])
    head = ["", "tokens", "seeds", "held-out", "of the gap", "other", "of the gap"]
    head.append("true continuation of four")
    return table("13. Longer", head, rows)


def halting(records: Records) -> str:
    rows = []
    for name in records.configurations:
        if not any("halting" in result for result in records.results(name).values()):
            continue
        measured = records.first(name)["halting"]["test"]
        for rule, numbers in [*measured["thresholds"].items(), ("oracle", measured["oracle"])]:
            gain = gain_over_fixed_depth(numbers, measured["fixed"])
            row = [name, rule, f"{mean_loss(numbers['steps']).mean:.2f}", str(mean_loss(numbers["loss"]))]
            rows.append([*row, str(gain)])
    head = ["", "threshold, nats", "steps on average", "held-out", "better than fixed depths by"]
    caption = """A token stops as soon as two successive predictions differ by less than the threshold
(experiments/halting.py). The comparison is with fixed depths that take as many steps on average. The oracle
knows the target. Of the first seed."""
    return table("14. Is there room for halting?", head, rows, caption)


def write_all(folder: Path):
    """Write claims.md, tables.md and the pictures into the folder of the results.

    Raises UserError for a folder that paper.py did not write.
    """
    records = Records(folder)
    tables = [
        CAPTION + "\n",
        yardsticks(records),
        controller_against_static(records, 1),
        controller_against_static(records, 8),
        inputs(records),
        bases(records),
        base_runs(records, 1),
        base_runs(records, 8),
        parts(records, 1),
        parts(records, 8),
        ranks_and_rates(records, 1),
        ranks_and_rates(records, 8),
        released(records),
        parameters(records),
        depths(records),
        past_the_paper(records),
        loops(records),
        longer(records),
        halting(records),
    ]
    text = "\n".join(part for part in tables if part)
    replace_file(folder / "tables.md", lambda part: part.write_text(text))
    claims = claims_table(records)
    replace_file(folder / "claims.md", lambda part: part.write_text(claims))
    draw_curves(records, folder)
    draw_depths(records, folder)


def main():
    if len(sys.argv) != 2:
        raise UserError("name the folder of the results: paper_tables.py experiments/results/tiny")
    write_all(Path(sys.argv[1]))


if __name__ == "__main__":
    exit_on_user_error(main)
