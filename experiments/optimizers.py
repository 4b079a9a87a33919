"""The optimizer of a run of the study: that of train.py, and what only experiments change of it."""

import torch

from ouroboros import Ouroboros
from train import make_optimizer


def optimizer_of(model: Ouroboros, options, device, table_rate=1.0, constant_rate=False) -> torch.optim.AdamW:
    """The optimizer of train.py for this model and these options.

    table_rate: the learning rate of the static table of diagonals, as a multiple of the common one.
    constant_rate: whether the rate stays as it is after the warm-up. In the released code a cosine over the
    micro-steps advances on optimizer steps only, so that the rate hardly falls.
    """
    optimizer = make_optimizer(model, options, device)
    if table_rate != 1:
        scale_table_rate(optimizer, model, table_rate)
    if constant_rate:
        keep_rate(optimizer, options)
    return optimizer


def scale_table_rate(optimizer, model: Ouroboros, multiple: float):
    """Multiply the learning rate of the static table. Every parameter has a group of its own."""
    for group in optimizer.param_groups:
        if group["params"][0] is model.controller.table:
            group["scale"] *= multiple


def keep_rate(optimizer, options):
    """Undo the fall of the learning rate before each step that is taken after the warm-up."""

    def restore_rate(optimizer, arguments, named_arguments):
        for group in optimizer.param_groups:
            state = optimizer.state[group["params"][0]]
            if state and state["step"] >= options.warmup:  # the number of steps taken so far
                group["lr"] = options.lr * group["scale"]

    optimizer.register_step_pre_hook(restore_rate)
