"""Tasks of lm-evaluation-harness for a run, its full model and its cut model:

    pip install lm-eval==0.4.13
    python experiments/benchmark.py runs/NAME --tasks lambada_openai,hellaswag,arc_easy,piqa

prints the scores of the three models with their standard errors, and writes them to runs/NAME/benchmark.json.
The data of lm_eval's own tasks comes from the Hub. Your own tasks, with local files, come from --include:
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/new_task_guide.md
"""

import importlib.util
import math
import sys
from difflib import get_close_matches
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)

import torch

from evaluate import open_run_and_baselines, run_parser
from qwen import load_tokenizer
from support.fast import keep_freed_memory
from support.files import UserError, one_line, run_program, write_json
from support.machine import pick_device, pick_dtype
from support.options import number
from support.run import read_run

BOOTSTRAP_SAMPLES = 1000  # for the standard errors of perplexities; lm_eval's 100,000 take minutes
FEWSHOT_SEED = 1234  # of the examples in a prompt; lm_eval's own


def main(argv=None):
    parser = run_parser("Measure the full, the cut and the looped model of a run on tasks of lm_eval.")
    many = 10**9
    option = parser.add_argument
    option("--tasks", required=True, help="Names of tasks, with commas between them.")
    option("--include", type=Path, help="A folder with tasks of your own, as YAML files.")
    option("--limit", type=number(1, many), help="The number of questions of each task. [all]")
    option("--batch-size", type=number(1, many), default=16, help="Continuations scored at once. [16]")
    option("--max-length", type=number(1, many), default=2048, help="The most tokens that are read. [2048]")
    option("--out", type=Path, help="The JSON file. [benchmark.json in the folder of the run]")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the tasks are those of lm-evaluation-harness: pip install lm-eval==0.4.13")
    if options.include is not None and not options.include.is_dir():
        raise UserError(f"--include {options.include}: no such folder; name one with YAML files of tasks")

    keep_freed_memory()
    device = pick_device(options.device)
    checkpoint = read_run(options.run)
    dtype = pick_dtype(checkpoint[1].get("options", {}).get("dtype", "auto"), device)
    looped, full, cut = open_run_and_baselines(options.run, options.model, dtype, device, checkpoint)
    if looped.settings["pool"] == "sequence":
        raise UserError(
            f"{options.run}: was trained with --pool sequence, which sees the answers; give another run"
        )
    tokenizer = load_tokenizer(full.source)
    tasks = load_tasks([name.strip() for name in options.tasks.split(",")], options.include)

    from experiments.harness import HarnessModel  # it needs lm_eval

    depth = looped.checked_depth(options.depth)
    path = options.out or (Path(options.run) if Path(options.run).is_dir() else Path()) / "benchmark.json"
    about = {"run": options.run, "depth": depth, "limit": options.limit, "max_length": options.max_length}
    scores = {}
    for name, model in {"full": full, "cut": cut, "looped": looped}.items():
        print(f"\nthe {name} model", flush=True)
        model_depth = {"depth": depth} if name == "looped" else {}
        model = HarnessModel(model, tokenizer, options.max_length, options.batch_size, **model_depth)
        scores[name] = measure(model, tasks, options.limit)
        write_json(path, {**about, "scores": scores})  # each time: the next model may take hours, and fail
    print_scores(scores)
    print(f"\nwritten to {path}")


# ---- Tasks -----------------------------------------------------------------------------------------------
#
# lm_eval is imported inside the functions, after main has seen that it is there.


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
        return manager.load(names)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"--tasks {','.join(names)}: cannot be loaded ({one_line(error)}); tasks whose data is on this "
            "machine can be given with --include"
        ) from error


def measure(model, tasks: dict, limit=None) -> dict:
    """{task: {metric: (value, standard error)}}, with None where there is no finite number.

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

    def finite(value):
        is_number = value is not None and not isinstance(value, str) and math.isfinite(value)
        return float(value) if is_number else None

    scores = {}
    for name, row in results["results"].items():
        scores[name] = {}
        for key, value in row.items():
            metric, comma, of_filter = key.partition(",")  # "acc,none" and "acc_stderr,none", for example
            if comma and not metric.endswith("_stderr"):
                stderr = row.get(f"{metric}_stderr,{of_filter}")
                scores[name][key.removesuffix(",none")] = (finite(value), finite(stderr))
    return scores


def print_scores(scores: dict):
    """One table for each task, with a row for each model. scores: {model: what measure() returns}"""
    for task, metrics in scores["full"].items():
        print(f"\n{task}\n{'':16}" + "".join(f"{metric:>24}" for metric in metrics))
        for model in scores:
            cells = [f"{cell(*scores[model][task][metric]):>24}" for metric in metrics]
            print(f"{model:16}{''.join(cells)}")


def cell(value: float | None, stderr: float | None) -> str:
    """A score with its standard error, or without one where there is none."""
    if value is None:
        return "not finite"
    return f"{value:,.3f}" if stderr is None else f"{value:,.3f} ± {stderr:,.3f}"


if __name__ == "__main__":
    # lm_eval has tasks that import another package of the name `evaluate`; here it must find that one
    sys.path.remove(ROOT)
    sys.path.append(ROOT)
    del sys.modules["evaluate"]
    run_program(main)
