"""The options of train.py and their defaults: one table, with a column for each kind of machine and model."""

import argparse
from pathlib import Path

from support.files import UserError, check_number, full_name
from support.machine import gpu_memory, multiplies_bfloat16, pick_device, pick_dtype, process_number
from support.run import read_run

# ---- Defaults --------------------------------------------------------------------------------------------

# What a kind of machine and model takes. The last column is the paper's recipe, at 1,000 of its 18,750 steps.
DEFAULTS = {
    #                  tiny     another model on a CPU    CUDA
    "steps": (600, 60, 1000),
    "seq_len": (256, 256, 2048),
    "batch_size": (4, 4, 2),
    "accumulation": (1, 1, 16),
    "lr": (2e-3, 1e-3, 3e-4),
    "warmup": (20, 6, 50),  # steps; no option
    "norm_lr_scale": (50.0, 50.0, 1.0),  # the step norm's rate, in units of lr; no option
    "eval_every": (200, 12, 200),
    "eval_sequences": (128, 32, 32),
}
# The same everywhere.
COMMON = dict(
    depth=8,
    rank=32,
    modulation="controller",
    pool="prefix",
    gate=True,
    step_norm=True,
    target_offset=1,
    patch=False,
    distill=0.0,
    seam_tokens=12_288,  # on which --patch fits its seams; no option
    repeats=0.0,  # the share of the training sequences that repeat a passage; no option
    seed=0,
    device="auto",
    dtype="auto",
    compile="auto",
    save_every=100,
    threads=None,  # on the CPU; a trial decides it when a run begins, and the run keeps it; no option
)
PATCH = dict(depth=1, modulation="none", gate=False, step_norm=False, repeats=0.5)

PAPER_MODEL = "Qwen/Qwen2.5-3B"
SMALL_MODEL = "Qwen/Qwen2.5-0.5B"


def default_model(device) -> str:
    """The model that a device can train: the paper's needs 12 GB of GPU memory and native bfloat16."""
    if device.type != "cuda":
        return "tiny"
    if gpu_memory(device) >= 12e9 and multiplies_bfloat16(device):
        return PAPER_MODEL
    if process_number() == 0:
        print(f"{SMALL_MODEL} is the default here: {PAPER_MODEL} takes a GPU of 12 GB with native bfloat16")
    return SMALL_MODEL


def defaults_for(given: dict, device) -> dict:
    """{option: its default} for a new run. given: {option: value}, where None is what is not given."""
    on_cuda = device.type == "cuda"
    model = given["model"] or default_model(device)
    column = 2 if on_cuda else 1
    if model == "tiny":
        column = 0
    defaults = dict(COMMON, model=model, data="fineweb-edu" if on_cuda else "python")
    for name, values in DEFAULTS.items():
        defaults[name] = values[column]
    if given["patch"]:
        defaults.update(PATCH)
        defaults["lr"] *= 3
        # The full model predicts the next token, and takes half of the time of a step.
        if given["target_offset"] != 2:
            defaults.update(distill=0.5, steps=defaults["steps"] // 2)
    return defaults


# ---- The command line ------------------------------------------------------------------------------------


def number(low, high):
    """A function from text to a number in this range, for argparse. It is whole where `low` is an int."""

    def parse(text: str):
        value = type(low)(text)
        try:
            check_number("the value", value, low, high)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    parse.__name__ = "whole number" if isinstance(low, int) else "number"
    return parse


def build_parser() -> argparse.ArgumentParser:
    """The command line of train.py. What is not given is None."""
    parser = argparse.ArgumentParser(
        description="Train the looped model of arXiv 2604.02051. Defaults are in brackets; where there are "
        "three, they are for tiny, for another model on a CPU, and for CUDA.",
        usage=argparse.SUPPRESS,
    )

    def option(group, name: str, sentence: str, **details):
        """Add an option whose help is the sentence and the defaults."""
        key = name.removeprefix("--").replace("-", "_")
        if key in DEFAULTS:
            sentence += " [" + ", ".join(f"{value:,}" for value in DEFAULTS[key]) + "]"
        elif key in COMMON and COMMON[key] is not False:
            sentence += f" [{COMMON[key]}]"
        group.add_argument(name, help=sentence, **details)

    group = parser.add_argument_group("what is trained")
    many = 10**9
    option(group, "--depth", "The number of steps of the loop.", type=number(1, 64))
    option(group, "--rank", "The rank of the SVD LoRA.", type=number(1, 10**6))
    option(
        group,
        "--modulation",
        "What gives the diagonals: the Controller, a table that is the same for every input, or nothing.",
        choices=("controller", "static", "none"),
    )
    option(
        group,
        "--pool",
        "The mean state that the Controller sees: of the prefix, or of the whole sequence, as published.",
        choices=("prefix", "sequence"),
    )
    group.add_argument("--no-gate", help="Remove the gate.", dest="gate", action="store_const", const=False)
    group.add_argument(
        "--no-step-norm", help="Remove the step norm.", dest="step_norm", action="store_const", const=False
    )
    option(
        group,
        "--target-offset",
        "How many tokens ahead the target lies. 2 is the published target.",
        type=int,
        choices=(1, 2),
    )
    option(
        group,
        "--cut",
        "The layers that are kept: how many at the start, which one is looped, counted from 0, and how many "
        "at the end. [8/36 of all layers, the middle one, 8/36; with --patch fewer at the start]",
        type=number(1, 1000),
        nargs=3,
        metavar=("PRELUDE", "RECURRENT", "CODA"),
    )
    group.add_argument(
        "--patch",
        help="Go past the paper (patch.py): matrices at the seams, fitted to the full model, and adapters. "
        "Unless they are given: depth 1, no modulation, 3 times the lr, half of the steps, --distill 0.5. "
        "Half of the training sequences repeat a passage.",
        action="store_const",
        const=True,
    )
    option(
        group,
        "--distill",
        "What is trained to: 0 is the next token of the text, 1 the full model's prediction, and a number "
        "between them a mixture.",
        type=number(0.0, 1.0),
    )

    group = parser.add_argument_group("on what")
    option(
        group,
        "--model",
        "The folder or Hub name of a Qwen2.5 or Llama checkpoint, or tiny. [tiny; on CUDA Qwen/Qwen2.5-3B]",
    )
    option(
        group,
        "--data",
        "A .txt or .jsonl, also with .gz, a folder of them, fineweb-edu, or python, the Python source code "
        "of this machine. [python; on CUDA fineweb-edu]",
    )
    option(group, "--seed", "Decides the first weights and the order of the text.", type=number(0, 2**32 - 1))

    group = parser.add_argument_group("how")
    option(group, "--steps", "The number of optimizer steps.", type=number(0, many))
    option(group, "--seq-len", "The tokens of a sequence.", type=number(2, 10**6))
    option(group, "--batch-size", "The sequences of a forward pass.", type=number(1, 10**6))
    option(group, "--accumulation", "The forward passes of an optimizer step.", type=number(1, 10**6))
    option(group, "--lr", "The learning rate, from which a cosine goes to zero.", type=number(1e-12, 1e9))

    group = parser.add_argument_group("where, and how often")
    option(group, "--device", "cuda, mps or cpu; auto is the first of these that there is.")
    option(
        group,
        "--dtype",
        "The type of the frozen weights; auto is bfloat16 where the hardware multiplies it.",
        choices=("auto", "float32", "bfloat16"),
    )
    option(
        group,
        "--compile",
        "Whether torch.compile makes the layers faster; auto compiles on CUDA.",
        choices=("auto", "on", "off"),
    )
    option(group, "--out", "The folder of the run, which must be new or empty. [runs/MODEL-TEXT]", type=Path)
    option(group, "--eval-every", "The steps between two held-out losses.", type=number(1, many))
    option(group, "--eval-sequences", "The sequences of an evaluation.", type=number(1, many))
    option(group, "--save-every", "The steps between two checkpoints.", type=number(1, many))
    group.add_argument(
        "--resume",
        help="Continue a run with its own options. --steps, --lr, --model, --data and what concerns the "
        "machine may change. RUN/step-N, or a run on the Hub, begins a new run from that checkpoint.",
        metavar="RUN",
    )
    return parser


# What may change when a run is resumed. All else would make it another run.
MAY_CHANGE = {
    *("model", "data"),  # where they lie now; both are recognised by their content
    *("device", "compile", "out", "resume"),
    *("steps", "lr", "batch_size", "accumulation", "eval_every", "eval_sequences", "save_every"),
}


def parse_options(argv: list[str] | None = None, **values):
    """(options, checkpoint) for a command line. checkpoint: what --resume has read, None for a new run.

    values: those of options, also of options that the command line does not have, such as warmup. Raises
    UserError, or exits with code 2 as argparse does, for options that make no sense.
    """
    given = vars(build_parser().parse_args(argv))
    given.update(values)
    for name in ("model", "data"):
        if given[name] not in (None, "python", "fineweb-edu"):
            given[name] = full_name(given[name])  # it holds in any current folder
    if given["resume"] is None:
        checkpoint = None
        options = defaults_for(given, pick_device(given["device"] or "auto"))
    else:
        checkpoint = read_run(given["resume"])
        options = saved_options(given, checkpoint)
    for name, value in given.items():
        if value is not None:
            options[name] = value
        options.setdefault(name, None)
    if options["dtype"] == "auto":  # a run keeps its type wherever it goes on
        dtype = pick_dtype("auto", pick_device(options["device"]))
        options["dtype"] = str(dtype).removeprefix("torch.")
    check_together(options, checkpoint)
    return argparse.Namespace(**options), checkpoint


def saved_options(given: dict, checkpoint) -> dict:
    """The options of a saved run. Raises UserError where the command line gives one that cannot change."""
    _, about = checkpoint
    if "options" not in about:
        raise UserError(f"{given['resume']}: was not saved by train.py, so it has no training to continue")
    saved = about["options"]
    for name, value in given.items():
        if value is not None and name not in MAY_CHANGE and value != saved.get(name):
            option = {"gate": "no-gate", "step_norm": "no-step-norm"}.get(name, name.replace("_", "-"))
            raise UserError(
                f"--{option} cannot change: {given['resume']} began with {saved.get(name)}; leave it out"
            )
    return {**COMMON, **saved}  # a run of an earlier version lacks what came later


def check_together(options: dict, checkpoint):
    """Raise UserError for options that do not fit each other or the run that is resumed."""
    if options["distill"] > 0 and options["target_offset"] == 2:
        raise UserError("--distill: the full model predicts the next token, so --target-offset must be 1")
    if checkpoint is not None:
        _, about = checkpoint
        saved = about["options"]
        sequences = saved["batch_size"] * saved["accumulation"]
        if options["batch_size"] * options["accumulation"] != sequences:
            raise UserError(
                f"--batch-size times --accumulation must stay {sequences}, the sequences of a step"
            )
        if options["steps"] < about["step"]:
            raise UserError(f"--steps {options['steps']}: {about['step']} are done; give that many or more")
