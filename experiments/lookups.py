"""Does a loop pay where two steps are needed? python experiments/lookups.py [--steps N] [--seeds N]

A model reads lines "a b" and "b c" in random order. Then it is asked for the b of an a, which takes one
lookup, and for its c, which takes two. Source: the claim of arXiv 2604.02051 that one layer, looped, does the
work of several. The patched model is trained on the answers alone, with one step of the loop, with more, and
with diagonals that differ from step to step; so is the paper's own system. All systems see the same sequences
of a seed. A seed takes half an hour on one core.
"""

import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from data import Batches, Tokens, open_text
from ouroboros import Ouroboros, TrainedLinear
from patch import Patched, mend_seams
from qwen import Qwen, load_tokenizer
from support.fast import keep_freed_memory
from support.files import run_program
from support.machine import pick_device, pick_dtype, progress
from support.options import number
from support.report import estimate, markdown_table
from train import learning_rate, make_optimizer

SYMBOLS = 48  # words that the lines are made of
CHAINS = 2  # of a -> b -> c in a sequence, so that a guess between the two c is right in half of the cases
SEQUENCES = 32  # of a training step
RANK = 16  # of the looped layer's adapter; that of the other layers is 2
OPENING = 0.5  # o_t of the later steps at the start; at 0 the loop would be one step
PATCHED = {  # the first one is that with which the others are compared
    "1 step": dict(depth=1),
    "2 steps": dict(depth=2),
    "4 steps": dict(depth=4),
    "4 steps, static diagonals": dict(depth=4, modulation="static"),
}
PAPER = {"the paper, 1 step": dict(depth=1), "the paper, 4 steps": dict(depth=4)}


def main(argv=None):
    parser = ArgumentParser(description="Train loops on lookups in one and two steps.", usage=SUPPRESS)
    option = parser.add_argument
    option("--steps", type=number(1, 10**6), default=2000, help="Optimizer steps of a run. [2000]")
    option("--seeds", type=number(1, 1000), default=3, help="How many runs a system has. [3]")
    options = parser.parse_args(argv)
    keep_freed_memory()
    device = pick_device()
    full = Qwen.from_pretrained("tiny", pick_dtype("auto", device), device)
    tokenizer = load_tokenizer("tiny")
    lookups = Lookups(tokenizer, device)
    seams = fitted_seams(full, tokenizer)
    runs = {}  # {(system, seed): {step: share_right}}
    for seed in range(options.seeds):
        for system, settings in PATCHED.items():
            torch.manual_seed(seed)
            model = new_patched(full, seams, settings)
            runs[system, seed] = train(model, lookups, seed, options.steps, lr=6e-3, norm_lr_scale=1.0)
        for system, settings in PAPER.items():
            torch.manual_seed(seed)
            model = Ouroboros(full, **settings)
            runs[system, seed] = train(model, lookups, seed, options.steps, lr=2e-3, norm_lr_scale=50.0)
        for systems in (PATCHED, PAPER):  # the seeds so far
            print(markdown_table(table(list(systems), runs, seed + 1)) + "\n", flush=True)


# ---- The task --------------------------------------------------------------------------------------------


class Lookups:
    """Makes sequences of lookups: (ids, targets), [size, T] each. A target is -100 outside queries."""

    def __init__(self, tokenizer, device):
        words = []
        for token, i in tokenizer.get_vocab().items():
            if token.startswith("Ġ") and token[1:].isalpha() and token[1:].isascii():  # Ġ is a space
                words.append(i)
        words = torch.tensor(sorted(words)[: SYMBOLS + 2])  # small numbers are common words
        self.marks = words[:2]  # of a query in one step and of one in two
        self.symbols = words[2:]
        self.newline = tokenizer.encode("\n").ids[0]
        self.device = device

    def sequence(self, generator):
        """(ids, targets) [T]: the lines, then a query in one step and one in two steps for each chain."""
        n = CHAINS
        order = torch.randperm(SYMBOLS, generator=generator)
        a, b, c = self.symbols[order[: 3 * n]].split(n)  # [n] each
        lines = torch.cat([torch.stack([a, b], dim=1), torch.stack([b, c], dim=1)])  # [2n, 2]
        lines = lines[torch.randperm(2 * n, generator=generator)]
        lines = F.pad(lines, (0, 1), value=self.newline).flatten()  # [6n]

        # A query is a mark and an a. The chains are in random order, so that the first one is a random one.
        marks = torch.cat([self.marks[:1], self.marks[1:].expand(n)])  # [n + 1]
        queries = torch.stack([marks, torch.cat([a[:1], a])], dim=1)
        answers = torch.cat([b[:1], c])
        answers = torch.stack([torch.full_like(answers, -100), answers], dim=1)
        order = torch.randperm(n + 1, generator=generator)
        ids = torch.cat([lines, queries[order].flatten()])
        targets = torch.cat([torch.full_like(lines, -100), answers[order].flatten()])
        return ids, targets

    def batch(self, size: int, generator):
        """So many sequences: (ids, targets), [size, T] each."""
        ids, targets = zip(*(self.sequence(generator) for _ in range(size)))
        return torch.stack(ids).to(self.device), torch.stack(targets).to(self.device)


@torch.no_grad()
def share_right(model, lookups: Lookups) -> float:
    """The share of right first choices in two lookups, on 256 sequences that are not trained on."""
    ids, targets = lookups.batch(256, torch.Generator().manual_seed(10**9))  # training has smaller seeds
    asked = ids.roll(1, dims=1) == lookups.marks[1].item()  # the mark precedes the a
    right = model(ids).argmax(-1)[asked] == targets[asked]
    return right.float().mean().item()


# ---- Training --------------------------------------------------------------------------------------------


def fitted_seams(full: Qwen, tokenizer) -> Patched:
    """A patched model whose seams are those of train.py --patch for the built-in text."""
    text = Batches(Tokens(open_text("python"), "train", tokenizer), 256)
    ids, _ = text.batch(0, text.at_most(48), full.norm.weight.device)
    model = Patched(full)
    mend_seams(model, full, ids)
    return model


def new_patched(full: Qwen, seams: Patched, settings: dict) -> Patched:
    """A patched model with these seams, a loop that is open, and a wider adapter of the looped layer."""
    model = Patched(full, **settings)
    model.seam_in.load_state_dict(seams.seam_in.state_dict())
    model.seam_out.load_state_dict(seams.seam_out.state_dict())
    nn.init.constant_(model.opening[1:], OPENING)
    adapter = model.recurrent_adapter
    for k, projection in model.recurrent.projections().items():
        adapter.A[k] = TrainedLinear(projection.in_features, RANK, bias=False)
        adapter.B[k] = TrainedLinear(RANK, projection.out_features, bias=False)
        nn.init.zeros_(adapter.B[k].weight)
    return model.to(full.norm.weight.device)


def train(model: Ouroboros, lookups: Lookups, seed: int, steps: int, lr: float, norm_lr_scale: float) -> dict:
    """Train a model with these options of train.py. Returns {step: share_right} at four steps."""
    parameters = list(model.trained_parameters().values())
    recipe = Namespace(lr=lr, steps=steps, warmup=20, norm_lr_scale=norm_lr_scale)
    optimizer = make_optimizer(model, recipe)
    curve = {}
    for step in progress(range(steps), desc=f"depth {model.depth}, seed {seed}"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        generator = torch.Generator().manual_seed(1000 * step + seed)  # the same for all systems
        model.loss(*lookups.batch(SEQUENCES, generator)).backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == steps or (step + 1) % max(1, steps // 4) == 0:
            curve[step + 1] = share_right(model, lookups)
    return curve


# ---- The table -------------------------------------------------------------------------------------------


def table(systems: list[str], runs: dict, seeds: int) -> list[list[str]]:
    """The cells: each system's share of right answers and its paired difference from the first one's."""
    first = systems[0]
    steps = list(runs[first, 0])
    cells = [["two lookups", *(f"after {step} steps" for step in steps)]]
    for system in systems:
        shares = []
        differences = []
        for step in steps:
            right = [runs[system, seed][step] for seed in range(seeds)]
            shares.append(estimate(right).percent())
            pairs = zip(right, (runs[first, seed][step] for seed in range(seeds)))
            differences.append(estimate([share - other for share, other in pairs]).percent())
        cells.append([system, *shares])
        if system != first:
            cells.append([f"minus {first}", *differences])
    return cells


if __name__ == "__main__":
    run_program(main)
