"""The list of the runs that experiments/paper.py trains: their names, options and model classes.

Words in the names of the runs:
    third, three, ten   a third of the preset's learning rate, three times and ten times that rate
    long                more steps than the others
    past                trained for the tables past the paper
    past paper          the paper's system among these
    past start          the patch without matrices at the seams: it only starts as the cut model does
    past seam           the patch with a matrix at one seam
    past patch          the patch with a matrix at both seams
"""

from dataclasses import dataclass, field

from experiments.variants import Alternative, DrawnDepth, LowRank, RandomBases, Rounded, Seams
from options import PRESETS
from ouroboros import Ouroboros
from patch import Patched

PUBLISHED_OBJECTIVE = ("--target-offset", "2", "--pool", "sequence")
ALTERNATIVES = ("scale", "matrix", "lora", "lora one", "layer")  # the kinds of Alternative


@dataclass(frozen=True)
class Run:
    """One training run.

    name: ends with the seed, as in "depth8 controller seed0". options: those of train.py's command line.
    own_settings: the arguments of the class for which train.py has no options.
    """

    name: str
    options: list[str]
    model_class: type[Ouroboros]
    own_settings: dict = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The name of the run's folder and, with .json, of its results."""
        return self.name.replace(" ", "-")


class RunList:
    """The runs so far, and the model's default learning rate and number of steps."""

    def __init__(self, preset: str, steps: int):
        self.runs = {}  # name -> Run
        self.lr = PRESETS[preset]["lr"]
        self.steps = steps

    def add(self, name: str, *options: str, seeds=1, model_class=None, **own_settings):
        """Add a run for each of so many seeds, by default of the class that train.py would choose."""
        if model_class is None:
            model_class = Patched if "--patch" in options else Ouroboros
        for seed in range(seeds):
            run = Run(f"{name} seed{seed}", [*options, "--seed", str(seed)], model_class, own_settings)
            self.runs[run.name] = run

    def for_steps(self, multiple: int) -> list[str]:
        """The options of a run of so many times the usual number of steps."""
        return ["--steps", str(multiple * self.steps)]

    def at_rate(self, multiple: float) -> list[str]:
        """The options of a run at so many times the preset's learning rate."""
        return ["--lr", str(multiple * self.lr)]


def patch_options(depth: int, modulation: str, train_coda="none") -> list[str]:
    """The options of a run with --patch."""
    return ["--patch", "--depth", str(depth), "--modulation", modulation, "--train-coda", train_coda]


# ---- All runs --------------------------------------------------------------------------------------------


def all_runs(central: bool, steps: int) -> dict[str, Run]:
    """name -> Run, in the order in which the runs are listed.

    central: only what is worth its time on a larger model. steps: of most runs; some have several times as
    many.
    """
    if central:
        runs = RunList("cpu", steps)
        recipe = [*runs.for_steps(4), *runs.at_rate(3)]
        add_patches(runs, recipe)
        add_central_rows_past_the_paper(runs, recipe)
        add_the_paper(runs, seeds=1)
        runs.add("past lora", "--depth", "1", *recipe, model_class=Alternative, kind="lora")
        add_central_long_runs(runs)
    else:
        runs = RunList("tiny", steps)
        recipe = [*runs.for_steps(1), *runs.at_rate(3)]
        add_patches(runs, recipe)
        add_tiny_rows_past_the_paper(runs, recipe)
        add_the_paper(runs, seeds=3)
        add_ranks_rates_and_alternatives(runs)
        add_tiny_long_runs(runs)
    return runs.runs


def add_the_paper(runs: RunList, seeds: int):
    """The paper's own experiments: modulation by depth, the published objective, and the ablations."""
    for depth in (8, 1, 4, 16):
        for modulation in ("controller", "static", "none"):
            options = ["--depth", str(depth), "--modulation", modulation]
            runs.add(f"depth{depth} {modulation}", *options, seeds=1 if depth == 16 else seeds)

    runs.add("offset2 sequence", *PUBLISHED_OBJECTIVE)
    runs.add("offset1 sequence", "--pool", "sequence")

    runs.add("no gate", "--no-gate", seeds=seeds)
    runs.add("no step norm", "--no-step-norm", seeds=seeds)
    runs.add("random bases", model_class=RandomBases, seeds=seeds)


# ---- Past the paper --------------------------------------------------------------------------------------
#
# recipe: the options that give the number of steps and the learning rate of these runs.


def add_patches(runs: RunList, recipe: list[str]):
    """The patches that are trained on every model."""
    runs.add("past all lora", *patch_options(1, "none", "all"), *recipe, seeds=3)
    runs.add("past coda lora", *patch_options(1, "none", "lora"), *recipe, seeds=3)
    runs.add("past coda norms", *patch_options(1, "none", "norms"), *recipe)
    runs.add("past patch depth1 none", *patch_options(1, "none"), *recipe, seeds=3)
    runs.add("past patch depth1 controller", *patch_options(1, "controller"), *recipe, seeds=3)


def add_parts_of_the_patch(runs: RunList, recipe: list[str]):
    """The patch with one seam only, and with matrices of a low rank."""
    options = [*patch_options(1, "none"), *recipe]
    runs.add("past seam in", *options, model_class=Seams, seams="in")
    runs.add("past seam out", *options, model_class=Seams, seams="out")
    runs.add("past low rank", *options, model_class=LowRank)


def add_start(runs: RunList, depth: int, modulation: str, recipe: list[str]):
    """The patch without any matrix."""
    options = [*patch_options(depth, modulation), *recipe]
    runs.add(f"past start depth{depth} {modulation}", *options, model_class=Seams, seams="none")


def add_central_rows_past_the_paper(runs: RunList, recipe: list[str]):
    """The rows that are worth their time on a larger model, where each run takes minutes.

    The paper's system is trained for as many steps as the patches.
    """
    as_the_paper = [*runs.for_steps(4), *runs.at_rate(1)]
    runs.add("past paper depth8", "--depth", "8", *as_the_paper, seeds=3)
    runs.add("past paper depth1", "--depth", "1", *as_the_paper)
    runs.add("past paper depth1 three", "--depth", "1", *recipe)
    add_start(runs, 1, "controller", recipe)
    runs.add("past paper no step norm", "--no-step-norm", *as_the_paper)
    add_parts_of_the_patch(runs, recipe)
    runs.add("past patch depth4 none", *patch_options(4, "none"), *recipe)


def add_tiny_rows_past_the_paper(runs: RunList, recipe: list[str]):
    """The rows on the built-in model.

    The paper's system at the preset's rate is not among them: its own experiments have as many steps.
    """
    runs.add("past paper depth8 three", "--depth", "8", *recipe)
    for depth in (1, 4):
        runs.add(f"past paper depth{depth} three", "--depth", str(depth), *recipe)
        for modulation in ("none", "controller"):
            add_start(runs, depth, modulation, recipe)

    add_parts_of_the_patch(runs, recipe)
    for depth in (4, 8, 2):
        for modulation in ("none", "controller"):
            runs.add(f"past patch depth{depth} {modulation}", *patch_options(depth, modulation), *recipe)
    for depth in (1, 4):
        runs.add(f"past patch depth{depth} static", *patch_options(depth, "static"), *recipe)


# ---- Ranks, rates and alternatives -----------------------------------------------------------------------


def add_ranks_rates_and_alternatives(runs: RunList):
    """What is varied on the built-in model only."""
    for rank in (8, 64):
        runs.add(f"rank{rank} static", "--rank", str(rank), "--modulation", "static")
    runs.add("drawn depth", model_class=DrawnDepth)

    as_published = ["--lr", "3e-4", "--norm-lr-scale", "1"]
    runs.add("bf16 weights paper rate", *as_published, model_class=Rounded)
    runs.add("float32 weights paper rate", *as_published)

    for rank in (8, 64):
        runs.add(f"rank{rank}", "--rank", str(rank))

    runs.add("lr third", *runs.at_rate(1 / 3))
    add_alternatives(runs, " lr third", runs.at_rate(1 / 3))
    runs.add("lr three", *runs.at_rate(3))
    add_alternatives(runs, " lr three", runs.at_rate(3))
    # At ten times the rate, the paper's system has no finite gradient any more.
    add_alternatives(runs, " lr ten", runs.at_rate(10))
    add_alternatives(runs, "", [])


def add_alternatives(runs: RunList, suffix: str, rate_options: list[str]):
    """Every kind of Alternative, at one learning rate. suffix: of the names."""
    for kind in ALTERNATIVES:
        runs.add(kind + suffix, "--depth", "1", *rate_options, model_class=Alternative, kind=kind)


# ---- Long runs -------------------------------------------------------------------------------------------


def add_central_long_runs(runs: RunList):
    long = runs.for_steps(10)
    runs.add("long depth1 controller", "--depth", "1", *long)
    runs.add("long depth1 offset2 sequence", *PUBLISHED_OBJECTIVE, "--depth", "1", *long)
    runs.add("long all lora", "--patch", *long)


def add_tiny_long_runs(runs: RunList):
    long = runs.for_steps(6)
    for depth in (1, 4):
        for modulation in ("none", "controller"):
            add_long_patch(runs, depth, modulation, long)
    add_long_patch(runs, 8, "none", long)

    runs.add("long all lora", "--patch", *long)
    runs.add("long offset1 prefix", *long)
    runs.add("long offset2 sequence", *PUBLISHED_OBJECTIVE, *long)


def add_long_patch(runs: RunList, depth: int, modulation: str, long: list[str]):
    runs.add(f"long patch depth{depth} {modulation}", *patch_options(depth, modulation), *long)
