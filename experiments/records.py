"""The results of a study as numbers with errors.

A configuration is a run without its seed. Its number on a text is the mean over the test sequences and over
its seeds. Two errors belong to it: the standard error over the sequences, where the seeds are averaged for
each sequence, and the spread, which is the standard deviation over the seeds.
"""

import itertools
import math
from functools import cached_property
from pathlib import Path
from statistics import median, stdev
from typing import NamedTuple

from estimates import Estimate, gap_recovered, mean_loss
from files import explaining, read_json

# Where a number lies in the JSON of a run: a list with one number for each sequence.
HELD_OUT = ("loss", "held-out", "test")
OTHER = ("loss", "other", "test")
VALIDATION = ("loss", "held-out", "validation")  # for choices alone

RUN_FIELDS = ("name", "options", "parameters", "tokens", "diverged", "log")  # which every run's file has
FULL, CUT = "full", "cut"


class Summary(NamedTuple):
    """A mean over sequences and seeds with its two errors.

    spread: None where there is one seed. assumed_spread: what stands for it then in the total error.
    """

    mean: float
    error: float
    spread: float | None
    seeds: int
    assumed_spread: float = 0.0

    @property
    def total_error(self) -> float:
        """The standard error of the mean from both sources."""
        spread = self.assumed_spread if self.spread is None else self.spread
        return math.sqrt(self.error**2 + spread**2 / max(1, self.seeds))

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ({self.spread:.3f})"
        return f"{self.mean:.3f} ± {self.error:.3f}{spread}"

    def percent(self) -> str:
        spread = "" if self.spread is None else f" ({100 * self.spread:.1f})"
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}{spread}%"


class Records:
    """The JSON files of a folder of results.

    configurations: {name: {seed: result}}, where the baselines have the seed None. Raises UserError for a
    folder without results, and for a file that holds something else.
    """

    def __init__(self, folder: Path):
        path = folder / "baselines.json"
        advice = "name a folder that paper.py wrote"
        with explaining(path, "read as the baselines", advice):
            self.baselines = read_json(path, advice)
            self.configurations = {}
            for name, result in self.baselines["models"].items():
                self.configurations[name] = {None: result}

        for path in sorted(folder.glob("*-seed*.json")):
            advice = "delete it and run paper.py again"
            with explaining(path, "read as the results of a run", advice):
                result = read_json(path, advice)
                for field in RUN_FIELDS:
                    if field not in result:
                        raise ValueError(f"it has no {field}")
                name, _, seed = result["name"].rpartition(" seed")
                self.configurations.setdefault(name, {})[int(seed)] = result

    # ---- What there is

    def results(self, name: str) -> dict:
        """{seed: result} of a configuration, without the runs that diverged. Empty if there are none."""
        found = {}
        for seed, result in self.configurations.get(name, {}).items():
            if not result.get("diverged"):
                found[seed] = result
        return found

    def has_diverged(self, name: str) -> bool:
        """Whether a run of a configuration gave no numbers any more. Its other seeds do not count then."""
        return any(result.get("diverged") for result in self.configurations.get(name, {}).values())

    def has(self, name: str, path=HELD_OUT) -> bool:
        """Whether a configuration has runs, none of which diverged, and one of them has numbers there."""
        return bool(self.values(name, path)) and not self.has_diverged(name)

    def first(self, name: str) -> dict:
        """The result of the first seed of a configuration."""
        return next(iter(self.results(name).values()))

    def values(self, name: str, path=HELD_OUT) -> dict:
        """{seed: one number for each sequence} of those seeds that have numbers there."""
        found = {}
        for seed, result in self.results(name).items():
            numbers = result
            for key in path:
                numbers = numbers.get(key, {})
            if numbers:
                found[seed] = numbers
        return found

    def log_names(self, *names: str, path=HELD_OUT) -> str:
        """The names of the files with the numbers of these configurations, for people to read."""
        files = []
        for name in names:
            seeds = list(self.values(name, path))
            if seeds == [None]:
                files.append("baselines")
            elif len(seeds) == 1:
                files.append(f"{name.replace(' ', '-')}-seed{seeds[0]}")
            else:
                files.append(f"{name.replace(' ', '-')}-seed[{seeds[0]}-{seeds[-1]}]")
        return ", ".join(files)

    # ---- Numbers

    def mean(self, name: str, path=HELD_OUT) -> Summary:
        """The mean of a configuration's numbers."""
        return summary(list(self.values(name, path).values()), mean_loss)

    def share(self, name: str, path=HELD_OUT) -> Summary | None:
        """The share of the gap between the cut and the full model that a configuration recovers, or None."""
        [full] = self.values(FULL, path).values()
        [cut] = self.values(CUT, path).values()

        def share_of(losses) -> Estimate | None:
            return gap_recovered({"full": {"": full}, "cut": {"": cut}, "model": {"": losses}}, "", "model")

        if share_of(cut) is None:
            return None
        return summary(list(self.values(name, path).values()), share_of)

    def difference(self, name: str, other: str, path=HELD_OUT, other_path=None) -> Summary:
        """name - other, paired by sequence and by seed. Only the seeds that both have count.

        Where that is one seed, the spread in the total error is the usual one.
        """
        difference = summary(self.differences(name, other, path, other_path or path), mean_loss)
        if None in self.values(name, path):  # a baseline, which has no seeds
            return difference
        return difference._replace(assumed_spread=self.usual_spread)

    @cached_property
    def usual_spread(self) -> float:
        """The median spread of the held-out differences of all pairs of systems with several seeds in common,
        or 0.
        """
        spreads = []
        for name, other in itertools.combinations(self.configurations, 2):
            differences = self.differences(name, other, HELD_OUT, HELD_OUT)
            if len(differences) > 1 and None not in self.values(other):  # a baseline has no seeds
                spreads.append(summary(differences, mean_loss).spread)
        return median(spreads) if spreads else 0.0

    def difference_of_differences(self, name: str, other: str, name2: str, other2: str) -> Summary:
        """(name - other) - (name2 - other2) on held-out text, paired by sequence and by seed."""
        first = self.differences(name, other, HELD_OUT, HELD_OUT)
        second = self.differences(name2, other2, HELD_OUT, HELD_OUT)
        return summary([minus(a, b) for a, b in zip(first, second)], mean_loss)

    def differences(self, name: str, other: str, path, other_path) -> list[list[float]]:
        """name - other: for each seed that both have, one number for each sequence."""
        first = self.values(name, path)
        second = self.values(other, other_path)
        if None in second:  # a baseline has no seeds
            second = dict.fromkeys(first, second[None])
        seeds = [seed for seed in first if seed in second]
        return [minus(first[seed], second[seed]) for seed in seeds]

    def best(self, names) -> str | None:
        """The configuration with the smallest loss on the validation sample, or None if there is none."""
        means = {name: self.mean(name, VALIDATION).mean for name in names if self.has(name)}
        return min(means, key=means.get, default=None)


def minus(numbers: list[float], others: list[float]) -> list[float]:
    return [number - other for number, other in zip(numbers, others, strict=True)]


def summary(seeds: list[list[float]], estimate) -> Summary:
    """The estimate of the mean over seeds of each sequence, and the spread of the seeds' own estimates.

    seeds: for each seed, one number for each sequence. estimate(numbers) -> Estimate
    """
    if not seeds:  # of a difference between systems without a seed in common
        return Summary(math.nan, math.nan, None, 0)
    averaged = [sum(numbers) / len(numbers) for numbers in zip(*seeds, strict=True)]
    whole = estimate(averaged)
    spread = None
    if len(seeds) > 1:
        spread = stdev(estimate(numbers).mean for numbers in seeds)
    return Summary(whole.mean, whole.error, spread, len(seeds))
