"""A run's folder: its name, its checkpoints, the claim that lets only one program write in it, its log."""

import atexit
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from files import WRITE_ERRORS, UserError, explaining, read_json, replace_file

if sys.platform != "win32":
    import fcntl

RUNS = Path("runs")
LOG = "log.jsonl"
RESULTS = "results.json"
OPTIONS = "args.json"
STEP_FOLDER = "step-" + 7 * "[0-9]"  # a pattern for glob
FILE_NAME = "ouroboros.safetensors"  # in the folder of a checkpoint

# ---- The name --------------------------------------------------------------------------------------------

# Options that say where a run is, or how it is computed and reported, and not what is trained.
NOT_IN_NAME = {
    "model",
    "data",
    "name",
    "out",
    "resume",
    "eval",
    "device",
    "compile",
    "activation_checkpointing",
    "eval_every",
    "eval_sequences",
    "save_every",
    "text_hash",
}


def run_name(options: dict, defaults: dict) -> str:
    """The name of a new run: model, text, and each option that differs from its default.

    For example tiny-python, or tiny-python-depth4-no-gate-seed1.
    """
    parts = [Path(options["model"]).name, Path(options["data"]).name.split(".")[0]]
    for option, value in differing_options(options, defaults):
        parts.append(option + value)
    name = "-".join(parts)
    return re.sub(r"[^\w.+-]+", "_", name)[:120]  # a file system takes 255 bytes


def differing_options(options: dict, defaults: dict) -> list[tuple[str, str]]:
    """The options that make a run another one than the default, each with its value.

    They are as on the command line: ("depth", "4") and, for an option without a value, ("no-gate", "").
    """
    differing = []
    for option, value in options.items():
        if option in NOT_IN_NAME or value is None or value == defaults.get(option):
            continue
        label = option.replace("_", "-")
        if value is True:
            differing.append((label, ""))
        elif value is False:
            differing.append((f"no-{label}", ""))
        else:
            differing.append((label, str(value)))
    return differing


# ---- Its checkpoints -------------------------------------------------------------------------------------


def step_folder(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint after so many steps."""
    return run / f"step-{step:07}"


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of a checkpoint or of a run."""
    is_step = folder.match(STEP_FOLDER) and folder.is_dir()
    return is_step or (folder / FILE_NAME).exists() or any(folder.glob(STEP_FOLDER))


def output_path(run, name: str) -> Path:
    """Where a program that reads a run writes the file `name`: into the run's folder.

    run: the folder of a run or of one of its checkpoints. For a run of the Hub, the file lies here.
    """
    folder = Path(run)
    if not folder.is_dir():
        return Path(name)
    if folder.match(STEP_FOLDER):  # a checkpoint of the run, which a later one may replace
        folder = folder.parent
    return folder / name


def no_such_run(folder) -> UserError:
    """The error for a folder without a checkpoint. It lists the runs in the folder or beside it."""
    folder = Path(folder)
    place = folder if folder.is_dir() else folder.parent
    runs = []
    if place.is_dir():
        for path in sorted(place.iterdir()):
            if holds_checkpoint(path):
                runs.append(path.name)
    if not runs:
        return UserError(f"{folder}: no such run, and none in {place}; give a folder that train.py wrote")
    shown = ", ".join(runs[:20]) + (" ..." if len(runs) > 20 else "")
    return UserError(f"{folder}: no such run; the runs in {place} are: {shown}")


# ---- The claim -------------------------------------------------------------------------------------------

claims = {}  # folder -> file descriptor, of what this program holds; the system ends a claim with the program


def claim_new_folder(out: Path | None, name: str) -> Path:
    """The empty folder for a new run, which no other program can claim until this one ends.

    out: the folder to take; None for the first of runs/NAME, runs/NAME-2, runs/NAME-3 and so on that is
    free. Raises UserError if `out` holds files, is in use or cannot be made.
    """
    if out is not None:
        folder = out
        make_folder(folder)
        claim(folder)
        if holds_files(folder):
            raise UserError(
                f"{folder}: is there already, and nothing saved is overwritten; choose another --out"
            )
    else:
        folder = first_free_folder(name)
    atexit.register(remove_if_empty, folder)
    return folder


def first_free_folder(name: str) -> Path:
    """Make and claim the first of runs/NAME, runs/NAME-2 and so on that holds no files and is not in use."""
    number = 1
    while True:
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        make_folder(folder)
        # Once more after the claim: another program may have filled it and ended in between.
        if not holds_files(folder) and try_to_claim(folder) and not holds_files(folder):
            return folder
        number += 1


def remove_if_empty(folder: Path):
    """Remove the folder of a run that was refused before it saved anything, and runs/ if it is empty too."""
    with suppress(OSError):  # it holds files, or it is gone
        folder.rmdir()
        RUNS.rmdir()


def make_folder(folder: Path):
    """Make a folder and its parents, if they are not there."""
    with explaining(folder, "made", "choose another --out", WRITE_ERRORS):
        folder.mkdir(parents=True, exist_ok=True)


def claim(folder: Path):
    """Hold a folder for this program alone until it ends. Raises UserError if another program holds it."""
    if folder not in claims and not try_to_claim(folder):
        raise UserError(
            f"{folder}: another program is training in it; wait until it ends, or choose another --out"
        )


def try_to_claim(folder: Path) -> bool:
    """Whether the folder could be claimed.

    The lock is on the folder itself, so no file is left behind. Windows has no such lock.
    """
    if sys.platform == "win32":
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        print(f"{folder}: this file system has no locks; let no other program write there", file=sys.stderr)
    claims[folder] = descriptor
    return True


def holds_files(folder: Path) -> bool:
    """Whether there are files in a folder, half-written ones left out."""
    return any(path.is_file() and ".part" not in path.suffixes for path in folder.rglob("*"))


# ---- The log: a line of JSON for each step ---------------------------------------------------------------


def read_log(run: Path) -> list[dict]:
    """The rows of a run's log. Raises UserError if there is none, or if it is damaged."""
    log = run / LOG
    with explaining(log, "read as a line of JSON for each step", "mend the file or delete it"):
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["step"], row["loss"]  # KeyError or TypeError where it is no row
        return rows


def cut_log(run: Path, steps: int):
    """Keep the rows of the first `steps` steps.

    A killed run may have logged steps after its last checkpoint.
    """
    log = run / LOG
    lines = []
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[:steps]
    replace_file(log, lambda part: part.write_text("".join(lines), encoding="utf-8"))


def append_row(run: Path, row: dict):
    """Add the row of a step."""
    line = json.dumps(row, allow_nan=False) + "\n"
    log = run / LOG
    advice = "make room or bring its folder back"
    with explaining(log, "written", advice, WRITE_ERRORS), open(log, "a", encoding="utf-8") as file:
        file.write(line)


def is_bad(row: dict) -> bool:
    """Whether the loss of a step, or the held-out loss after it, was not finite. The log has null for it."""
    return row["loss"] is None or row.get("held_out", 0.0) is None


# ---- Its options and its results -------------------------------------------------------------------------


def read_options(run: Path) -> dict:
    """The options of a run. Raises UserError if it has none, or if the file is damaged."""
    path = run / OPTIONS
    advice = "give a folder that train.py wrote"
    with explaining(path, "read as the options of a run", advice):
        options = read_json(path, advice)
        options["model"], options["data"], options["steps"]  # KeyError where these are no options
        return options


def read_results(run: Path, steps_done: int) -> dict | None:
    """{model: {column: the loss of each sequence}} of a run that has ended after so many steps.

    None if it has not ended, or goes on after an end. Raises UserError for a damaged file.
    """
    path = run / RESULTS
    if not path.exists() or steps_done != read_options(run)["steps"]:
        return None
    results = {}
    advice = "python train.py --resume RUN writes it again"
    with explaining(path, "read as losses", advice):
        saved = read_json(path, advice)
        for name in ("full", "cut", "ouroboros"):
            results[name] = {}
            for column in saved[name]:
                losses = saved[name][column]
                if not isinstance(losses, list):  # older runs have the mean
                    losses = [losses]
                results[name][column] = losses
            results[name]["held-out"]  # KeyError where it is no file of results
    return results
