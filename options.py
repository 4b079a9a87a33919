"""The options of train.py: what each does, its default for the model and the device, the paper's value."""

import argparse
import os
import sys
from pathlib import Path

from checkpoint import is_on_hub, read_checkpoint
from device import gpu_of, pick_device
from evaluate import EVALUATION_SEED
from files import UserError
from hub import BUILT_IN
from ouroboros import POOLS
from presets import PAPER_MODEL, SMALL_MODEL, default_options, fitting_warmup
from processes import RANK
from run_folder import FILE_NAME, STEP_FOLDER, claim, holds_checkpoint, no_such_run, run_name
from sources import BUILT_IN_SOURCES

# What may change when a run is resumed. All else would make it another run.
MAY_CHANGE = {
    "resume",
    "eval",
    "model",  # where it lies now; load_model recognises it by its content,
    "data",  # and train.py recognises the text by its tokens
    "device",
    "compile",
    "activation_checkpointing",
    "steps",
    "lr",
    "batch_size",
    "accumulation",
    "eval_every",
    "eval_sequences",
    "save_every",
}

# ---- The options -----------------------------------------------------------------------------------------


def build_parser(defaults: dict) -> argparse.ArgumentParser:
    """The parser of train.py's command line with these defaults, which --help shows."""
    parser = argparse.ArgumentParser(
        description="Train the looped model of arXiv 2604.02051. The defaults below are those for "
        f"--model {defaults.get('model')} on this machine.",
        usage=argparse.SUPPRESS,
    )

    def option(group, name, sentence, default=None, paper=None, **details):
        """Add an option whose help is the sentence, the default and the paper's value."""
        value = defaults.get(name.removeprefix("--").replace("-", "_"))
        if value is not None:
            default = f"{value:,}" if isinstance(value, int) else f"{value}"
        if default is not None:
            sentence += f" Default: {default}."
        if paper is not None:
            sentence += f" Paper: {paper}."
        group.add_argument(name, help=sentence.replace("%", "%%"), **details)

    def switch(group, name, sentence, **details):
        """Add an option without a value."""
        group.add_argument(name, help=sentence, **details)

    model = parser.add_argument_group("what is trained")
    option(model, "--depth", "The number of steps of the loop.", paper="1, 4, 8 and 16", type=int)
    option(model, "--rank", "The rank of the SVD LoRA.", paper="32", type=int)
    option(
        model,
        "--modulation",
        "What gives the diagonals of the SVD LoRA: the Controller, a table that is the same for every input "
        "(static), or nothing (none).",
        paper="controller, with static as its baseline",
        choices=("controller", "static", "none"),
    )
    option(
        model,
        "--pool",
        "The mean state that the Controller sees: of the prefix, or of the whole sequence with its future.",
        paper="sequence",
        choices=POOLS,
    )
    switch(
        model, "--no-gate", "Remove the gate, so that h_new replaces h.", dest="gate", action="store_false"
    )
    switch(
        model,
        "--no-step-norm",
        "Remove the RMSNorm of each step.",
        dest="step_norm",
        action="store_false",
    )
    switch(
        model,
        "--patch",
        "Go past the paper (patch.py): train a matrix at each seam of the cut, and an opening of the loop "
        "instead of gate and step norm. This changes the defaults of --depth, --modulation, --train-coda, "
        "--prelude, --recurrent, --coda, --lr, --seam-tokens and --distill.",
        action="store_true",
    )
    option(
        model,
        "--train-coda",
        "What is trained of the kept layers (patch.py): nothing, the norms of the coda, these and a LoRA "
        "on the coda (lora), or norms and a LoRA on every kept layer (all).",
        paper="none",
        choices=("none", "norms", "lora", "all"),
    )
    option(
        model,
        "--prelude",
        "The number of layers kept at the start.",
        default="8/36 of all layers; with --patch, 1/10",
        paper="8 of 36",
        type=int,
    )
    option(
        model,
        "--recurrent",
        "The number of the looped layer, counted from 0.",
        default="half of the number of layers; with --patch, 4/10",
        paper="18 of 36",
        type=int,
    )
    option(
        model,
        "--coda",
        "The number of layers kept at the end.",
        default="8/36 of all layers; with --patch, so many that as many layers are kept",
        paper="8 of 36",
        type=int,
    )

    task = parser.add_argument_group("on what it is trained")
    option(
        task,
        "--model",
        "The folder or Hub name of a Qwen2.5 or Llama checkpoint, or tiny, which comes with this program.",
        paper="Qwen/Qwen2.5-3B",
    )
    option(
        task,
        "--data",
        "The text: a .txt, .jsonl or .jsonl.gz file, a folder of them, fineweb-edu (from the Hub), or python "
        "(the Python source code on this machine).",
        paper="fineweb-edu",
    )
    option(
        task,
        "--target-offset",
        "How many tokens ahead the target lies: 1 is the next token, 2 the token after it.",
        paper="2",
        type=int,
        choices=(1, 2),
    )

    recipe = parser.add_argument_group("how it is trained")
    option(
        recipe,
        "--seam-tokens",
        "With --patch: from how many tokens of training text the matrices at the seams are fitted to the "
        "full model's states, before the training. 0 starts as the cut model.",
        paper="0",
        type=int,
    )
    option(
        recipe,
        "--distill",
        "What is trained to: 0 is the next token of the text, 1 the full model's prediction, and a number "
        "between them a mixture. Above 0, the full model stays in memory.",
        paper="0",
        type=float,
    )
    option(recipe, "--steps", "The number of optimizer steps.", paper="18,750", type=int)
    option(recipe, "--seq-len", "The number of tokens in a sequence.", paper="2,048", type=int)
    option(recipe, "--batch-size", "The number of sequences in one forward pass.", paper="2", type=int)
    option(
        recipe,
        "--accumulation",
        "The number of forward passes whose gradients make one optimizer step.",
        paper="16",
        type=int,
    )
    option(
        recipe,
        "--lr",
        "The learning rate after the warm-up; a cosine then takes it to zero.",
        paper="3e-4",
        type=float,
    )
    option(
        recipe,
        "--norm-lr-scale",
        "The learning rate of the step norm as a multiple of --lr. The step norm starts at 1, while the "
        "state is often several times larger, and AdamW moves a weight by at most the rate in a step.",
        paper="1",
        type=float,
    )
    option(
        recipe,
        "--warmup",
        "The number of steps over which the learning rate rises, at most half of all steps.",
        type=int,
    )
    option(recipe, "--seed", "Decides the first weights and the order of the text.", type=int)

    machine = parser.add_argument_group("where, and how often")
    option(
        machine,
        "--device",
        "The device: cuda, mps or cpu. auto is the first of these that this machine has.",
    )
    option(
        machine,
        "--dtype",
        "The number type of the frozen weights. auto is bfloat16 where the hardware multiplies it natively.",
        paper="bfloat16",
        choices=("auto", "float32", "bfloat16"),
    )
    option(
        machine,
        "--compile",
        "Whether torch.compile makes the layers faster. auto compiles on CUDA.",
        choices=("auto", "on", "off"),
    )
    switch(
        machine,
        "--activation-checkpointing",
        "Compute activations again in the backward pass instead of keeping them: less memory, more time. "
        "Default: auto. That is on where a training step would not fit into a CUDA GPU otherwise.",
        action=argparse.BooleanOptionalAction,
    )
    option(
        machine,
        "--name",
        "The name of the run. It is kept in runs/NAME, with a number after it if that is taken.",
        default="model, text and every option that differs from its default",
    )
    option(machine, "--out", "The folder of the run, which must be empty.", default="runs/NAME", type=Path)
    option(machine, "--eval-every", "The number of steps between two held-out losses.", type=int)
    option(machine, "--eval-sequences", "The number of sequences in each evaluation.", type=int)
    option(machine, "--save-every", "The number of steps between two checkpoints.", type=int)

    instead = parser.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    instead.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="Continue a run that was stopped, with its own options. --steps, --lr, the intervals and what "
        "concerns the machine may change. --model and --data say where the same model and text lie now.",
    )
    instead.add_argument(
        "--eval",
        type=Path,
        metavar="RUN",
        help="Only evaluate a run, of a folder or of the Hub, on its own text or on the text of --data, at "
        "its own or at another --depth.",
    )
    parser.set_defaults(**defaults)
    return parser


# ---- Their defaults --------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None):
    """(options, checkpoint) for a command line, by default the program's own; checkpoint is None for a
    new run.

    Raises UserError, or exits with code 2 as argparse does, for options that make no sense.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    without_help = [argument for argument in arguments if argument not in ("-h", "--help")]
    given = build_parser({}).parse_args(without_help)  # None for what is not given

    if given.resume or given.eval:
        return resumed_run_options(arguments, given)
    return new_run_options(arguments, given), None


def new_run_options(arguments: list[str], given) -> argparse.Namespace:
    """The options of a new run, where the defaults suit the model and the device."""
    gpu = gpu_of(pick_device(given.device or "auto"))
    parser = build_parser(default_options(vars(given), gpu))
    options = parser.parse_args(arguments)
    check_numbers(options)
    check_past_the_paper(options)
    make_paths_absolute(options)
    check_name(options)
    if options.name is None:
        defaults = vars(parser.parse_args([]))
        options.name = run_name(vars(options), defaults)
    options.warmup = fitting_warmup(options.warmup, options.steps)
    if given.model is None and options.model == SMALL_MODEL and RANK == 0:
        print(
            f"{SMALL_MODEL} is the default on this GPU ({gpu}), because {PAPER_MODEL} asks for 12 GB of "
            f"memory and native bfloat16; --model {PAPER_MODEL} takes it even so"
        )
    return options


def resumed_run_options(arguments: list[str], given):
    """(options, checkpoint) of a saved run: its own options, and what the command line changes."""
    folder = given.resume or given.eval
    on_hub = is_on_hub(folder)
    if given.resume and on_hub:
        copy = f"runs/{folder.name}"
        raise UserError(
            f"{folder}: no such folder, and a run on the Hub cannot go on there; fetch it with "
            f"hf download {folder} {FILE_NAME} --local-dir {copy}, then --resume {copy}"
        )
    if not on_hub and not holds_checkpoint(folder):
        raise no_such_run(folder)
    run = folder.parent if folder.match(STEP_FOLDER) else folder  # RUN/step-0000100 is a checkpoint of RUN
    if given.resume and RANK == 0:
        claim(run)
    checkpoint = read_checkpoint(folder)
    _, about = checkpoint
    if "options" not in about:
        raise UserError(
            f"{folder}: was not saved by train.py, so it has no training to continue and no text to evaluate "
            "on; give the folder of a run of train.py"
        )

    older = dict(seam_tokens=0, distill=0.0)  # of a run from before these options
    saved = dict(older, **about["options"])
    saved.update(out=run, name=None)
    check_places(saved, given)
    options = build_parser(saved).parse_args(arguments)
    check_numbers(options)
    check_past_the_paper(options)
    make_paths_absolute(options)
    check_unchanged(saved, options)

    step = about["step"]
    if options.steps < step:
        raise UserError(f"--steps {options.steps}: {run} has done {step} steps already; give {step} or more")
    sequences = saved["batch_size"] * saved["accumulation"]
    if options.resume and options.batch_size * options.accumulation != sequences:
        raise UserError(
            f"--batch-size {options.batch_size} and --accumulation {options.accumulation}: a step of {run} "
            f"has {sequences} sequences; give two numbers whose product is {sequences}"
        )
    return options, checkpoint


# ---- What is refused -------------------------------------------------------------------------------------


def check_places(saved: dict, given):
    """Raise UserError if the pretrained model or the text of a run was moved, and it is not said where to."""
    for name, content in (("model", "pretrained model"), ("data", "text")):
        place = saved[name]
        was_a_path = os.path.isabs(place)  # and not a built-in name or a name of the Hub
        if getattr(given, name) is None and was_a_path and not os.path.exists(place):
            raise UserError(
                f"{place}: the {content} of {saved['out']} is not there any more; add --{name} and where "
                "it lies now"
            )


def check_unchanged(saved: dict, options):
    """Raise UserError if an option differs from the saved one that cannot change in a resumed run."""
    may_change = set(MAY_CHANGE)
    if options.eval:
        may_change.add("depth")  # any depth can be evaluated
    for name, value in vars(options).items():
        if name not in may_change and value != saved[name]:
            option = name.replace("_", "-")
            began = f"began with {saved[name]}"
            if value is False:
                option = f"no-{option}"  # --no-gate and --no-step-norm
            if isinstance(value, bool):
                began = "began without it"
            if saved[name] is None:
                began = "began with the default"
            raise UserError(f"--{option} cannot change: {saved['out']} {began}; leave it out")


def check_numbers(options):
    """Raise UserError for a number that is not above zero (some may be zero) or is too large."""
    may_be_zero = {"seed", "seam_tokens", "distill"}
    if options.seam_tokens > 0:
        may_be_zero.add("steps")  # the fitted seams alone are a result
    for name, value in vars(options).items():
        if type(value) not in (int, float):  # in Python, True is an int too
            continue
        zero_allowed = name in may_be_zero
        if not (0 < value < EVALUATION_SEED or (zero_allowed and value == 0)):
            smallest = "from 0" if zero_allowed else "above 0"
            raise UserError(
                f"--{name.replace('_', '-')} {value}: give a number {smallest} and below {EVALUATION_SEED:,}"
            )


def check_past_the_paper(options):
    """Raise UserError for values of --seam-tokens and --distill that make no sense."""
    if options.seam_tokens > 0 and not options.patch:
        raise UserError("--seam-tokens fits the matrices at the seams, which there are only with --patch")
    if options.distill > 1:
        raise UserError(f"--distill {options.distill}: give a number from 0 to 1")
    if options.distill > 0 and options.target_offset == 2:
        raise UserError("--distill: the full model predicts the next token, so --target-offset must be 1")


def check_name(options):
    """Raise UserError for a --name that is no name of a folder in runs/, or that --out makes useless."""
    name = options.name
    if name is None:
        return
    if options.out is not None:
        raise UserError("--name NAME is short for --out runs/NAME; give one of the two")
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--name {name!r}: give the name of a folder in runs/, or --out with a path")


def make_paths_absolute(options):
    """Let --model and --data be found again from any current folder."""
    if options.model not in BUILT_IN and Path(options.model).exists():
        options.model = str(Path(options.model).resolve())
    if options.data not in BUILT_IN_SOURCES and Path(options.data).exists():
        options.data = os.path.abspath(options.data)  # a link keeps its own name, which has the suffix
