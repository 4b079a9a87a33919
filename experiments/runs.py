"""List runs in a table: python experiments/runs.py [FOLDER ...]

A FOLDER is a run or holds runs. With --draw, the losses of each run are drawn into its loss.png.
"""

import math
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.files import UserError, read_json, reading, run_program
from support.report import draw_losses, estimate, gap_recovered
from support.run import RESULTS, RUNS, read_log

HEAD = ["run", "model on text", "steps", "held-out", "of the gap", "options that differ"]
HAVE_COLUMNS = ("model", "data", "steps")  # options that have a column of their own
OF_NO_INTEREST = ("out", "resume", "text_hash")


def main(argv=None):
    parser = ArgumentParser(description="List runs in a table.", usage=SUPPRESS)
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[RUNS], help="Runs, or folders with runs. [runs]"
    )
    parser.add_argument("--draw", action="store_true", help="Draw the losses of each run into its loss.png.")
    arguments = parser.parse_args(argv)

    options = {}  # {run: its options}
    rows = {}  # {run: its cells, without the last one}
    problems = []
    for run in runs_in(arguments.folders):
        try:
            run_options = read_json(run / "args.json")
            log = read_log(run)
            results = read_results(run) if (run / RESULTS).exists() else None
            with reading(run, "a whole run"):
                cells = cells_of(run, run_options, log, results)
                if arguments.draw:
                    draw_losses(run / "loss.png", log, results)
            rows[run] = cells
            options[run] = run_options
        except UserError as error:
            problems.append(error)

    table = [HEAD]
    for run, cells in rows.items():
        table.append([*cells, differences(options, run)])
    print_columns(table)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)


def runs_in(folders: list[Path]) -> list[Path]:
    """Those of the folders that are runs, and the runs that lie in the others. Raises UserError for none."""
    runs = []
    for folder in folders:
        if (folder / "args.json").exists():
            runs.append(folder)
        else:
            runs += sorted(path.parent for path in folder.glob("*/args.json"))
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))}: no run of train.py; name a folder that holds runs")
    return runs


def read_results(run: Path) -> dict:
    """{model: {column: the number of each sequence}} of a run that has ended. Raises UserError if damaged."""
    path = run / RESULTS
    results = read_json(path)
    with reading(path, "the results of a run"):
        for model in ("full", "cut", "ouroboros"):
            results[model]["held-out"]  # KeyError where it is missing
            for column, losses in results[model].items():
                if len(losses) != len(results["full"][column]) or not all(map(math.isfinite, losses)):
                    raise ValueError(f"{model}, {column}: numbers are missing")
    return results


def cells_of(run: Path, options: dict, log: list[dict], results: dict | None) -> list[str]:
    """The cells of a run, without the options that differ."""
    steps_done = log[-1]["step"] if log else 0
    held_out = share = ""
    if results is not None:
        held_out = str(estimate(results["ouroboros"]["held-out"]))
        gap = gap_recovered(*(results[model]["held-out"] for model in ("full", "cut", "ouroboros")))
        share = "no gap" if gap is None else gap.percent()
    else:
        for row in log:
            if "held_out" in row:  # the newest one stays
                held_out = f"{row['held_out']:.3f} at {row['step']}"
    text = f"{Path(options['model']).name} on {Path(options['data']).name}"
    return [str(run), text, f"{steps_done} of {options['steps']}", held_out, share]


def differences(options: dict[Path, dict], run: Path) -> str:
    """The options of a run that are not the same in all listed runs."""
    texts = []
    for name, value in options[run].items():
        is_same = all(name in others and others[name] == value for others in options.values())
        if not is_same and name not in (*HAVE_COLUMNS, *OF_NO_INTEREST):
            texts.append(f"{name} {value}")
    return ", ".join(texts)


def print_columns(table: list[list[str]]):
    """Print rows of cells, each column as wide as its widest cell."""
    widths = [max(map(len, cells)) for cells in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    run_program(main)
