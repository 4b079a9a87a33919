"""Does a loop pay where two steps are needed? python experiments/lookups.py [--steps N] [--seeds N]

A model reads lines "a b" and "b c" in random order. Then it is asked for the b of an a, which takes one
lookup, and for its c, which takes two. Source: the claim of arXiv 2604.02051 that one layer, looped, does the
work of several. The patched model is trained on the answers alone, with one step of the loop and with more.
All rows of a seed see the same sequences. A run is a line of OUT/results.jsonl; those that are there are not
trained again.
"""

import json
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from data import Batches, Tokens, open_text
from ouroboros import TrainedLinear
from patch import Patched, mend_seams
from qwen import Qwen, load_tokenizer
from support.fast import keep_freed_memory
from support.files import UserError, run_program
from support.machine import pick_device, pick_dtype, progress
from support.options import number
from support.report import estimate, markdown_table
from train import learning_rate, make_optimizer

SYMBOLS = 48  # words that the lines are made of
CHAINS = 2  # of a -> b -> c in a sequence, so that a guess between the two c is right in half of the cases
SEQUENCES = 32  # of a training step
RANK = 16  # of the looped layer's adapter; that of the other layers is 2
OPENING = 0.5  # o_t of the later steps at the start; at 0 the loop would be one step
ROWS = [(1, "none"), (4, "none"), (4, "static")]  # (depth, modulation)


def main(argv=None):
    parser = ArgumentParser(description="Train depths on lookups in one and two steps.", usage=SUPPRESS)
    option = parser.add_argument
    option("--model", default="tiny", help="As for train.py. [tiny]")
    option("--steps", type=number(1, 10**6), default=2000, help="Optimizer steps of a run. [2000]")
    option("--lr", type=number(1e-12, 1.0), default=6e-3, help="The learning rate. [0.006]")
    option("--seeds", type=number(1, 1000), default=5, help="How many runs a row has. [5]")
    option("--out", type=Path, default=Path("runs/lookups"), help="The folder. [runs/lookups]")
    options = parser.parse_args(argv)
    keep_freed_memory()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    path.touch()
    settings = {"model": options.model, "steps": options.steps, "lr": options.lr}
    runs = {}  # {(depth, modulation, seed): its line}
    for line in path.read_text().splitlines():
        run = json.loads(line)
        if any(run[name] != value for name, value in settings.items()):
            raise UserError(f"{path}: holds runs with other options; choose another --out")
        runs[run["depth"], run["modulation"], run["seed"]] = run

    device = pick_device()
    full = Qwen.from_pretrained(options.model, pick_dtype("auto", device), device)
    tokenizer = load_tokenizer(options.model)
    seams = fitted_seams(full, tokenizer)
    for seed in range(options.seeds):
        for depth, modulation in ROWS:
            if (depth, modulation, seed) not in runs:
                torch.manual_seed(seed)
                model = new_model(full, seams, depth, modulation)
                run = {**settings, "depth": depth, "modulation": modulation, "seed": seed}
                run |= train(model, Lookups(tokenizer, device), seed, options)
                with path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                runs[depth, modulation, seed] = run
    print(markdown_table(table(runs, options.seeds)))


# ---- The task --------------------------------------------------------------------------------------------


class Lookups:
    """Makes sequences of lookups: (ids, targets), [size, T] each. A target is -100 but at a query."""

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
def shares_right(model, lookups: Lookups) -> dict[str, float]:
    """The share of right first choices, on 256 sequences that are not trained on."""
    ids, targets = lookups.batch(256, torch.Generator().manual_seed(10**9))  # training has smaller seeds
    asked = targets != -100
    right = model(ids).argmax(-1)[asked] == targets[asked]
    marks = ids.roll(1, dims=1)[asked]  # the mark precedes the a
    one, two = lookups.marks.tolist()
    return {
        "one lookup": right[marks == one].float().mean().item(),
        "two lookups": right[marks == two].float().mean().item(),
    }


# ---- Training --------------------------------------------------------------------------------------------


def fitted_seams(full: Qwen, tokenizer) -> Patched:
    """A patched model whose seams are those of train.py --patch for the built-in text."""
    text = Batches(Tokens(open_text("python"), "train", tokenizer), 256)
    ids, _ = text.batch(0, text.at_most(48), full.norm.weight.device)
    model = Patched(full)
    mend_seams(model, full, ids)
    return model


def new_model(full: Qwen, seams: Patched, depth: int, modulation: str) -> Patched:
    """A patched model with these seams, a loop that is open, and a wider adapter of the looped layer."""
    model = Patched(full, depth=depth, modulation=modulation)
    model.seam_in.load_state_dict(seams.seam_in.state_dict())
    model.seam_out.load_state_dict(seams.seam_out.state_dict())
    nn.init.constant_(model.opening[1:], OPENING)
    adapter = model.recurrent_adapter
    for k, projection in model.recurrent.projections().items():
        adapter.A[k] = TrainedLinear(projection.in_features, RANK, bias=False)
        adapter.B[k] = TrainedLinear(RANK, projection.out_features, bias=False)
        nn.init.zeros_(adapter.B[k].weight)
    return model.to(full.norm.weight.device)


def train(model: Patched, lookups: Lookups, seed: int, options) -> dict:
    """Train a model. Returns its number of trained parameters and {step: shares_right} at four steps."""
    parameters = list(model.trained_parameters().values())
    recipe = Namespace(lr=options.lr, steps=options.steps, warmup=20, norm_lr_scale=1.0)
    optimizer = make_optimizer(model, recipe)
    curve = {}
    for step in progress(range(options.steps), desc=f"depth {model.depth}, seed {seed}"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        generator = torch.Generator().manual_seed(1000 * step + seed)  # the same for all rows of a seed
        model.loss(*lookups.batch(SEQUENCES, generator)).backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == options.steps or (step + 1) % max(1, options.steps // 4) == 0:
            curve[step + 1] = shares_right(model, lookups)
    return {"parameters": sum(p.numel() for p in parameters), "curve": curve}


# ---- The table -------------------------------------------------------------------------------------------


def table(runs: dict, seeds: int) -> list[list[str]]:
    """The cells: the shares after the last step of each run, and the paired difference to depth 1."""
    cells = [["depth", "modulation", "one lookup", "two lookups, each seed", "mean", "minus depth 1"]]

    def shares(depth, modulation, task):
        return [list(runs[depth, modulation, seed]["curve"].values())[-1][task] for seed in range(seeds)]

    reference = shares(*ROWS[0], "two lookups")
    for depth, modulation in ROWS:
        one = shares(depth, modulation, "one lookup")
        two = shares(depth, modulation, "two lookups")
        difference = estimate([share - other for share, other in zip(two, reference)])
        row = [str(depth), modulation, estimate(one).percent()]
        row += [", ".join(f"{share:.1%}" for share in two), estimate(two).percent()]
        row.append("" if depth == 1 else difference.percent())
        cells.append(row)
    return cells


if __name__ == "__main__":
    run_program(main)
