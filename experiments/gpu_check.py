"""Check the program on a GPU, in about ten minutes and without a network: python experiments/gpu_check.py

Each row of the table is a check of gpu_correct.py or gpu_speed.py, and runs in a process of its own. A row
that fails is named, and the next one goes on. The table is printed as it grows, and written to
gpu-check/gpu_check.md. All numbers are in gpu_check.json beside it, and what a row has printed is in a log
there. The exit code is 1 if a row failed or had no time to begin.

The models are tiny, and random weights in the shapes of Qwen2.5-0.5B and, where the GPU has room for it, of
Qwen2.5-3B. Rows that compare with transformers are left out where it is not installed. Without a GPU,
--device cpu --small runs all rows that need none on tiny.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import threads  # noqa: F401 (it has to come before torch)

# isort: split

import torch

from device import pick_device
from experiments import gpu_correct, gpu_speed
from experiments.contestants import (
    COMPILED,
    COMPILED_DISTILLED,
    COMPILED_PATCH,
    COMPILED_RECOMPUTED,
    COMPILED_STATIC,
    OBVIOUS,
    OURS,
    RECOMPUTED,
    STATIC,
)
from experiments.gpu_setting import FAILED, NOT_RUN, Line, Setting
from experiments.gpu_speed import step_name, summary
from files import UserError, exit_on_user_error, replace_file, write_json
from run_folder import claim_new_folder

COLUMNS = ("check", "result", "verdict")
ROW_SECONDS = 400  # a row that takes longer is ended
SECONDS_TO_END = 30  # that its programs get to end themselves


def main():
    args = parse_arguments()
    # SIGTERM ends the program as Ctrl-C does: by an exception, after which a row ends what it has begun.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    device = pick_device(args.device)
    if device.type != "cuda" and not args.small:
        raise UserError(f"{device}: only a CUDA GPU runs the large models; add --small")
    setting = Setting(device, args.small)
    if args.row is not None:
        run_row(args.row, setting, args.out)
        return

    names = chosen_rows(args.rows, setting)
    out = claim_new_folder(args.out, "gpu-check")
    started = time.monotonic()
    print(machine_name(device), flush=True)
    print_row(COLUMNS)
    print_row(["---"] * len(COLUMNS))
    results = {}  # {row: its result}
    late = []  # the rows that had no time
    for name in names:
        if time.monotonic() - started > 60 * args.minutes:
            result = no_result(f"not begun: the {args.minutes:g} minutes were over", NOT_RUN)
            late.append(name)
        else:
            result = result_of(name, setting, out)
        results[name] = result
        print_lines(name, result["lines"])
        write_results(results, device, out)
    if args.rows is None:
        in_sum = [vars(line) for line in summary(results, setting)]
        results["in sum"] = {"lines": in_sum, "numbers": {}}
        print_lines("in sum", in_sum)
        write_results(results, device, out)

    minutes = (time.monotonic() - started) / 60
    print(f"\n{minutes:.1f} minutes; the table and the logs are in {out}")
    failed = [name for name, result in results.items() if has_failed(result)]
    if late:
        print(f"not run for lack of time, which --minutes gives: {'; '.join(late)}")
    if failed:
        print(f"failed: {'; '.join(failed)}")
    if failed or late:
        sys.exit(1)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--device", default="auto", help="cuda, cuda:1, or cpu with --small. Default: the GPU.")
    option("--small", action="store_true", help="Only tiny, with short sequences and few steps.")
    option("--minutes", type=float, default=10, help="No row begins after so many minutes. Default: 10.")
    option(
        "--out",
        type=Path,
        default=Path("gpu-check"),
        help="The empty folder for the table, the numbers and the logs. Default: gpu-check.",
    )
    option("--rows", nargs="+", metavar="ROW", help="Only the rows with these names. Default: all.")
    option("--row", help=argparse.SUPPRESS)  # run this row only, and write its result: a process of main
    args = parser.parse_args()
    if not args.minutes >= 0:
        raise UserError(f"--minutes {args.minutes}: give a number from 0")
    return args


# ---- The rows --------------------------------------------------------------------------------------------


def rows_of(setting: Setting) -> dict:
    """{name: row}, in the order in which they run: what matters most comes first."""
    largest = setting.largest
    rows = {
        "precision": partial(gpu_correct.precision, setting, False),
        "generation with a cache": partial(gpu_correct.cached_generation, setting),
        "compilation": partial(gpu_correct.compilation, setting),
        "waiting for the GPU": partial(gpu_correct.waits_of_a_step, setting),
        "out of memory": partial(gpu_correct.out_of_memory, setting),
        "torchrun": partial(gpu_correct.one_process_under_torchrun, setting),
        "bases": partial(gpu_correct.bases, setting),
        "matrix product": partial(gpu_speed.matrix_product, setting),
    }
    for kind in (OBVIOUS, OURS, COMPILED, COMPILED_RECOMPUTED):
        rows[step_name(largest, kind)] = partial(gpu_speed.training_step, setting, largest, kind)
    rows["a run that is killed"] = partial(gpu_correct.killed_run, setting)
    for batch_size in (1, 8):
        name = f"generation, batch of {batch_size}"
        rows[name] = partial(gpu_speed.generation_speed, setting, batch_size)
    for kind in (COMPILED_PATCH, COMPILED_DISTILLED, COMPILED_STATIC, RECOMPUTED, STATIC):
        rows[step_name(largest, kind)] = partial(gpu_speed.training_step, setting, largest, kind)
    rows["where the time goes"] = partial(gpu_speed.profile, setting)
    rows["precision, compiled"] = partial(gpu_correct.precision, setting, True)
    rows["cuDNN's attention"] = partial(gpu_speed.step_with_cudnn, setting)
    for model in setting.models[:-1]:
        for kind in (OURS, COMPILED):
            rows[step_name(model, kind)] = partial(gpu_speed.training_step, setting, model, kind)

    if not setting.on_cuda:
        need_cuda = ["waiting for the GPU", "out of memory", "where the time goes", "cuDNN's attention"]
        # Each row that compiles takes a minute on a CPU: that of COMPILED is enough.
        need_cuda.append("precision, compiled")
        for kind in (COMPILED_RECOMPUTED, COMPILED_PATCH, COMPILED_DISTILLED, COMPILED_STATIC):
            need_cuda.append(step_name(largest, kind))
        rows.update(dict.fromkeys(need_cuda, needs_a_gpu))
    return rows


def needs_a_gpu():
    return [Line("", "needs a CUDA GPU", NOT_RUN)], {}


def chosen_rows(chosen: list[str] | None, setting: Setting) -> list[str]:
    """The names of the rows that run. Raises UserError for a name that is none."""
    names = list(rows_of(setting))
    for name in chosen or []:
        if name not in names:
            choices = "; ".join(names)
            raise UserError(f"--rows {name!r}: no such row; there are: {choices}")
    return chosen or names


# ---- A row -----------------------------------------------------------------------------------------------


def run_row(name: str, setting: Setting, out: Path):
    """Run one row in this process, and write its result, a file of its own in `out`."""
    try:
        lines, numbers = rows_of(setting)[name]()
    except torch.OutOfMemoryError as error:
        print(error)
        verdict = FAILED if setting.is_large else NOT_RUN
        lines = [Line("", "needs more memory than this GPU has", verdict)]
        numbers = {}
    write_json(result_file(name, out), {"lines": [vars(line) for line in lines], "numbers": numbers})


def result_of(name: str, setting: Setting, out: Path) -> dict:
    """The result of a row that runs in a process of its own: {"lines": [...], "numbers": {...}}."""
    command = [sys.executable, __file__, "--row", name, "--device", str(setting.device), "--out", str(out)]
    if setting.small:
        command.append("--small")
    log = result_file(name, out).with_suffix(".log")
    with open(log, "w") as output:
        # a session of its own, so that the programs that the row has started end with it
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(ROW_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
            end(process)
        except BaseException:  # Ctrl-C ends the row too
            end(process)
            raise

    if code is None:
        return no_result(f"not done after {ROW_SECONDS} seconds; see {log}")
    if code != 0:
        last_line = log.read_text(errors="replace").strip().splitlines()[-1:]
        return no_result(f"{''.join(last_line)[:200]}; see {log}")
    path = result_file(name, out)
    result = json.loads(path.read_text())
    path.unlink()
    return result


def result_file(name: str, out: Path) -> Path:
    """Where a row writes its result."""
    words = "".join(letter if letter.isalnum() else " " for letter in name).split()
    return out / f"{'-'.join(words)}.json"


def end(process: subprocess.Popen):
    """End a row and all that it has started. torchrun passes SIGTERM on to processes that we do not know."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def no_result(reason: str, verdict=FAILED) -> dict:
    """The result of a row that gave none."""
    return {"lines": [vars(Line("", reason, verdict))], "numbers": {}}


def has_failed(result: dict) -> bool:
    return any(line["verdict"] == FAILED for line in result["lines"])


def write_results(results: dict, device, out: Path):
    """Write the table and the numbers so far."""
    write_json(out / "gpu_check.json", {"machine": machine(device), "rows": results})
    text = table(device, results)
    replace_file(out / "gpu_check.md", lambda part: part.write_text(text, encoding="utf-8"))


# ---- The table -------------------------------------------------------------------------------------------


def machine(device) -> dict:
    """The machine and its software."""
    description = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["device"] = properties.name
        description["memory"] = f"{properties.total_memory / 1e9:.1f} GB"
        description["compute capability"] = f"{properties.major}.{properties.minor}"
        description["cuda"] = torch.version.cuda
    else:
        description["device"] = f"{device}, {os.cpu_count()} cores"
    return description


def machine_name(device) -> str:
    return ", ".join(f"{name}: {value}" for name, value in machine(device).items())


def cells_of(name: str, lines: list[dict]) -> list[list[str]]:
    """The rows of the table, for the lines of a row: those of COLUMNS."""
    rows = []
    for line in lines:
        what = f"{name}: {line['what']}" if line["what"] else name
        rows.append([what, line["result"], line["verdict"]])
    return rows


def print_lines(name: str, lines: list[dict]):
    for cells in cells_of(name, lines):
        print_row(cells)


def row_text(cells) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def print_row(cells):
    print(row_text(cells), flush=True)


def table(device, results: dict) -> str:
    """The whole table in Markdown."""
    text = [machine_name(device), "", row_text(COLUMNS), row_text(["---"] * len(COLUMNS))]
    for name, result in results.items():
        text += [row_text(cells) for cells in cells_of(name, result["lines"])]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    exit_on_user_error(main)
