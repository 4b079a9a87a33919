"""Is there room for halting? Whether a token could leave the loop early, at no loss or a smaller one.

After each step of the loop, the coda and the head say what the model would predict if the loop ended there.
The halting rule stops a token as soon as two successive predictions differ by less than a threshold. It is
compared with fixed depths that take as many steps on average. An oracle that knows the target and stops each
token at its smallest loss shows how much room there is.

The rule is judged kindly: the keys and values of a token that has stopped stay those of the whole loop.
"""

import torch
import torch.nn.functional as F

from data import Batches
from device import promote
from estimates import Estimate, paired_difference
from inside import each_step
from ouroboros import Ouroboros

# In nats: the Kullback-Leibler divergence of two successive predictions below which a token stops.
THRESHOLDS = (0.003, 0.01, 0.03, 0.1, 0.3)


@torch.no_grad()
def predictions_by_depth(model: Ouroboros, ids, depth: int) -> list:
    """log p [B, T, V] of the next token, where the loop ends after 1, 2, .. `depth` steps."""
    predictions = []
    for _, _, hidden in each_step(model, ids, depth):
        logits = promote(F.linear(hidden, model.head_weight))
        predictions.append(logits.log_softmax(-1))
    return predictions


def losses_and_changes(model: Ouroboros, ids, targets, depth: int):
    """What halting needs to know of a batch: losses [depth, B, T] and changes [depth, B, T].

    A change is the divergence of a prediction from the one a step earlier; that of the first is infinite.
    """
    predictions = predictions_by_depth(model, ids, depth)
    losses = []
    changes = [torch.full(ids.shape, torch.inf, device=ids.device)]
    for log_p in predictions:
        losses.append(-log_p.gather(-1, targets[..., None]).squeeze(-1))
    for earlier, later in zip(predictions, predictions[1:]):
        changes.append((later.exp() * (later - earlier)).sum(-1))
    return torch.stack(losses), torch.stack(changes)


def steps_taken(changes, threshold: float):
    """The step after which each token stops, counted from 0: changes [depth, B, T] -> [B, T].

    That is the first whose prediction has changed by less than the threshold, or else the last.
    """
    stops = changes < threshold
    stops[-1] = True
    return stops.int().argmax(0)  # the first of equals


def measure_halting(model: Ouroboros, batches: Batches, sequences: int, depth: int, device, first=0) -> dict:
    """Mean steps and losses, one number for each sequence, of every fixed depth, every threshold, the oracle.

    first: the number of the first sequence. Returns {"fixed": [[loss of each sequence] for each depth],
    "thresholds": {threshold: {"steps": [..], "loss": [..]}}, "oracle": {"steps": [..], "loss": [..]}}.
    """
    fixed = [[] for _ in range(depth)]
    oracle = {"steps": [], "loss": []}
    thresholds = {threshold: {"steps": [], "loss": []} for threshold in THRESHOLDS}
    for n in range(first, batches.at_most(first + sequences)):
        losses, changes = losses_and_changes(model, *batches.batch(n, 1, device), depth)
        for t in range(depth):
            fixed[t].append(losses[t].mean().item())
        add_sequence(oracle, losses, losses.argmin(0))
        for threshold, rule in thresholds.items():
            add_sequence(rule, losses, steps_taken(changes, threshold))
    return {"fixed": fixed, "oracle": oracle, "thresholds": thresholds}


def add_sequence(rule: dict, losses, stop):
    """Add a sequence's mean steps and loss to those of a rule, {"steps": [..], "loss": [..]}.

    losses [depth, B, T]. stop [B, T]: the step after which the rule stops each token, counted from 0.
    """
    rule["steps"].append((stop + 1).double().mean().item())
    rule["loss"].append(losses.gather(0, stop[None]).mean().item())


def gain_over_fixed_depth(rule: dict, fixed: list[list[float]]) -> Estimate:
    """How much smaller the loss of a rule is than that of fixed depths with as many steps on average.

    Between two depths, the loss is that of taking each of them for a share of the tokens. rule: {"steps",
    "loss"}; fixed: the losses by depth; one number for each sequence in both. Positive if the rule is better.
    """
    mean_steps = sum(rule["steps"]) / len(rule["steps"])
    lower = min(int(mean_steps), len(fixed) - 1)  # this many steps, and one more for a share of the tokens
    share = mean_steps - lower
    mixed = [(1 - share) * low + share * high for low, high in zip(fixed[lower - 1], fixed[lower])]
    return paired_difference(mixed, rule["loss"])
