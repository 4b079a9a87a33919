"""Tasks of lm-evaluation-harness for a run, its full model and its cut model:

    pip install lm-eval==0.4.13
    python experiments/benchmark.py runs/NAME --tasks lambada_openai,hellaswag,arc_easy,piqa

prints the scores of the three models with their standard errors, and writes them to runs/NAME/benchmark.json.
The data of lm_eval's own tasks comes from the Hub. Your own tasks, with local files, come from --include:
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/new_task_guide.md
"""

import argparse
import importlib.metadata
import importlib.util
import math
import sys
from difflib import get_close_matches
from pathlib import Path

# At the end, so that tasks that import the package `evaluate` do not get this repository's evaluate.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import threads  # noqa: F401 (it has to come before torch)

# isort: split

import torch

from device import pick_device, pick_dtype
from fast import keep_freed_memory
from files import UserError, exit_on_user_error, write_json
from hub import load_tokenizer
from patch import full_model_of, load_run
from run_folder import output_path

LM_EVAL = "lm-eval==0.4.13"
BOOTSTRAP_SAMPLES = 1000  # for the standard errors of perplexities; lm_eval's 100,000 take minutes
FEWSHOT_SEED = 1234  # of the examples in a prompt; lm_eval's own


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    option = parser.add_argument
    option("run", help="The folder that train.py wrote, such as runs/NAME, or a Hub repository with a run.")
    option("--tasks", required=True, help="Names of tasks, with commas between them.")
    option("--include", help="A folder with tasks of your own, as YAML files.")
    option("--limit", type=int, help="The number of questions of each task. Default: all.")
    option("--depth", type=int, help="Steps of the loop. Default: as trained.")
    option("--model", help="Where the base model is now, if it was moved: a folder or a Hub name.")
    option("--device", default="auto", help="cuda, mps or cpu. Default: the first of these that is there.")
    option(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="The number type of the weights. Default: bfloat16 where the hardware multiplies it.",
    )
    option("--batch-size", type=int, default=16, help="Continuations that are scored at once. Default: 16.")
    option(
        "--max-length",
        type=int,
        default=2048,
        help="The most tokens that a model reads. Longer contexts lose their beginning. Default: 2048.",
    )
    option("--out", type=Path, help="The JSON file. Default: benchmark.json in the folder of the run.")
    return parser.parse_args()


def check_options(options):
    """Raise UserError for what can be seen to be wrong before anything is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"the tasks are those of lm-evaluation-harness: pip install {LM_EVAL}")
    for name in ("limit", "depth", "batch_size", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a whole number from 1 on")
    if options.include is not None and not Path(options.include).is_dir():
        raise UserError(f"--include {options.include}: no such folder; name one with YAML files of tasks")
    if options.out is not None and options.out.is_dir():
        raise UserError(f"--out {options.out}: is a folder; give the name of a file in it")


# ---- Tasks -----------------------------------------------------------------------------------------------
#
# lm_eval is imported inside the functions, after check_options has seen that it is there.


def load_tasks(names: list[str], folder=None) -> dict:
    """lm_eval's tasks of these names, with their data. A group or a tag stands for its tasks.

    folder: where tasks of one's own are. Raises UserError for a name that is not known and for data that
    cannot be had.
    """
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # reads 14,000 files, which takes half a minute
    for name in names:
        if name not in manager.all_tasks:
            similar = get_close_matches(name, manager.all_tasks) or ["lambada_openai", "hellaswag"]
            raise UserError(f"--tasks {name}: no such task; there are for example {', '.join(similar)}")

    try:
        tasks = manager.load(names)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, DatasetsError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"--tasks {','.join(names)}: cannot be loaded ({reason}); tasks whose data is on this machine "
            "can be given with --include"
        ) from error

    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"--tasks {name}: runs code from the model or shows pictures; leave it out")
    return tasks


def measure(model, tasks: dict, limit=None) -> dict:
    """{task: {metric: {"value": number, "stderr": number or None}}}

    model: a HarnessModel. tasks: from load_tasks. All models that are measured get the same prompts.
    """
    from lm_eval.evaluator import evaluate

    torch.manual_seed(0)  # for tasks whose texts are drawn
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    results = evaluate(
        lm=model, task_dict=tasks, limit=limit, bootstrap_iters=BOOTSTRAP_SAMPLES, log_samples=False
    )

    scores = {}
    for name, row in results["results"].items():
        scores[name] = {}
        for key, value in row.items():
            metric, comma, of_filter = key.partition(",")  # "acc,none" and "acc_stderr,none", for example
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = row.get(f"{metric}_stderr,{of_filter}")
            if of_filter != "none":
                metric = f"{metric} ({of_filter})"
            scores[name][metric] = {"value": finite(value), "stderr": finite(stderr)}
    return scores


def finite(value) -> float | None:
    """A number for JSON. None for what is none: lm_eval's "N/A", nan and infinity."""
    if isinstance(value, str) or value is None or not math.isfinite(value):
        return None
    return float(value)


# ---- The table -------------------------------------------------------------------------------------------


def cell(score: dict) -> str:
    """A score with its standard error, or without one where there is none."""
    value = score["value"]
    stderr = score["stderr"]
    if value is None:
        return "not finite"
    form = ".3f" if abs(value) < 10_000 else ".2e"
    if stderr is None:
        return f"{value:{form}}"
    return f"{value:{form}} ± {stderr:{form}}"


def print_table(scores: dict):
    """One table for each task, with a row for each model. scores: {model: what measure() returns}"""
    tasks = next(iter(scores.values()))
    for task, metrics in tasks.items():
        columns = [f"{metric:>24}" for metric in metrics]
        print(f"\n{task}\n{'':16}{''.join(columns)}")
        for model in scores:
            cells = [f"{cell(scores[model][task][metric]):>24}" for metric in metrics]
            print(f"{model:16}{''.join(cells)}")


# ---- The program -----------------------------------------------------------------------------------------


def main():
    options = parse_options()
    check_options(options)
    keep_freed_memory()
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    looped = load_run(options.run, options.model, dtype, device)
    depth = looped.checked_depth(options.depth)
    if looped.settings["pool"] == "sequence":
        raise UserError(
            f"{options.run}: was trained with --pool sequence, which sees the answers; give a run with "
            "--pool prefix"
        )
    full = full_model_of(looped)
    tokenizer = load_tokenizer(full.source, full.config.vocab_size)
    names = [name.strip() for name in options.tasks.split(",")]
    tasks = load_tasks(names, options.include)

    from experiments.harness import HarnessModel

    models = {"full": (full, {}), "cut": (looped.cut, {}), "looped": (looped, {"depth": depth})}
    path = options.out or output_path(options.run, "benchmark.json")
    about = {
        "run": str(options.run),
        "model": full.source,
        "depth": depth,
        "limit": options.limit,
        "max length": options.max_length,
        "computed in": [device.type, str(dtype)],
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    scores = {}
    for name, (model, model_options) in models.items():
        print(f"\nthe {name} model", flush=True)
        model = HarnessModel(model, tokenizer, options.max_length, options.batch_size, **model_options)
        scores[name] = measure(model, tasks, options.limit)
        write_json(path, {**about, "scores": scores})  # each time: the next model may take hours, and fail
    print_table(scores)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    exit_on_user_error(main, "try a smaller --batch-size or --max-length, or a machine with more memory")
