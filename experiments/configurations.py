"""The list of the runs that experiments/paper.py trains: their names, options and model classes.

Most names begin with the depth of the loop. Words in them:
    rate x30      the static table has 30 times the common learning rate
    lr third      a third of the preset's learning rate for all parameters; lr three: three times that rate
    zero input    the Controller sees zeros; other inputs: one mean vector, a window, the token, the sequence
    sized norm    the step norm starts at the size of the state and has the common learning rate
    norm rate 1   the step norm starts at 1 and has the common learning rate
    released      trained as the released code does it, all at once
    long          several times as many steps as the others (times_steps)
    patch         with --patch
"""

from dataclasses import dataclass, field

from experiments.alternatives import AdaptedFull, Alternative, LowRank, PaperCut, Seams, StepAdapters
from experiments.variants import (
    DrawnDepth,
    GateStart,
    MeanInput,
    OwnBases,
    RandomBases,
    Released,
    SizedStepNorm,
    TokenInput,
    WindowInput,
    ZeroInput,
)
from ouroboros import Ouroboros
from patch import Patched
from presets import PRESETS

TABLE_RATES = (10, 30, 100, 300)  # of the static table, in common learning rates
PUBLISHED_OBJECTIVE = ("--target-offset", "2", "--pool", "sequence")
ALTERNATIVES = ("matrix", "lora", "lora one")  # the kinds of Alternative

# What a run is measured by beside its losses (paper.py).
TASKS = "tasks"  # the tasks of tasks.py
SWAP = "swap"  # the losses with another text's pool
BY_DEPTH = "depths"  # the losses at other depths than its own
OBJECTIVE = "objective"  # the losses on training text and on the token t+2, and the released test
HALTING = "halting"  # what a token loses that leaves the loop early
CURVE = "curve"  # the held-out loss during the training


@dataclass(frozen=True)
class Run:
    """One training run.

    name: ends with the seed, as in "depth8 controller seed0". options: those of train.py's command line.
    own_settings: the arguments of the class for which train.py has no options. optimizer: those of
    optimizer_of. measures: what it is measured by beside its losses. times_steps: its number of steps as a
    multiple of that of most runs; with 0 a patch is only fitted in closed form.
    """

    name: str
    options: list[str]
    model_class: type[Ouroboros]
    own_settings: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    measures: tuple = ()
    times_steps: int = 1

    @property
    def file_name(self) -> str:
        """The name of the run's folder and, with .json, of its results."""
        return self.name.replace(" ", "-")


class RunList:
    """The runs so far, and the model's default learning rate."""

    def __init__(self, preset: str):
        self.runs = {}  # name -> Run
        self.lr = PRESETS[preset]["lr"]

    def add(
        self,
        name: str,
        *options: str,
        seeds=1,
        model_class=None,
        optimizer=None,
        measures=(),
        first_measures=(),
        times_steps=1,
        **own_settings,
    ):
        """Add a run for each of so many seeds, by default of the class that train.py would choose.

        first_measures: what only the run of the first seed is measured by.
        """
        if model_class is None:
            model_class = Patched if "--patch" in options else Ouroboros
        for seed in range(seeds):
            run = Run(
                f"{name} seed{seed}",
                [*options, "--seed", str(seed)],
                model_class,
                own_settings,
                optimizer or {},
                (*measures, *first_measures) if seed == 0 else measures,
                times_steps,
            )
            self.runs[run.name] = run

    def at_rate(self, multiple: float) -> list[str]:
        """The options of a run at so many times the preset's learning rate."""
        return ["--lr", str(multiple * self.lr)]


def at_depth(depth: int) -> list[str]:
    return ["--depth", str(depth)]


# ---- All runs --------------------------------------------------------------------------------------------


def all_runs(central: bool) -> dict[str, Run]:
    """name -> Run, in the order in which the runs are trained: first what decides most.

    central: only what is worth its time on a larger model.
    """
    runs = RunList("cpu" if central else "tiny")
    if central:
        add_central_runs(runs)
    else:
        add_tiny_runs(runs)
    return runs.runs


def add_tiny_runs(runs: RunList):
    """The runs on the built-in model. They take about an hour on two cores."""
    add_controller_against_static(runs, 1, seeds=3, best_rates=(30, 100))
    add_wider_pools(runs, 1)
    add_norms(runs, 1, seeds=3)
    runs.add("depth1 sized norm by channel", *sized_norm(1), model_class=SizedStepNorm, size="channel")
    add_controller_against_static(runs, 8, seeds=2, best_rates=(30, 100))
    runs.add("depth4 controller", *at_depth(4), first_measures=(BY_DEPTH,))
    add_patches(runs, seeds=3)
    add_adapted_full_model(runs, seeds=1)
    add_norms(runs, 8, seeds=1)
    add_loops(runs, (4, 8), seeds=1)
    runs.add("drawn depth", *at_depth(8), model_class=DrawnDepth, measures=(BY_DEPTH, HALTING))
    add_released(runs, seeds=1)
    runs.add("depth8 published objective", *at_depth(8), *PUBLISHED_OBJECTIVE, measures=(OBJECTIVE,))
    for depth in (1, 8):
        add_bases(runs, depth, seeds=1)
    add_ablations(runs, 8, seeds=1)
    add_ranks(runs, 8)
    add_rates(runs, 8)
    for bias in (-4.0, 0.0):
        name = f"depth8 gate bias {bias:.0f}"
        runs.add(name, *at_depth(8), model_class=GateStart, gate_bias=bias)
    add_parts_of_the_patch(runs)
    add_alternatives(runs)
    add_long_patch(runs, times_steps=4, seeds=1)


def add_central_runs(runs: RunList):
    """The runs on a larger model, where each takes minutes. Most have depth 1."""
    add_long_patch(runs, times_steps=10, seeds=3)
    add_controller_against_static(runs, 1, seeds=2, best_rates=(30, 100, 300))
    add_wider_pools(runs, 1)
    add_adapted_full_model(runs, seeds=1)
    add_patches(runs, seeds=1)
    runs.add("depth4 controller", *at_depth(4), measures=(BY_DEPTH,))
    runs.add("depth1 sized norm", *sized_norm(1), model_class=SizedStepNorm)
    add_ablations(runs, 1, seeds=1)
    add_long_controller(runs, 1, times_steps=4)
    add_bases(runs, 1, seeds=1)
    add_ranks(runs, 1)


# ---- The paper's claims ----------------------------------------------------------------------------------


def add_controller_against_static(runs: RunList, depth: int, seeds: int, best_rates: tuple):
    """The Controller, with its own input and with others, and the static table at several rates.

    best_rates: those of the table's rates that have as many seeds as the Controller; the others have one.
    """
    options = at_depth(depth)
    name = f"depth{depth}"
    runs.add(
        f"{name} controller",
        *options,
        seeds=seeds,
        measures=(SWAP,),
        first_measures=(TASKS, BY_DEPTH, OBJECTIVE),
    )
    runs.add(f"{name} static", *options, "--modulation", "static", seeds=seeds, first_measures=(TASKS,))
    runs.add(f"{name} none", *options, "--modulation", "none", first_measures=(TASKS,))
    for rate in TABLE_RATES:
        runs.add(
            f"{name} static rate x{rate}",
            *options,
            "--modulation",
            "static",
            seeds=seeds if rate in best_rates else 1,
            optimizer={"table_rate": float(rate)},
            first_measures=(TASKS,),
        )
    runs.add(f"{name} zero input", *options, model_class=ZeroInput, seeds=seeds)
    runs.add(f"{name} mean input", *options, model_class=MeanInput)
    runs.add(f"{name} token input", *options, model_class=TokenInput, seeds=seeds, measures=(SWAP,))


def add_wider_pools(runs: RunList, depth: int):
    """The Controller with the means over a window and over the whole sequence."""
    options = at_depth(depth)
    runs.add(f"depth{depth} window input", *options, model_class=WindowInput, measures=(SWAP,))
    runs.add(f"depth{depth} sequence input", *options, "--pool", "sequence", measures=(SWAP,))


def add_bases(runs: RunList, depth: int, seeds: int):
    runs.add(f"depth{depth} random bases", *at_depth(depth), model_class=RandomBases, seeds=seeds)
    runs.add(f"depth{depth} own bases", *at_depth(depth), model_class=OwnBases, seeds=seeds)


def sized_norm(depth: int) -> list[str]:
    """The options of a run whose step norm starts at the size of the state."""
    return [*at_depth(depth), "--norm-lr-scale", "1"]


def add_norms(runs: RunList, depth: int, seeds: int):
    """The step norm at the common rate, started at the size of the state and at 1."""
    runs.add(f"depth{depth} sized norm", *sized_norm(depth), model_class=SizedStepNorm, seeds=seeds)
    runs.add(f"depth{depth} norm rate 1", *at_depth(depth), "--norm-lr-scale", "1", seeds=seeds)


def add_ablations(runs: RunList, depth: int, seeds: int):
    runs.add(f"depth{depth} no gate", *at_depth(depth), "--no-gate", seeds=seeds)
    runs.add(f"depth{depth} no step norm", *at_depth(depth), "--no-step-norm", seeds=seeds)


def add_released(runs: RunList, seeds: int):
    """As the released script of the Controller does it, at the preset's rate and at the paper's."""
    options = released_options()
    details = dict(model_class=Released, optimizer={"constant_rate": True}, measures=(OBJECTIVE,))
    runs.add("released", *options, seeds=seeds, first_measures=(BY_DEPTH,), **details)
    runs.add("released paper rate", *options, "--lr", "3e-4", **details)


def released_options() -> list[str]:
    return [*at_depth(16), *PUBLISHED_OBJECTIVE, "--norm-lr-scale", "1"]


def add_ranks(runs: RunList, depth: int):
    """The Controller and the static table at other ranks."""
    options = at_depth(depth)
    for rank in ("8", "64"):
        runs.add(f"depth{depth} controller rank{rank}", *options, "--rank", rank)
        runs.add(f"depth{depth} static rank{rank}", *options, "--rank", rank, "--modulation", "static")


def add_rates(runs: RunList, depth: int):
    """The Controller at other learning rates of all parameters."""
    options = at_depth(depth)
    runs.add(f"depth{depth} controller lr third", *options, *runs.at_rate(1 / 3))
    runs.add(f"depth{depth} controller lr three", *options, *runs.at_rate(3))


def add_long_controller(runs: RunList, depth: int, times_steps: int):
    """The paper's system, trained for longer."""
    name = f"long depth{depth} controller"
    runs.add(name, *at_depth(depth), times_steps=times_steps, measures=(OBJECTIVE, CURVE))


# ---- Yardsticks, and past the paper ----------------------------------------------------------------------


def add_adapted_full_model(runs: RunList, seeds: int):
    """The full model with the adapters of --patch, at the rate of --patch."""
    runs.add("full adapted", *runs.at_rate(3), model_class=AdaptedFull, seeds=seeds, first_measures=(TASKS,))


def add_patches(runs: RunList, seeds: int):
    """--patch as it is, and without each of its parts."""
    runs.add("patch", "--patch", seeds=seeds, first_measures=(TASKS,))
    runs.add("patch closed form alone", "--patch", times_steps=0)
    runs.add("patch paper cut", "--patch", model_class=PaperCut)
    runs.add("patch without closed form", "--patch", "--seam-tokens", "0")
    for share in ("0", "1"):
        runs.add(f"patch distill {share}", "--patch", "--distill", share, first_measures=(TASKS,))


def add_loops(runs: RunList, depths, seeds: int):
    """The patch with a loop of several steps, and one whose steps have adapters of their own."""
    for depth in depths:
        runs.add(f"patch depth{depth}", "--patch", *at_depth(depth), seeds=seeds)
    runs.add("patch depth4 own adapters", "--patch", *at_depth(4), seeds=seeds, model_class=StepAdapters)


def add_long_patch(runs: RunList, times_steps: int, seeds: int):
    measures = dict(measures=(CURVE,), first_measures=(TASKS,))
    runs.add("long patch", "--patch", seeds=seeds, times_steps=times_steps, **measures)


def add_parts_of_the_patch(runs: RunList):
    """Only the seams are trained, starting from the cut model: both, one of them, and both of a low rank."""
    options = ["--patch", "--train-coda", "none", "--seam-tokens", "0"]
    runs.add("patch seams only", *options)
    runs.add("patch seam in", *options, model_class=Seams, one_seam="in")
    runs.add("patch seam out", *options, model_class=Seams, one_seam="out")
    runs.add("patch low rank", *options, model_class=LowRank)


def add_alternatives(runs: RunList):
    """Every kind of Alternative at two rates, of which the validation sample chooses one."""
    for kind in ALTERNATIVES:
        for rate, suffix in ((1, ""), (3, " lr three")):
            options = [*at_depth(1), *runs.at_rate(rate)]
            runs.add(f"alternative {kind}{suffix}", *options, model_class=Alternative, kind=kind)
