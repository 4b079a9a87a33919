"""List runs in a table: python experiments/runs.py [FOLDER ...]

A FOLDER is a run or holds runs; by default it is runs/. No tensor is read and torch is not imported, so that
fifty runs are listed in about a second.
"""

import math
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from estimates import gap_recovered, mean_loss
from files import UserError, exit_on_user_error, explaining
from presets import GPU, default_options, fitting_warmup
from run_folder import (
    FILE_NAME,
    RUNS,
    STEP_FOLDER,
    differing_options,
    holds_checkpoint,
    read_log,
    read_options,
    read_results,
)

HEAD = ["run", "model on text", "parameters", "steps", "held-out", "of the gap", "options that differ"]
NUMBERS = HEAD[2:6]  # the columns that are aligned on the right
ANY_GPU = GPU(memory=24_000_000_000, multiplies_bfloat16=True)  # its size decides only the model
BASES = "lora."  # how the names of the frozen SVD bases begin in a checkpoint


def main():
    parser = ArgumentParser(description="List runs in a table.", usage=SUPPRESS)
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        help="Runs, or folders that hold runs. Default: runs/.",
        metavar="FOLDER",
    )
    folders = parser.parse_args().folders or [RUNS]
    rows = []
    problems = []
    for folder in runs_in(folders):
        try:
            rows.append(row_of(folder))
        except UserError as error:
            problems.append(error)
    if rows:
        print_table(rows)
    else:
        print(f"no runs in {', '.join(map(str, folders))}")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)


def runs_in(folders: list[Path]) -> list[Path]:
    """Those of the folders that are runs, and all folders that lie in the others.

    Raises UserError for a folder that is not there.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run, or a folder that holds runs")
        if holds_checkpoint(folder):
            runs.append(folder)
        else:
            runs += sorted(path for path in folder.iterdir() if path.is_dir())
    return runs


# ---- A row -----------------------------------------------------------------------------------------------


def row_of(run: Path) -> list[str]:
    """The cells of a run. Raises UserError for a folder that is no run or is damaged."""
    if not holds_checkpoint(run):
        raise UserError(f"{run}: is no run of train.py; if runs lie in it, name it")
    options = read_options(run)
    log = read_log(run)
    steps_done = log[-1]["step"] if log else 0

    results = read_results(run, steps_done)
    if results is None:
        held_out = newest_held_out_loss(log)
        share = ""
    else:
        held_out = str(mean_loss(results["ouroboros"]["held-out"]))
        estimate = gap_recovered(results, "held-out")
        share = "no gap" if estimate is None else estimate.percent()

    return [
        str(run),
        f"{Path(options['model']).name} on {Path(options['data']).name}",
        f"{trained_parameters(run):,}",
        f"{steps_done} of {options['steps']}",
        held_out,
        share,
        differences(options),
    ]


def newest_held_out_loss(log: list[dict]) -> str:
    """The newest held-out loss of a run that has not ended, and after how many steps it was measured."""
    for row in reversed(log):
        if "held_out" in row:
            return f"{readable(row['held_out'])} at {row['step']}"
        if "held_out_at_start" in row:
            return f"{readable(row['held_out_at_start'])} at 0"
    return ""


def readable(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def trained_parameters(run: Path) -> int:
    """The number of trained parameters, by the shapes in the header of the newest checkpoint."""
    path = max(run.glob(f"{STEP_FOLDER}/{FILE_NAME}"), default=run / FILE_NAME)
    count = 0
    with explaining(path, "read as a checkpoint", "bring back a copy"), safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            is_moment = "/" in name  # of AdamW: exp_avg/NAME
            if not is_moment and not name.startswith(BASES):
                count += math.prod(file.get_slice(name).get_shape())
    return count


def differences(options: dict) -> str:
    """The options that make this run another one than `python train.py`, as on the command line.

    The defaults depend on whether the run's machine had CUDA, which a run does not say. The defaults from
    which the run differs least are taken.
    """
    candidates = []
    for gpu in (None, ANY_GPU):
        defaults = default_options(options, gpu)
        defaults["warmup"] = fitting_warmup(defaults["warmup"], options["steps"])
        candidates.append(differing_options(options, defaults))
    fewest = min(candidates, key=len)
    return " ".join(f"--{option} {value}".strip() for option, value in fewest)


# ---- The table -------------------------------------------------------------------------------------------


def print_table(rows: list[list[str]]):
    """Print the rows below the head, the columns as wide as their widest cell."""
    rows = [HEAD, *rows]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    for row in rows:
        cells = []
        for name, cell, width in zip(HEAD, row, widths):
            cells.append(cell.rjust(width) if name in NUMBERS else cell.ljust(width))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    exit_on_user_error(main)
