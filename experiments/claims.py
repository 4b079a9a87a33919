"""Each claim of the paper, and whether it holds in a study: the table claims.md.

The verdicts follow from paired differences by the rule in RULE, without a look at the numbers by a person.
"""

import itertools
from dataclasses import dataclass

from experiments.configurations import TABLE_RATES
from experiments.records import CUT, FULL, HELD_OUT, VALIDATION, Records, Summary

HOLDS = "holds"
FAILS = "does not hold"
UNSEEN = "no difference was seen"
UNKNOWN = "cannot be known here"

RULE = """A difference is that of two losses on the same test sequences, in nats per token; a negative one
means that the system named first is better. ± is its standard error over the sequences, and the number in
brackets is its standard deviation over the seeds. Both together give the error of the verdict. A difference
counts as seen if it is larger than two errors. "Better" and "worse" hold if such a difference was seen, and
do not hold if it was seen the other way. "No better" does not hold if the system was seen to be better. Where
two systems have one seed in common, the deviation over the seeds is taken to be the median of that of all
pairs with several."""

SPREAD_OF_PAPER = 0.009  # nats: all configurations of the paper lie within this

# Where the compared losses lie, and on what they are.
TRAINING_TEXT = ("objective", "train")
SHIFTED = ("objective", "held-out t+2")
SENTENCES = ("sentences",)
PLACES = {
    HELD_OUT: "on held-out text",
    TRAINING_TEXT: "on training text",
    SHIFTED: "on the token t+2 of held-out text",
    SENTENCES: "on single sentences",
}


@dataclass
class Row:
    """A row of the table: the paper's claim, what was compared here, the verdict, and the evidence."""

    claim: str
    compared: str
    verdict: str
    number: Summary | None = None
    logs: str = ""

    def cells(self) -> list[str]:
        return [self.claim, self.compared, self.verdict, str(self.number or ""), self.logs]


def verdict(expected: str, difference: Summary) -> str:
    """Whether a difference is as expected: "better" (negative), "worse" (positive) or "no better"."""
    is_lower = difference.mean < -2 * difference.total_error
    is_higher = difference.mean > 2 * difference.total_error
    if expected == "no better":
        return FAILS if is_lower else HOLDS
    if expected == "worse":
        is_lower, is_higher = is_higher, is_lower
    if is_lower:
        return HOLDS
    return FAILS if is_higher else UNSEEN


def compare(records: Records, claim: str, name: str, expected: str, other: str, path=HELD_OUT) -> Row:
    """A row that compares two configurations. expected: as for verdict."""
    compared = f"{name} is {expected} than {other} {PLACES[path]}"
    if not (records.has(name, path) and records.has(other, path)):
        return Row(claim, compared, UNKNOWN)
    difference = records.difference(name, other, path)
    logs = records.log_names(name, other, path=path)
    return Row(claim, compared, verdict(expected, difference), difference, logs)


# ---- The claims ------------------------------------------------------------------------------------------


def all_claims(records: Records) -> list[Row]:
    """The rows of the table, for a study of either model."""
    depths = [depth for depth in (1, 8) if records.has(f"depth{depth} static")]
    deepest = f"depth{depths[-1]}" if depths else "depth8"
    ours = f"{deepest} controller"
    rows = [
        compare(
            records,
            "Training lowers the loss on training text: 8.975 (cut model), 5.08 (looped model)",
            ours,
            "better",
            CUT,
            TRAINING_TEXT,
        ),
        compare(records, "There is no gain on held-out text", ours, "no better", CUT),
    ]
    rows += released_claims(records)
    for depth in depths:
        rows += controller_claims(records, depth)
    rows.append(largest_at_depth_1(records))
    rows.append(within_the_papers_spread(records))
    claim = "Depth brings no gain: 5.082, 5.075 and 5.080 at depth 1, 4 and 8"
    for depth, other in ((4, 1), (8, 1), (8, 4)):
        name = f"depth{depth} controller"
        if records.has(name):
            rows.append(compare(records, claim, name, "no better", f"depth{other} controller"))
    claim = "Without the gate, the model is worse than the cut model"
    rows.append(compare(records, claim, f"{deepest} no gate", "worse", CUT))
    claim = "The loop needs a norm for each step"
    rows.append(compare(records, claim, ours, "better", f"{deepest} no step norm"))
    claim = "The bases come from what was cut out"
    for depth in depths:
        for bases in ("random", "own"):
            name = f"depth{depth} controller"
            rows.append(compare(records, claim, name, "better", f"depth{depth} {bases} bases"))
    claim = "Full and cut model, 1.378 and 8.975, are measured by the target of the training"
    rows.append(compare(records, claim, FULL, "better", CUT, SHIFTED))
    rows.append(Row("All of it for Qwen2.5-3B after 300,000 micro-steps", "needs a GPU for days", UNKNOWN))
    return rows


def released_claims(records: Records) -> list[Row]:
    """No gain on held-out text, for the system trained as released, by three tests."""
    claim = "There is no gain on held-out text, trained as released"
    tests = {
        "by its own test": SENTENCES,
        "by the next token": HELD_OUT,
        "by the target of its training": SHIFTED,
    }
    rows = []
    for name in ("released", "released paper rate"):
        if records.has(name):
            for test, path in tests.items():
                rows.append(compare(records, f"{claim}; {test}", name, "no better", CUT, path))
    return rows


def controller_claims(records: Records, depth: int) -> list[Row]:
    """The Controller against static tables and against itself without its input, at one depth."""
    name = f"depth{depth} controller"
    paper = {1: "5.082 against 6.519", 8: "5.080 against 5.119"}[depth]
    claim = f"The Controller is better than a static table at depth {depth}: {paper}"
    static = f"depth{depth} static"
    best = records.best([static, *(f"{static} rate x{rate}" for rate in TABLE_RATES)])
    rows = [
        compare(records, f"{claim}; at the same rate", name, "better", static),
        compare(records, f"{claim}; at the table's best rate", name, "better", best or static),
    ]
    claim = f"What helps at depth {depth} is that the weights depend on the input"
    for other in ("zero input", "mean input"):
        rows.append(compare(records, claim, name, "better", f"depth{depth} {other}"))
    if records.has(name, ("swapped",)):
        difference = records.difference(name, name, HELD_OUT, ("swapped",))
        compared = f"{name} is better with its own text's pool than with another's on held-out text"
        rows.append(Row(claim, compared, verdict("better", difference), difference, records.log_names(name)))
    inputs = [f"depth{depth} {pool} input" for pool in ("token", "window")]
    best = records.best(inputs)
    if best:
        rows.append(compare(records, claim, best, "better", f"depth{depth} mean input"))
    return rows


def largest_at_depth_1(records: Records) -> Row:
    """Whether the Controller gains more over the static table at depth 1 than at depth 8."""
    claim = "The Controller's advantage over a static table is largest at depth 1"
    compared = "(controller - static) at depth 1 is lower than at depth 8, at the same rate"
    names = [f"depth{depth} {kind}" for depth in (1, 8) for kind in ("controller", "static")]
    if not all(records.has(name) for name in names):
        return Row(claim, compared, UNKNOWN)
    difference = records.difference_of_differences(*names)
    return Row(claim, compared, verdict("better", difference), difference, records.log_names(*names))


def within_the_papers_spread(records: Records) -> Row:
    """Whether all ranks and depths of the Controller lie as close together as in the paper."""
    claim = f"All eight configurations lie within {SPREAD_OF_PAPER} of each other"
    names = [f"depth{depth} controller" for depth in (1, 4, 8)]
    for depth in (1, 8):
        names += [f"depth{depth} controller rank{rank}" for rank in (8, 64)]
    names = [name for name in names if records.has(name)]
    if len(names) < 2:
        return Row(claim, "the Controller at several depths and ranks", UNKNOWN)

    # The pair that is furthest apart on the validation sample is measured on the test sample.
    pairs = list(itertools.permutations(names, 2))
    name, other = max(pairs, key=lambda pair: records.difference(*pair, VALIDATION).mean)
    difference = records.difference(name, other)
    margin = 2 * difference.total_error
    result = UNKNOWN
    if difference.mean + margin < SPREAD_OF_PAPER:
        result = HOLDS
    elif difference.mean - margin > SPREAD_OF_PAPER:
        result = FAILS
    compared = f"the furthest apart of {len(names)} depths and ranks: {name} and {other}"
    return Row(claim, compared, result, difference, records.log_names(name, other))


def claims_table(records: Records) -> str:
    """The table in Markdown, with its rule."""
    head = ["claim of the paper", "compared here", "verdict", "difference", "logs"]
    lines = ["# The paper's claims\n", RULE + "\n"]
    for row in [head, ["---"] * len(head), *(row.cells() for row in all_claims(records))]:
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"
