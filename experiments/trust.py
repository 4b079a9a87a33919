"""Kill runs and damage files, with real processes: python experiments/trust.py

Runs of the built-in model are killed with SIGKILL at random moments and resumed until they are done. Each
must end bit for bit as a run that was left alone: weights, AdamW's moments and the loss of every step.

Damaged inputs are given to the programs. Each must end with exit code 2 and one line that names the input.

All of it takes about a quarter of an hour on two cores. The exit code is 1 if anything was otherwise.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import FILE_NAME, STEP_FOLDER, read_checkpoint
from experiments.damages import (
    WHOLE_CACHE,
    WHOLE_RUN,
    Damage,
    all_damages,
    train_command,
    write_inputs,
)
from files import UserError, cache_folder, exit_on_user_error

RUN = ["train.py", "--steps", "40", "--eval-every", "20", "--eval-sequences", "4"]


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
    alone = folder / "alone"
    run_whole(first_command(alone))

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
    """Start and resume a run until it is done, and kill it one to four times. Returns the number of kills."""
    rng = random.Random(seed)
    planned = rng.randint(1, 4)
    kills = 0
    while True:
        process = start(next_command(run))
        seconds = rng.uniform(0.5, 12) if kills < planned else None
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
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
    rows = []
    for line in (run / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({key: row.get(key) for key in ("step", "loss", "grad_norm", "held_out")})
    return rows


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


# ---- Both ------------------------------------------------------------------------------------------------


def parse_arguments(damages: int):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="How many runs are killed. Default: 50.")
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
    if args.kills < 0 or args.damages < 0:
        raise UserError("--kills and --damages must be 0 or more")
    if args.damages < len(damages):
        damages = random.Random(0).sample(damages, args.damages)
    cache_folder().mkdir(parents=True, exist_ok=True)

    good = True
    with tempfile.TemporaryDirectory() as folder:
        if args.kills and not check_kills(Path(folder), args.kills):
            good = False
        if damages and not check_damages(Path(folder), damages):
            good = False
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
