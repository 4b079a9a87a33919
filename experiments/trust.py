"""Kill runs, start them twice and damage files, with real processes: python experiments/trust.py

Runs of the built-in model are ended at random moments with SIGKILL, as when memory runs out, or with SIGHUP,
as when a terminal closes, and resumed until they are done. Each must end bit for bit as a run that was left
alone: weights, AdamW's moments and the loss of every step.

Two trainers are started on one folder at once. One must end with exit code 2 and one line that says so, and
the other as if it were alone.

Damaged inputs are given to the programs. Each must end with exit code 2 and one line that names the input.

The exit code is 1 if anything was otherwise.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import read_checkpoint
from experiments.damages import (
    WHOLE_CACHE,
    WHOLE_RUN,
    Damage,
    all_damages,
    train_command,
    write_inputs,
)
from files import UserError, cache_folder, exit_on_user_error
from run_folder import FILE_NAME, STEP_FOLDER, read_log

RUN = ["train.py", "--steps", "40", "--eval-every", "20", "--eval-sequences", "4"]
ALONE = "alone"  # the folder of the run with which the others are compared


def start(command: list, cache: Path | None = None) -> subprocess.Popen:
    """Start a program of this repository on one thread of the CPU. cache: another cache folder."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_whole(command: list, cache: Path | None = None):
    """Run a program to its end. Raises RuntimeError if it fails."""
    process = start(command, cache)
    _, errors = process.communicate()
    check_success(process, errors)


def check_success(process: subprocess.Popen, errors: str):
    if process.returncode != 0:
        raise RuntimeError(f"{process.args} ended with exit code {process.returncode}: {errors}")


# ---- Kills -----------------------------------------------------------------------------------------------


def check_kills(folder: Path, count: int) -> bool:
    """Whether so many runs that are killed end as the run that is left alone."""
    alone = folder / ALONE

    def kills_and_sameness(i: int) -> tuple[int, bool]:
        run = folder / f"killed-{i}"
        kills = run_with_kills(run, seed=i)
        same = ends_are_equal(alone, run)
        print(f"run {i}: {kills} kills, {'the same' if same else 'DIFFERENT'}", flush=True)
        return kills, same

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(kills_and_sameness, range(count)))
    kills = sum(kills for kills, _ in outcomes)
    same = sum(same for _, same in outcomes)
    print(f"\n{same} of {count} runs end bit for bit as the run left alone, after {kills} kills in all\n")
    return same == count


def run_with_kills(run: Path, seed: int) -> int:
    """Start and resume a run until it is done, and end it one to four times. Returns how often."""
    rng = random.Random(seed)
    planned = rng.randint(1, 4)
    kills = 0
    while True:
        process = start(next_command(run))
        seconds = rng.uniform(0.5, 12) if kills < planned else None
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(rng.choice((signal.SIGKILL, signal.SIGHUP)))
            process.communicate()
            kills += 1
        else:
            check_success(process, errors)
            return kills


def first_command(run: Path) -> list:
    return [*RUN, "--save-every", "1", "--out", run]


def next_command(run: Path) -> list:
    """The command that starts a run or, if it has a checkpoint, resumes it."""
    if any(run.glob(f"{STEP_FOLDER}/{FILE_NAME}")):
        return ["train.py", "--resume", run]
    return first_command(run)


def ends_are_equal(run: Path, other: Path) -> bool:
    """Whether two runs have ended alike to the bit: every tensor, the step, and the losses of each step."""
    tensors, about = read_checkpoint(run)
    other_tensors, other_about = read_checkpoint(other)
    if about["step"] != other_about["step"] or logged_losses(run) != logged_losses(other):
        return False
    if tensors.keys() != other_tensors.keys():
        return False
    return all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


def logged_losses(run: Path) -> list[dict]:
    """The rows of log.jsonl without the rates and the times."""
    keys = ("step", "loss", "grad_norm", "held_out", "held_out_at_start")
    rows = []
    for row in read_log(run):
        rows.append({key: row.get(key) for key in keys})
    return rows


# ---- Pairs -----------------------------------------------------------------------------------------------


def check_pairs(folder: Path, count: int) -> bool:
    """Whether of two trainers on one folder one is refused and the other ends as the run left alone."""
    good = 0
    for i in range(count):
        run = folder / f"pair-{i}"
        command = first_command(run)
        if i % 2 == 1:  # every second pair resumes a run
            shutil.copytree(folder / ALONE, run)
            earlier, _ = sorted(run.glob(STEP_FOLDER))
            command = ["train.py", "--resume", earlier]
        pair_is_good = one_is_refused(command) and ends_are_equal(folder / ALONE, run)
        print(f"pair {i}: {'one is refused, the other ends well' if pair_is_good else 'WRONG'}", flush=True)
        good += pair_is_good
    print(f"\n{good} of {count} pairs of trainers on one folder: one is refused, and nothing is lost\n")
    return good == count


def one_is_refused(command: list) -> bool:
    """Whether of two programs that are started together one succeeds and the other says one line."""
    processes = [start(command), start(command)]
    errors = {}
    for process in processes:
        _, text = process.communicate()
        errors[process.returncode] = text
    if errors.keys() != {0, 2}:
        print(errors)
        return False
    return errors[2].count("\n") == 1 and "another program is training in it" in errors[2]


# ---- Damages ---------------------------------------------------------------------------------------------


def check_damages(folder: Path, damages: list[Damage]) -> bool:
    """Whether each damaged input ends with exit code 2 and one line that names it."""
    run_whole([*RUN, "--save-every", "20", "--out", folder / WHOLE_RUN])
    write_inputs(folder)
    run_whole(train_command(folder, out=folder / "first"), cache=folder / WHOLE_CACHE)

    def is_answered(damage: Damage) -> bool:
        place = folder / damage.name
        place.mkdir()
        answered = check_damage(damage, place)
        shutil.rmtree(place, ignore_errors=True)
        return answered

    with ThreadPoolExecutor(2) as pool:
        answered = sum(pool.map(is_answered, damages))
    print(f"{answered} of {len(damages)} damaged inputs end with exit code 2 and one line that names them")
    return answered == len(damages)


def check_damage(damage: Damage, place: Path) -> bool:
    """Whether a program answers a damaged input as it should. What it said instead is printed."""
    command, word = damage.make(place, random.Random(damage.seed))
    process = start(command, cache=place if damage.is_of_cache else None)
    _, errors = process.communicate()

    lines = errors.strip().splitlines() or [""]
    names_it = "error: " in lines[-1] and word in lines[-1]
    if process.returncode == 2 and names_it and "Traceback" not in errors:
        return True
    print(f"{damage.name}: exit code {process.returncode}, without {word!r}: {lines[-1]}", flush=True)
    return False


# ---- All of it -------------------------------------------------------------------------------------------


def parse_arguments(damages: int):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="How many runs are killed. Default: 50.")
    parser.add_argument("--pairs", type=int, default=20, help="How many runs are started twice. Default: 20.")
    parser.add_argument(
        "--damages",
        type=int,
        default=damages,
        help=f"How many inputs are damaged, a random choice of {damages}. Default: all of them.",
    )
    return parser.parse_args()


def main():
    damages = all_damages()
    args = parse_arguments(len(damages))
    if min(args.kills, args.pairs, args.damages) < 0:
        raise UserError("--kills, --pairs and --damages must be 0 or more")
    if args.damages < len(damages):
        damages = random.Random(0).sample(damages, args.damages)
    cache_folder().mkdir(parents=True, exist_ok=True)

    good = True
    with tempfile.TemporaryDirectory() as folder:
        if args.kills or args.pairs:
            run_whole(first_command(Path(folder) / ALONE))
        if args.kills and not check_kills(Path(folder), args.kills):
            good = False
        if args.pairs and not check_pairs(Path(folder), args.pairs):
            good = False
        if damages and not check_damages(Path(folder), damages):
            good = False
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
