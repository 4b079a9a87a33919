"""Means, their standard errors, and the share of the gap that a model recovers.

The standard errors are those over sequences: how much another sample of the same text might change a mean.
Nothing here needs torch, so what only reads the losses of a run starts at once.
"""

import math
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean and its standard error, which is nan for a single sequence."""

    mean: float
    error: float

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.error:.3f}"

    def percent(self) -> str:
        if math.isnan(self.error):
            return f"{self.mean:.1%}"
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}%"


def mean_loss(losses: list[float]) -> Estimate:
    """The mean over sequences."""
    return Estimate(mean(losses), standard_error(losses))


def paired_difference(losses: list[float], others: list[float]) -> Estimate:
    """The mean of losses - others on the same sequences.

    Its error is smaller than that of either mean: a sequence that is hard for one model is hard for both.
    """
    return mean_loss([loss - other for loss, other in zip(losses, others, strict=True)])


def gap_recovered(results: dict, column: str, name="ouroboros") -> Estimate | None:
    """The share of the loss between the cut and the full model that the model `name` has recovered.

    results: {model: {column: the loss of each sequence}}, of the same sequences for all models. 1 is the full
    model. None if the full model is no better than the cut one, so that there is no gap.
    """
    full = results["full"][column]
    cut = results["cut"][column]
    gap = paired_difference(cut, full).mean
    if gap <= 0:
        return None
    share = paired_difference(cut, results[name][column]).mean / gap
    deviations = []  # of each sequence; the error of a ratio of two means
    for of_cut, of_full, of_model in zip(cut, full, results[name][column], strict=True):
        deviations.append((of_cut - of_model) - share * (of_cut - of_full))
    return Estimate(share, standard_error(deviations) / gap)


def mean(values: list[float]) -> float:
    """The mean, which is nan where there are no values."""
    return math.fsum(values) / len(values) if values else math.nan


def standard_error(values: list[float]) -> float:
    """The standard deviation of the mean of independent values, nan for a single one."""
    if len(values) < 2:
        return math.nan
    center = mean(values)
    squares = [(value - center) * (value - center) for value in values]
    variance = math.fsum(squares) / (len(values) - 1)
    return math.sqrt(variance / len(values))
