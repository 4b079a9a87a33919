"""What is measured of a trained model beside its losses.

These are the losses at other depths, the loss without the future, and what happens inside the loop.
"""

from functools import partial

import torch
import torch.nn.functional as F

from data import Batches
from device import promote
from evaluate import evaluate_columns
from ouroboros import Gate, Ouroboros, StepNorm

DEPTHS = (1, 2, 4, 8, 16, 32)  # at which a looped model is tested
LEAK_STRIDE = 16  # positions from one that is tested to the next


def losses_by_depth(model: Ouroboros, texts: dict[str, Batches], options, device) -> dict:
    """{depth: {text: loss}} for each of DEPTHS."""
    losses = {}
    for depth in DEPTHS:
        losses[depth] = evaluate_columns(partial(model.loss, depth=depth), texts, options, device)
    return losses


@torch.no_grad()
def future_leak(model: Ouroboros, batches: Batches, options, device) -> dict:
    """The mean loss at every 16th position, measured in two ways.

    "leak": the model reads the whole sequence, so that a pool over the sequence sees the future. "leak cut":
    the model reads the sequence only up to that position.
    """
    count = 0
    loss_with_future = 0.0
    loss_without = 0.0
    for first in range(0, options.eval_sequences, options.batch_size):
        ids, targets = batches.batch(first, options.batch_size, device)  # [B, T] each
        logits = promote(model(ids))  # [B, T, V]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(ids.shape)

        for t in range(LEAK_STRIDE - 1, ids.shape[1], LEAK_STRIDE):
            last_logits = promote(model(ids[:, : t + 1]))[:, -1]  # [B, V]
            loss_without += F.cross_entropy(last_logits, targets[:, t], reduction="sum").item()
            loss_with_future += losses[:, t].sum().item()
            count += len(ids)
    return {"leak": loss_with_future / count, "leak cut": loss_without / count}


@torch.no_grad()
def look_inside(model: Ouroboros, texts: dict[str, Batches], device) -> dict:
    """{text: {"gate": .., "diagonals": ..}}, measured on 8 sequences of each text.

    gate: the mean opening g at each step of the loop. diagonals: the root mean square of the Controller's
    diagonals, as nested lists [8 sequences, depth, 7 projections], at the last position of a sequence, which
    has seen all of it.
    """
    inside = {}
    for name, batches in texts.items():
        ids, _ = batches.batch(0, 8, device)
        inside[name] = look_inside_loop(model, ids)
    return inside


def look_inside_loop(model: Ouroboros, ids) -> dict:
    openings = []  # one number for each step
    sizes = []  # [B, 7] for each step

    def note_opening(module, inputs, output):
        openings.append(promote(output).sigmoid().mean().item())

    def note_sizes(module, inputs, output):
        at_last_position = torch.stack([promote(m)[:, -1] for m in output.values()], dim=1)  # [B, 7, r]
        sizes.append(at_last_position.square().mean(-1).sqrt())

    hooks = [
        model.gate.linear.register_forward_hook(note_opening),
        model.controller.register_forward_hook(note_sizes),
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return {"gate": openings, "diagonals": torch.stack(sizes, dim=1).tolist()}


def distance_from_start(model: Ouroboros, depth: int) -> dict:
    """How far the weights of the step norm and the biases of the gate have moved, on average.

    Empty for a model that lacks one of the two.
    """
    if not isinstance(model.step_norm, StepNorm) or not isinstance(model.gate, Gate):
        return {}
    norm_change = model.step_norm.weight[:depth] - 1  # they start at 1
    bias_change = model.gate.linear.bias + 2  # they start at -2
    return {
        "step norm": norm_change.abs().float().mean().item(),
        "gate": bias_change.abs().float().mean().item(),
    }
