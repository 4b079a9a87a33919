"""The ablations of RESULTS.md: python experiments/study.py [--rows NAME ...] [--seeds N] [--model M --data D]

Trains what is missing, each run in OUT/NAME-seedN, and writes one table, OUT/table.md. A run that was stopped
goes on where it was saved; one that has ended is skipped. A row that is not in ROWS yet takes one line there.
"""

import sys
from argparse import SUPPRESS, ArgumentParser
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from data import Batches, Tokens, open_text
from experiments.runs import read_results
from experiments.variants import (
    AdaptedFull,
    MeanInput,
    OwnBases,
    RandomBases,
    Released,
    Static100,
)
from ouroboros import Ouroboros
from qwen import load_tokenizer
from support.files import UserError, read_json, run_program, write_json, write_text
from support.options import number
from support.report import estimate, gap_recovered, markdown_table
from support.run import RESULTS, RUNS, checkpoints_of

# ---- The rows --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the study.

    options: a command line of train.py.
    reference: the name of the row with which this one is compared. kind: a class from variants.py in the
    place of the one that train.py would make. values: of options that the command line does not have.
    """

    name: str
    options: str
    reference: str | None = None
    kind: type[Ouroboros] | None = None
    values: dict = field(default_factory=dict)


STATIC = "--modulation static"
PUBLISHED = "--target-offset 2 --pool sequence"
ROWS = [
    # The Controller against simpler modulations, and depth.
    Row("depth1", "--depth 1"),
    Row("depth1-none", "--depth 1 --modulation none", "depth1"),
    Row("depth1-static", f"--depth 1 {STATIC}", "depth1"),
    Row("depth1-mean-input", "--depth 1", "depth1", MeanInput),
    Row("depth4", "--depth 4", "depth1"),
    Row("depth4-static", f"--depth 4 {STATIC}", "depth4"),
    Row("depth8", "--depth 8", "depth4"),
    Row("depth8-none", "--depth 8 --modulation none", "depth8"),
    Row("depth8-static", f"--depth 8 {STATIC}", "depth8"),
    Row("depth8-static-x100", f"--depth 8 {STATIC}", "depth8", Static100),
    Row("depth8-mean-input", "--depth 8", "depth8", MeanInput),
    # The other parts of the system.
    Row("no-gate", "--depth 8 --no-gate", "depth8"),
    Row("no-step-norm", "--depth 8 --no-step-norm", "depth8"),
    Row("random-bases", "--depth 8", "depth8", RandomBases),
    Row("own-bases", "--depth 8", "depth8", OwnBases),
    # Why the released code shows no gain.
    Row("published-target", f"--depth 8 {PUBLISHED}", "depth8"),
    Row("released", f"--depth 16 {PUBLISHED}", "depth8", Released, {"norm_lr_scale": 1.0}),
    # Past the paper. "3 6 3" is the cut that the paper makes of the 12 layers of tiny.
    Row("patch", "--patch", "depth8"),
    Row("patch-closed-form", "--patch --steps 0", "patch"),
    Row("patch-no-repeats", "--patch", "patch", values={"repeats": 0.0}),
    Row("patch-paper-cut", "--patch --cut 3 6 3", "patch"),
    Row("patch-no-closed-form", "--patch", "patch", values={"seam_tokens": 0}),
    Row("patch-text-alone", "--patch --distill 0", "patch"),
    Row("patch-full-model-alone", "--patch --distill 1", "patch"),
    Row("patch-depth4", "--patch --depth 4", "patch"),
    Row("patch-depth8", "--patch --depth 8", "patch"),
    Row("adapted-full", "--patch --distill 0", "patch", AdaptedFull, {"seam_tokens": 0}),
]


def main(argv=None):
    parser = ArgumentParser(description="Train the rows of the study and write its table.", usage=SUPPRESS)
    names = [row.name for row in ROWS]
    option = parser.add_argument
    option("--rows", nargs="+", default=names, choices=names, metavar="NAME", help="Only these. [all]")
    option("--model", default="tiny", help="As for train.py. [tiny]")
    option("--data", default="python", help="As for train.py. [python]")
    option("--steps", type=number(1, 10**9), default=250, help="Of a row, but for the closed form. [250]")
    option("--seeds", type=number(1, 1000), default=1, help="How many runs a row has. [1]")
    option("--sequences", type=number(1, 10**9), default=128, help="Of each split that is measured. [128]")
    option("--out", type=Path, help="The folder of the study. [runs/study-MODEL-DATA]")
    arguments = parser.parse_args(argv)
    out = arguments.out or RUNS / f"study-{Path(arguments.model).name}-{Path(arguments.data).stem}"
    common = options_of_all_rows(arguments, out)

    problems = {}  # {name of a run: why it gave no numbers}
    for row in [row for row in ROWS if row.name in arguments.rows]:
        for seed in range(arguments.seeds):
            folder = out / f"{row.name}-seed{seed}"
            if (folder / RESULTS).exists():
                continue
            print(f"\n==== {folder.name}", flush=True)
            try:
                code = train_row(row, [*common, "--seed", str(seed)], folder)
            except UserError as error:  # it diverged, for example; the other rows go on
                problems[folder.name] = error
                continue
            if code != 0:  # a signal; the run is saved
                return code

    results = {row.name: results_of(row.name, out, problems) for row in ROWS}
    text = markdown_table(table(arguments.rows, results)) + "\n\n" + LEGEND
    for name, problem in problems.items():
        text += f"\nNo numbers: {name}: {problem}\n"
    print("\n" + text)
    write_text(out / "table.md", text)
    print(f"The table is in {out / 'table.md'}; python experiments/runs.py {out} lists the runs.")
    return 1 if problems else 0


def options_of_all_rows(arguments, out: Path) -> list[str]:
    """The options of train.py that all runs in this folder share. Raises UserError if it has others."""
    steps = str(arguments.steps)
    options = ["--model", arguments.model, "--data", arguments.data, "--steps", steps, "--eval-every", steps]
    options += ["--eval-sequences", str(arguments.sequences)]
    path = out / "study.json"
    if path.exists() and read_json(path).get("options") != options:
        raise UserError(f"{out}: holds a study with other options (study.json); choose another --out")
    write_json(path, {"options": options})
    return options


# ---- Training --------------------------------------------------------------------------------------------


def train_row(row: Row, common: list[str], folder: Path) -> int:
    """Train a run, or go on with it. Returns the exit code of train.py. Raises UserError."""
    argv = [*common, *row.options.split(), "--resume" if checkpoints_of(folder) else "--out", str(folder)]
    new_model = None if row.kind is None else partial(variant, row.kind)
    return train.main(argv, new_model=new_model, **row.values)


def variant(kind: type[Ouroboros], qwen, options) -> Ouroboros:
    """A model of this class by the options of train.py, measured on the training text if it needs that."""
    settings = dict(depth=options.depth, rank=options.rank, modulation=options.modulation, pool=options.pool)
    model = kind(qwen, gate=options.gate, step_norm=options.step_norm, **settings)
    if isinstance(model, MeanInput) and not model.norm.weight.is_meta:
        tokens = Tokens(open_text(options.data), "train", load_tokenizer(options.model))
        training = Batches(tokens, options.seq_len, options.target_offset, options.seed)
        ids, _ = training.batch(0, training.at_most(16), model.norm.weight.device)
        model.measure(ids)
    return model


# ---- The table -------------------------------------------------------------------------------------------

ALSO_SHOWN = ["copies text", "copies random", "held-out, t+2"]  # columns of the results
HEAD = ["row", "seeds", "held-out", *ALSO_SHOWN, "share of the gap", "difference", "to"]
LEGEND = """\
Held-out losses are in nats per token; lower is better. Copying is the share of the tokens of a passage that a
model predicts when it reads the passage again. The error is that over the sequences, and the number in
brackets is the standard deviation over the seeds. The gap is that between the full model and the layers that
the paper keeps. A difference is paired: sequence by sequence and seed by seed.
"""


def results_of(name: str, out: Path, problems: dict) -> dict[int, dict]:
    """{seed: results} of the runs of a row that have ended. A damaged one is added to the problems."""
    found = {}
    for path in sorted(out.glob(f"{name}-seed*/{RESULTS}")):
        try:
            found[int(path.parent.name.rpartition("-seed")[2])] = read_results(path.parent)
        except UserError as error:
            problems[path.parent.name] = error
    return found


def table(names: list[str], results: dict[str, dict]) -> list[list[str]]:
    """The cells of the rows with these names, below a head. results: {row: {seed: results}} of all rows."""
    gap = None  # the losses of the full model and of the cut that the paper makes
    for row in ROWS:
        if "--patch" not in row.options and results[row.name]:
            run = next(iter(results[row.name].values()))
            gap = (run["full"]["held-out"], run["cut"]["held-out"])
            break

    cells = [HEAD]
    for row in ROWS:
        if row.name not in names:
            continue
        losses = column(results[row.name], "held-out")
        share = ""
        if gap is not None:
            share = summary(losses, partial(gap_recovered, *gap))
        difference = ""
        if row.reference is not None:
            reference = column(results[row.reference], "held-out")
            difference = summary(paired_differences(losses, reference))
        seeds = str(len(losses)) if losses else "no numbers"
        others = []
        for name in ALSO_SHOWN:
            others.append(summary(column(results[row.name], name)))
        cells.append([row.name, seeds, summary(losses), *others, share, difference, row.reference or ""])
    return cells


def column(runs: dict[int, dict], name: str) -> dict[int, list[float]]:
    """{seed: the number of each sequence or passage} in one column, of the runs that have it."""
    return {seed: run["ouroboros"][name] for seed, run in runs.items() if name in run["ouroboros"]}


def paired_differences(losses: dict, reference: dict) -> dict[int, list[float]]:
    """{seed: loss - loss of the reference, for each sequence}, of the seeds that both have."""
    differences = {}
    for seed in losses.keys() & reference.keys():
        pairs = zip(losses[seed], reference[seed], strict=True)
        differences[seed] = [loss - other for loss, other in pairs]
    return differences


def summary(numbers: dict[int, list[float]], mean_of=estimate) -> str:
    """The mean over sequences and seeds with its error: "2.693 ± 0.053 (0.004)". Empty without numbers.

    numbers: {seed s: x_s}, with x_s,i for sequence i. With x_i, the mean over the seeds, the mean is that of
    x_i over the n sequences, and the error is stdev(x_i) / sqrt(n). In brackets stands, where there are
    several seeds, the standard deviation over the seeds of the mean of x_s. mean_of: the Estimate of a list,
    or None where there is none.
    """
    if not numbers:
        return ""
    averaged = [sum(values) / len(values) for values in zip(*numbers.values(), strict=True)]
    if mean_of(averaged) is None:
        return "no gap"
    text = str(mean_of(averaged))
    if len(numbers) > 1:
        text += f" ({stdev(mean_of(values).mean for values in numbers.values()):.3f})"
    return text


if __name__ == "__main__":
    run_program(main)
