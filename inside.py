"""What happens inside the loop: for each step and each token of a text, the values of one forward pass.

A step is described by what the model would predict if the loop ended there (through the coda and the head),
by how far the gate opens, by how far the state moves, and by the Controller's diagonals. look.py shows these
values for a prompt. They come from the parts of Ouroboros.hidden, which each_step calls in the same order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from device import promote
from ouroboros import LoopCache, Ouroboros
from qwen import rotary_at

CHOICES = 3  # the likeliest next tokens that are kept of a prediction


class Step(NamedTuple):
    """What one step of the loop does at each of T tokens. All values are on the CPU.

    next_p: the probability of the token that follows in the text, nan where none follows. opening: the mean
    of the gate over the channels. movement: |h after the step - h before it| / |h before it|. diagonals:
    m_k. updates: |(alpha/r) B_k diag(m_k) A_k x| / |W_k x|, where x is the input of the projection k.
    """

    likeliest: torch.Tensor  # [T, CHOICES] token ids, the likeliest first
    likeliest_p: torch.Tensor  # [T, CHOICES], their probabilities
    next_p: torch.Tensor  # [T]
    opening: torch.Tensor  # [T]
    movement: torch.Tensor  # [T]
    diagonals: dict  # {k: [T, r]}, empty without modulation
    updates: dict  # {k: [T]}, empty without modulation

    def is_finite(self) -> bool:
        return bool(self.likeliest_p.isfinite().all() and self.movement.isfinite().all())


@torch.no_grad()
def look_inside(model: Ouroboros, ids, depth: int | None = None, last: int | None = None) -> list[Step]:
    """The steps of the loop for one text, ids [T].

    depth: the number of steps, by default the model's. last: the values are those of so many tokens at the
    end of the text, by default of all; the model reads the whole text.
    """
    first = 0 if last is None else max(0, len(ids) - last)
    rotary = rotary_at(model.config, 0, len(ids), ids.device)
    steps = []
    for h, values, hidden in each_step(model, ids[None], depth):
        logits = F.linear(hidden[0, first:], model.head_weight)
        p = promote(logits).softmax(-1)  # [T, V]
        likeliest_p, likeliest = p.topk(CHOICES)
        next_p = p.new_full([len(p)], torch.nan)
        next_p[:-1] = p[:-1].gather(-1, ids[first + 1 :, None]).squeeze(-1)

        g = torch.as_tensor(values.g).expand_as(h)  # 1.0 without a gate, and [d] in patch.py
        opening = promote(g).mean(-1)
        movement = promote(values.h - h).norm(dim=-1) / promote(h).norm(dim=-1)

        diagonals = {}
        for k, diagonal in (values.m or {}).items():
            diagonal = diagonal.expand(*h.shape[:2], -1)  # a static table and a sequence's mean have no T
            diagonals[k] = promote(diagonal)[0, first:].cpu()
        updates = {}
        for k, size in update_sizes(model, h, rotary, values.m).items():
            updates[k] = size[0, first:].cpu()

        steps.append(
            Step(
                likeliest.cpu(),
                likeliest_p.cpu(),
                next_p.cpu(),
                opening[0, first:].cpu(),
                movement[0, first:].cpu(),
                diagonals,
                updates,
            )
        )
    return steps


def each_step(model: Ouroboros, ids, depth: int | None = None):
    """Yield, for each step of the loop, its input h [B, T, d], its StepValues, and the normalised last hidden
    state [B, T, d] that the model has if the loop ends with this step.

    ids [B, T]. depth: the number of steps, by default the model's.
    """
    depth = model.checked_depth(depth)
    rotary = rotary_at(model.config, 0, ids.shape[1], ids.device)
    no_cache = LoopCache([None] * len(model.prelude), [None] * depth, [None] * len(model.coda))
    h = model.run_prelude(model.embed_tokens(ids), rotary, no_cache)
    for t in range(depth):
        values = model.step_values(h, t, rotary)
        hidden = model.norm(model.run_coda(values.h, rotary, no_cache))
        yield h, values, hidden
        h = values.h


def update_sizes(model: Ouroboros, h, rotary, m: dict | None) -> dict:
    """|(alpha/r) B_k diag(m_k) A_k x| / |W_k x| for each projection k of the recurrent layer: {k: [B, T]}.

    h [B, T, d] is the input of the layer, m its diagonals. Empty without modulation.
    """
    sizes = {}
    modulated = model.modulated_projection(m)
    not_modulated = model.modulated_projection(None)

    def project(projection, x, k):
        with_update = modulated(projection, x, k)
        without = not_modulated(projection, x, k)
        sizes[k] = promote(with_update - without).norm(dim=-1) / promote(without).norm(dim=-1)
        return with_update

    if m is not None:
        model.recurrent(h, rotary, None, project)
    return sizes


# ---- The diagonals of several texts, or of several tokens ------------------------------------------------


def stacked_diagonals(steps: list[Step]):
    """The diagonals of a text in one tensor, [T, steps, 7, r]. The model must have a modulation."""
    of_steps = [torch.stack(list(step.diagonals.values()), dim=1) for step in steps]  # [T, 7, r] each
    return torch.stack(of_steps, dim=1)


def root_mean_square(x, dim=None):
    return x.square().mean(dim).sqrt()


class Comparison(NamedTuple):
    """How the diagonals of N texts, or of N tokens, differ. Each number is a root mean square.

    size: of the mean over the texts. difference: of the difference of two texts, at the same step. ratio:
    difference / size. between_texts: `difference` over all steps and projections together. between_steps:
    of the difference of two steps, for the same text; None if there is only one step.
    """

    size: torch.Tensor  # [steps, 7]
    difference: torch.Tensor  # [steps, 7]
    ratio: torch.Tensor  # [steps, 7]
    between_texts: float
    between_steps: float | None


def compare(diagonals) -> Comparison:
    """Compare N texts with each other, and the steps of the loop with each other: diagonals [N, steps, 7, r].

    The mean square of the difference of two of N values is twice their variance, so pairs need no loop.
    """
    N, depth = diagonals.shape[:2]
    assert N > 1, "one text differs from nothing"
    squared_difference = 2 * diagonals.var(dim=0)  # [steps, 7, r]
    size = root_mean_square(diagonals.mean(0), dim=-1)
    difference = squared_difference.mean(-1).sqrt()
    between_steps = None
    if depth > 1:
        between_steps = (2 * diagonals.var(dim=1)).mean().sqrt().item()
    return Comparison(
        size=size,
        difference=difference,
        ratio=difference / size.clamp(min=1e-12),  # 0 where all diagonals are 0
        between_texts=squared_difference.mean().sqrt().item(),
        between_steps=between_steps,
    )
