"""Does a loop pay where two steps are needed? python experiments/loop_tasks.py [--model M --data D --seeds N]

Source: the claim of arXiv 2604.02051 that one layer, looped and modulated anew in each step, does the work
of several. A patched model with its seams in closed form is trained on copying and on lookups in one step and
in two (a -> b, b -> c, asked for c), with losses on the answers alone. All rows of a seed see the same
sequences and start from the same adapters. A run is a line of OUT/results.jsonl; those there are skipped.
"""

import json
import math
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from data import Batches, Tokens, open_text
from ouroboros import StaticModulation, TrainedLinear
from patch import Patched, mend_seams
from qwen import Qwen, load_tokenizer
from support.fast import keep_freed_memory
from support.files import UserError, run_program
from support.machine import pick_device, pick_dtype, progress
from support.options import number
from support.report import estimate, markdown_table
from train import learning_rate, make_optimizer

PASSAGE = 24  # tokens that are copied
SYMBOLS = 48  # words that the lookups are made of
RANK = 16  # of the looped layer's adapter; of the other layers' it is 2
TASKS = ("copying", "one step", "two steps")


@dataclass(frozen=True)
class Row:
    """A row of the table. opening: the start of o_t in the later steps; at 0, the loop is one step."""

    depth: int
    modulation: str
    opening: float

    def __str__(self):
        return f"depth {self.depth}, {self.modulation}, opening {self.opening}"


ROWS = [Row(1, "none", 1.0), Row(1, "static", 1.0)]
for depth in (2, 4):
    ROWS += [Row(depth, "none", 0.5), Row(depth, "static", 0.5)]
ROWS.append(Row(4, "none", 0.0))  # as patch.py starts


def main(argv=None):
    parser = ArgumentParser(description="Train depths on copying and on two-step lookups.", usage=SUPPRESS)
    option = parser.add_argument
    option("--model", default="tiny", help="As for train.py. [tiny]")
    option("--data", default="python", help="As for train.py, for the seams. [python]")
    option("--steps", type=number(1, 10**6), default=300, help="Optimizer steps of a run. [300]")
    option("--lr", type=number(1e-12, 1.0), default=6e-3, help="The learning rate. [0.006]")
    option("--sequences", type=number(1, 10**6), default=16, help="Lookups in a step. [16]")
    option("--chains", type=number(1, SYMBOLS // 3), default=2, help="Of a -> b -> c in a sequence. [2]")
    option("--seeds", type=number(1, 1000), default=3, help="How many runs a row has. [3]")
    option("--out", type=Path, default=Path("runs/loop-tasks"), help="The folder. [runs/loop-tasks]")
    options = parser.parse_args(argv)
    keep_freed_memory()
    device = pick_device()
    full = Qwen.from_pretrained(options.model, pick_dtype("auto", device), device)
    tokenizer = load_tokenizer(options.model)
    text = Batches(Tokens(open_text(options.data), "train", tokenizer), 256)
    ids, _ = text.batch(0, text.at_most(48), device)
    mended = Patched(full)
    mend_seams(mended, full, ids, batch_size=4)
    tasks = Tasks(tokenizer, full.config.vocab_size, options.chains, device)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    path.touch()
    runs = {}  # {(name of a row, seed): its line}
    for line in path.read_text().splitlines():
        run = json.loads(line)
        for name in ("model", "data", "steps", "lr", "sequences", "chains"):
            if run[name] != str(getattr(options, name)):
                raise UserError(f"{path}: holds runs with another --{name}; choose another --out")
        runs[run["row"], run["seed"]] = run
    for seed in range(options.seeds):
        for row in ROWS:
            if (str(row), seed) not in runs:
                runs[str(row), seed] = train_row(row, seed, full, mended, tasks, options)
                with path.open("a") as file:
                    file.write(json.dumps(runs[str(row), seed]) + "\n")
    print(markdown_table(table(runs, options.seeds)))


# ---- The tasks -------------------------------------------------------------------------------------------


class Tasks:
    """Makes sequences: (ids, targets, task), [size, T] each.

    targets is -100 and task is -1 where there is no answer to give; else task is a place in TASKS.
    """

    def __init__(self, tokenizer, vocab_size: int, chains: int, device):
        words = []
        for token, i in tokenizer.get_vocab().items():
            if token.startswith("Ġ") and token[1:].isalpha() and token[1:].isascii():  # Ġ is a space
                words.append(i)
        words = torch.tensor(sorted(words)[: SYMBOLS + 2])  # small numbers are common words
        self.marks = words[:2]  # of a query in one step and of one in two
        self.symbols = words[2:]
        self.newline = tokenizer.encode("\n").ids[0]
        self.vocab_size = vocab_size
        self.chains = chains
        self.device = device

    def copying(self, size: int, generator):
        """Random tokens, twice. In the second reading, each token but the last has the next as its target."""
        passage = torch.randint(self.vocab_size, (size, PASSAGE), generator=generator)
        ids = torch.cat([passage, passage], dim=1)
        targets = torch.full_like(ids, -100)
        targets[:, PASSAGE:-1] = ids[:, PASSAGE + 1 :]
        task = torch.where(targets == -100, -1, 0)
        return ids.to(self.device), targets.to(self.device), task.to(self.device)

    def lookups(self, size: int, generator):
        """Lines "a b" and "b c" in random order, then queries: a mark and an a, whose target is b or c.

        One a is asked for its b, and each for its c, in random order. The answers are not among the ids.
        """
        n = self.chains
        sequences = []
        for _ in range(size):
            order = torch.randperm(len(self.symbols), generator=generator)
            a, b, c = self.symbols[order[: 3 * n]].split(n)  # [n] each
            lines = torch.cat([torch.stack([a, b], dim=1), torch.stack([b, c], dim=1)])
            lines = F.pad(lines, (0, 1), value=self.newline)  # [2n, 3]
            lines = lines[torch.randperm(2 * n, generator=generator)].flatten()

            # the chains are in random order, so that the first one is a random one
            queries = torch.full((n + 1, 2, 3), -1)  # [query, mark and a, (id, target, task)]
            queries[:, :, 1] = -100
            queries[0, 0, 0] = self.marks[0]
            queries[1:, 0, 0] = self.marks[1]
            queries[0, 1] = torch.stack([a[0], b[0], torch.tensor(1)])
            queries[1:, 1] = torch.stack([a, c, torch.full_like(a, 2)], dim=1)
            queries = queries[torch.randperm(n + 1, generator=generator)].flatten(0, 1)
            head = torch.stack([lines, torch.full_like(lines, -100), torch.full_like(lines, -1)], dim=1)
            sequences.append(torch.cat([head, queries]))
        return torch.stack(sequences).to(self.device).unbind(-1)


def answer_logits(model, ids, targets):
    """(logits, answers) at the n positions that have an answer, [n, V] and [n]."""
    h = model.hidden(ids)[targets != -100]
    return F.linear(h, model.head_weight).float(), targets[targets != -100]


@torch.no_grad()
def shares_right(model, tasks: Tasks) -> dict[str, tuple[float, int]]:
    """{task: (share of right first choices, number of answers)}, on sequences that are not trained on."""
    generator = torch.Generator().manual_seed(10**9)  # the seeds of training are smaller
    right = {name: [] for name in TASKS}
    for ids, targets, task in (tasks.copying(64, generator), tasks.lookups(256, generator)):
        logits, answers = answer_logits(model, ids, targets)
        for is_right, i in zip((logits.argmax(-1) == answers).tolist(), task[task >= 0].tolist()):
            right[TASKS[i]].append(is_right)
    return {name: (sum(values) / len(values), len(values)) for name, values in right.items()}


# ---- Training --------------------------------------------------------------------------------------------


def new_model(row: Row, full: Qwen, mended: Patched) -> Patched:
    """The patched model of a row, with the seams of `mended` and a wider adapter of the looped layer."""
    model = Patched(full, depth=row.depth, modulation=row.modulation)
    model.seam_in.load_state_dict(mended.seam_in.state_dict())
    model.seam_out.load_state_dict(mended.seam_out.state_dict())
    model.opening.data[1:] = row.opening
    for k, projection in model.recurrent.projections().items():
        model.recurrent_adapter.A[k] = TrainedLinear(projection.in_features, RANK, bias=False)
        model.recurrent_adapter.B[k] = TrainedLinear(RANK, projection.out_features, bias=False)
        nn.init.zeros_(model.recurrent_adapter.B[k].weight)
    return model.to(model.norm.weight.device)


def train_row(row: Row, seed: int, full: Qwen, mended: Patched, tasks: Tasks, options) -> dict:
    """Train a row with a seed. Returns its line: settings, number of parameters and shares by step."""
    torch.manual_seed(seed)
    model = new_model(row, full, mended)
    parameters = list(model.trained_parameters().values())
    recipe = Namespace(lr=options.lr, steps=options.steps, warmup=20, norm_lr_scale=1.0)
    optimizer = make_optimizer(model, recipe)
    curve = {}
    for step in progress(range(options.steps), desc=f"{row}, seed {seed}"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        generator = torch.Generator().manual_seed(1000 * step + seed)  # the same for all rows of a seed
        for make, size in ((tasks.copying, 4), (tasks.lookups, options.sequences)):
            ids, targets, _ = make(size, generator)
            (F.cross_entropy(*answer_logits(model, ids, targets)) / 2).backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == options.steps or (step + 1) % math.ceil(options.steps / 4) == 0:
            curve[step + 1] = shares_right(model, tasks)

    count = sum(p.numel() for p in parameters)
    if isinstance(model.controller, StaticModulation):  # its rows for steps that are not taken do not count
        count -= model.controller.table[model.depth :].numel()
    settings = {name: str(value) for name, value in vars(options).items()}
    opening = model.opening.mean(dim=1).tolist()
    return {
        "row": str(row),
        "seed": seed,
        **settings,
        "parameters": count,
        "opening": opening,
        "curve": curve,
    }


# ---- The table -------------------------------------------------------------------------------------------


def table(runs: dict, seeds: int) -> list[list[str]]:
    """The cells: means with their errors over the seeds, and paired differences to depth 1.

    runs: {(name of a row, seed): its line}. In brackets stands the binomial error of a mean.
    """
    cells = [["row", "parameters"]]
    for name in TASKS:
        cells[0] += [name, "minus depth 1"]
    for row in ROWS:
        ends = [last_shares(runs[str(row), seed]) for seed in range(seeds)]
        ends_1 = [last_shares(runs[str(Row(1, row.modulation, 1.0)), seed]) for seed in range(seeds)]
        cells.append([str(row), f"{runs[str(row), 0]['parameters']:,}"])
        for name in TASKS:
            mean = estimate([end[name][0] for end in ends])
            difference = estimate([end[name][0] - end_1[name][0] for end, end_1 in zip(ends, ends_1)])
            answers = sum(end[name][1] for end in ends)
            binomial = math.sqrt(mean.mean * (1 - mean.mean) / answers)
            cells[-1].append(f"{mean.percent()} ({100 * binomial:.1f})")
            cells[-1].append("" if row.depth == 1 else difference.percent())
    return cells


def last_shares(run: dict) -> dict:
    """The shares after the last step of a run."""
    return list(run["curve"].values())[-1]


if __name__ == "__main__":
    run_program(main)
