"""Run the paper's experiments: python experiments/paper.py

The program trains every configuration of experiments/runs.py on the built-in model, two at a time. That
takes an hour and a half on two cores. An interrupted program continues where it was stopped. The results are
written to experiments/paper/tiny: a JSON file for each run with its options, its losses and the loss of every
step, then tables.md and the pictures.

With --model FOLDER --data FOLDER, the program trains the central configurations on another model. That takes
two and a half hours for a model of 135M parameters.

Losses are in nats per token. Each table has the held-out text of the training distribution ("held-out") and a
text of another kind ("other"). For Python source code, the other text is the READMEs of packages.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Batches
from device import pick_device, pick_dtype
from evaluate import EVALUATION_SEED, evaluate_columns
from experiments.measure import distance_from_start, future_leak, look_inside, losses_by_depth
from experiments.runs import Run, all_runs
from fast import keep_freed_memory
from files import UserError, cache_folder, exit_on_user_error, read_json, replace_file, write_json
from hub import load_tokenizer
from options import parse_options
from ouroboros import Ouroboros
from patch import Patched
from qwen import Qwen
from run_folder import FILE_NAME, STEP_FOLDER, read_log
from sources import open_source
from train import check_same_text, loop_settings, train

BASELINES = "baselines"  # the name under which the full and the cut model are evaluated

# Packages whose READMEs are English prose that every machine with this program has.
README_PACKAGES = (
    "torch",
    "numpy",
    "matplotlib",
    "pillow",
    "sympy",
    "mpmath",
    "networkx",
    "tqdm",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "pytest",
)


@dataclass
class Study:
    """All runs on one model and its texts, and where they are."""

    model: str
    data: str
    other: str  # a text of another kind, as for --data
    steps: int  # of most runs
    dtype: str
    run_folder: Path  # the runs' checkpoints
    results: Path  # the JSON files, the tables and the pictures

    @property
    def central(self) -> bool:
        """Whether only the central configurations are trained."""
        return self.model != "tiny"

    @property
    def identity(self) -> list:
        """What a folder of results is of."""
        return [Path(self.data).name, Path(self.other).name, self.steps]

    def runs(self) -> dict[str, Run]:
        return all_runs(self.central, self.steps)

    def result_file(self, name: str) -> Path:
        return self.results / f"{name.replace(' ', '-')}.json"

    def train_options(self) -> list[str]:
        """The options of train.py that all runs and the baselines share.

        The runs with --patch start from the cut model and learn from the text alone.
        """
        options = ["--model", self.model, "--data", self.data, "--dtype", self.dtype, "--device", "cpu"]
        return [*options, "--seam-tokens", "0", "--distill", "0"]


# ---- Texts -----------------------------------------------------------------------------------------------


def readme_folder() -> str:
    """A folder with the READMEs of README_PACKAGES, where all of them are held out."""
    text = "\n<|endoftext|>\n".join(metadata(name).get_payload() for name in README_PACKAGES)
    digest = hashlib.sha1(text.encode()).hexdigest()[:8]
    folder = cache_folder() / f"readmes-{digest}"
    for name in ("train.txt", "val.txt"):
        if not (folder / name).exists():
            replace_file(folder / name, lambda part: part.write_text(text))
    return str(folder)


def evaluation_texts(study: Study, options) -> dict[str, Batches]:
    """The texts on which every model is evaluated."""
    tokenizer = load_tokenizer(options.model)
    home = open_source(options.data)
    other = open_source(study.other)

    def batches(source, split: str, offset=1) -> Batches:
        return Batches(source, split, tokenizer, options.seq_len, offset, EVALUATION_SEED)

    return {
        "train": batches(home, "train"),
        "held-out": batches(home, "val"),
        "other": batches(other, "val"),
        "held-out t+2": batches(home, "val", offset=2),
    }


# ---- One run ---------------------------------------------------------------------------------------------


def train_and_measure(run: Run, study: Study):
    """Train a run, or continue with it, and write its JSON file.

    Raises UserError if a signal stops the training, which is saved then.
    """
    # ---- Options
    folder = study.run_folder / run.file_name
    is_new = not any(folder.glob(f"{STEP_FOLDER}/{FILE_NAME}"))
    arguments = study.train_options()
    arguments += ["--steps", str(study.steps), "--eval-every", str(max(1, study.steps // 10))]
    arguments += ["--save-every", "50", *run.options]
    arguments += ["--out" if is_new else "--resume", str(folder)]
    options, checkpoint = parse_options(arguments)
    keep_freed_memory()
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    torch.manual_seed(options.seed)

    # ---- Model and text
    if is_new:
        qwen = Qwen.from_pretrained(options.model, dtype, device)
        model = new_model(run, qwen, options)
        del qwen  # and with it the layers that were cut out
    else:
        model = run.model_class.load(folder, None, dtype, device, checkpoint)
    texts = evaluation_texts(study, options)
    training = Batches(
        open_source(options.data),
        "train",
        texts["train"].tokenizer,
        options.seq_len,
        options.target_offset,
        options.seed,
    )
    if is_new:
        options.text_hash = training.text_hash()
    else:
        check_same_text(options, training)

    # ---- Training
    if train(model, training, texts["held-out"], options, device, checkpoint):
        raise UserError(f"{run.name}: was stopped, and saved; the same command continues it")

    # ---- Results
    tokens_per_step = options.batch_size * options.accumulation * options.seq_len
    result = {
        "name": run.name,
        "parameters": sum(p.numel() for p in model.trained_parameters().values()),
        "options": run.options,
        "tokens": options.steps * tokens_per_step,
        "loss": evaluate_columns(model.loss, texts, options, device),
    }
    result.update(more_measurements(run, model, texts, options, device))
    result["log"] = short_log(folder)
    write_json(study.result_file(run.name), result, indent=None)


def new_model(run: Run, qwen: Qwen, options) -> Ouroboros:
    """The untrained model of a run, by train.py's options and the settings of its class."""
    settings = dict(loop_settings(options, qwen.config), gate=options.gate, step_norm=options.step_norm)
    if issubclass(run.model_class, Patched):
        settings["train_coda"] = options.train_coda
    return run.model_class(qwen, **run.own_settings, **settings)


def more_measurements(run: Run, model: Ouroboros, texts: dict[str, Batches], options, device) -> dict:
    """What only some of the runs are measured by."""
    more = {}
    held_out_and_other = {"held-out": texts["held-out"], "other": texts["other"]}
    if re.fullmatch(r"(depth\d+ (controller|none)|drawn depth) seed0", run.name):
        more["depths"] = losses_by_depth(model, held_out_and_other, options, device)

    if options.pool == "sequence" and options.modulation == "controller":
        own_task = "held-out" if options.target_offset == 1 else "held-out t+2"
        more.update(future_leak(model, texts[own_task], options, device))

    if run.name == "depth8 controller seed0":
        more["inside"] = look_inside(model, held_out_and_other, device)

    moved = distance_from_start(model, options.depth)
    if moved:
        more["moved"] = moved
    return more


def short_log(run_folder: Path) -> list[list]:
    """[step, training loss, held-out loss] of every step.

    The training loss is None for a step without a finite loss and gradient. The held-out loss is 0 where it
    was not measured.
    """
    rows = []
    for row in read_log(run_folder):
        loss = row["loss"]
        if loss is not None:
            loss = round(loss, 4)
        rows.append([row["step"], loss, round(row.get("held_out", 0), 4)])
    return rows


# ---- The baselines ---------------------------------------------------------------------------------------


def measure_baselines(study: Study):
    """Write the losses of the full and of the cut model on every text."""
    options, _ = parse_options(study.train_options())
    device = pick_device(options.device)
    qwen = Qwen.from_pretrained(options.model, pick_dtype(options.dtype, device), device)
    texts = evaluation_texts(study, options)

    model = Ouroboros(qwen, modulation="none")
    result = {
        "of": study.identity,
        "full": evaluate_columns(qwen.loss, texts, options, device),
        "cut": evaluate_columns(model.cut.loss, texts, options, device),
    }
    write_json(study.result_file(BASELINES), result, indent=None)


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

    names = list(study.runs())
    slow_names = [name for name in names if "depth16" in name]
    names = [name for name in names if name not in slow_names] + slow_names
    with ThreadPoolExecutor(jobs) as pool:
        succeeded = list(pool.map(lambda name: has_result(name, study), names))

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
        run_folder=ROOT / "runs" / "paper" / name,
        results=ROOT / "experiments" / "paper" / name,
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
        raise UserError(f"--run {args.run}: there is no such run in experiments/runs.py")


if __name__ == "__main__":
    exit_on_user_error(main)
