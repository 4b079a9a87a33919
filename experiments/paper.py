"""Measure the paper's claims: python experiments/paper.py

The program trains every configuration of experiments/configurations.py on the built-in model, two at a
time. That takes about an hour on two cores. An interrupted program continues where it was stopped. The
results are written to experiments/results/tiny: a JSON file for each run with its options and the loss of
each sequence, then claims.md, tables.md and the pictures.

With --model FOLDER --data FOLDER, the program trains the central configurations on another model. That takes
about two hours for a model of 135M parameters.

Losses are in nats per token. Each table has the held-out text of the training distribution ("held-out") and a
text of another kind ("other"). For Python source code, the other text is the READMEs of packages.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.one_run import measure_baselines, train_and_measure
from experiments.study import BASELINES, Study, readme_folder
from files import UserError, exit_on_user_error, read_json

# ---- All of them -----------------------------------------------------------------------------------------


def has_result(name: str, study: Study) -> bool:
    """Whether the result of a run is there, after running it in a process of its own if it was not."""
    if study.result_file(name).exists():
        return True
    command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        print(f"{name} failed: {process.stderr[-2000:]}", flush=True)
        return False
    print(name, flush=True)
    return True


def run_all(study: Study, jobs: int):
    """Run what has no result yet, `jobs` runs at a time, then write the tables.

    Raises UserError if a run fails, or if the folder of the results belongs to other texts or steps.
    """
    if not has_result(BASELINES, study):
        raise UserError("the model or a text cannot be used, see above")
    if read_json(study.result_file(BASELINES)).get("of") != study.identity:
        raise UserError(
            f"{study.results} is of other texts or steps than {study.identity}; "
            f"move it and {study.run_folder} away"
        )

    with ThreadPoolExecutor(jobs) as pool:
        succeeded = list(pool.map(lambda name: has_result(name, study), study.runs()))

    from experiments.paper_tables import write_all  # only now, because importing matplotlib takes seconds

    write_all(study.results)
    failed = succeeded.count(False)
    if failed:
        raise UserError(f"{failed} runs failed, see above; the same command tries them again")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", default="tiny", help="The model, as for train.py. Default: tiny.")
    option("--data", default="python", help="The text, as for train.py. Default: python.")
    option(
        "--other",
        help="A text of another kind. Default: the READMEs of packages if --data is python, else python.",
    )
    option(
        "--steps",
        type=int,
        help="The number of optimizer steps of most runs; some take several times as many. Default: 250 for "
        "tiny, else 60.",
    )
    option("--dtype", default="auto", help="The number type, as for train.py. Default: auto.")
    option(
        "--jobs",
        type=int,
        default=2,
        help="How many runs are trained at a time, each with its share of the cores. Default: 2.",
    )
    option("--run", help=argparse.SUPPRESS)  # one run, in a process that has_result starts
    return parser.parse_args()


def new_study(args) -> Study:
    """The study that the command line asks for."""
    steps = args.steps
    if steps is None:
        steps = 250 if args.model == "tiny" else 60
    other = args.other
    if other is None:
        other = readme_folder() if args.data == "python" else "python"

    name = Path(args.model).name
    return Study(
        args.model,
        args.data,
        other,
        steps,
        args.dtype,
        run_folder=ROOT / "runs" / "study" / name,
        results=ROOT / "experiments" / "results" / name,
    )


def main():
    args = parse_arguments()
    for name in ("steps", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give a number above 0")
    study = new_study(args)

    if args.run is None:
        run_all(study, args.jobs)
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    if args.run == BASELINES:
        measure_baselines(study)
    elif args.run in study.runs():
        train_and_measure(study.runs()[args.run], study)
    else:
        raise UserError(f"--run {args.run}: there is no such run in experiments/configurations.py")


if __name__ == "__main__":
    exit_on_user_error(main)
