"""Losses of the full, the cut and the looped model on held-out text: python evaluate.py runs/NAME

With --data, on another text, all of which then counts as held out; with --depth, at another depth. It changes
nothing in the folder of the run.
"""

import math
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from data import Batches, Tokens, open_text
from ouroboros import Ouroboros
from patch import Patched
from qwen import Qwen, load_tokenizer
from support.fast import eager, keep_freed_memory
from support.files import UserError, full_name, run_program
from support.machine import pick_device, pick_dtype, progress
from support.options import number
from support.report import print_table, table_rows
from support.run import read_run

# ---- Losses ----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, batches: Batches, sequences: int, **loop) -> list[float]:
    """The mean cross entropy of each of so many sequences, in nats per token.

    Of a text with fewer sequences, each is read once.
    """
    device = model.norm.weight.device
    losses = []
    with eager():  # compiled or not, all models are measured with the same rounding
        for n in progress(range(batches.at_most(sequences)), desc="evaluating", unit=" sequences"):
            ids, targets = batches.batch(n, 1, device)  # [1, T] each
            losses.append(model.loss(ids, targets, **loop).item())
    return losses


# ---- What the loss does not show: copying, and choosing among four -----------------------------------------

PASSAGE = 64  # tokens
QUESTION = 96  # tokens, of which the last third is the answer
NAMES = ("Anna", "David", "Maria", "Peter")


@torch.no_grad()
def copied(model, passages, **loop) -> list[float]:
    """The share of each passage's tokens that a model finds likeliest when it reads the passage again.

    passages [N, P]. The first token of the second reading does not count, since nothing announces it.
    """
    P = passages.shape[1]
    shares = []
    with eager():
        for passage in progress(passages.split(4), desc="copying", unit=" batches"):
            ids = torch.cat([passage, passage], dim=1).to(model.norm.weight.device)  # [B, 2P]
            likeliest = model(ids, **loop)[:, P:-1].argmax(-1)  # for tokens 1 .. P-1 of the passage
            shares += (likeliest == ids[:, P + 1 :]).float().mean(1).tolist()
    return shares


@torch.no_grad()
def chosen(model, questions, **loop) -> list[float]:
    """1.0 for each question whose first answer is the likeliest of its answers, else 0.0.

    A question is (prompt, answers), in tokens.
    """
    right = []
    with eager():
        for prompt, answers in progress(questions, desc="choosing", unit=" questions"):
            losses = []
            for answer in answers:
                ids = torch.tensor([prompt + answer], device=model.norm.weight.device)  # [1, T]
                targets = ids[:, 1:].clone()
                targets[:, : len(prompt) - 1] = -100
                losses.append(model.loss(ids[:, :-1], targets, **loop).item() * len(answer))
            right.append(float(losses[0] == min(losses)))
    return right


def continuation_questions(starts: list[list[int]]):
    """The first two thirds of a start are the prompt, and its last third is the right answer.

    The wrong answers are the last thirds of the next three starts; after the last start comes the first.
    starts: the first tokens of sequences, equally many of each. With fewer than four there is no question.
    """
    questions = []
    if len(starts) < 4:
        return questions
    for n, start in enumerate(starts):
        size = len(start) * 2 // 3
        answers = [starts[(n + i) % len(starts)][size:] for i in range(4)]
        questions.append((start[:size], answers))
    return questions


def needle_questions(starts: list[list[int]], tokenizer):
    """A prompt gives numbers to four names, goes on with PASSAGE tokens of text, and asks for a number.

    The answers are the number of that name and the other three.
    """

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    random = np.random.default_rng(0)
    questions = []
    for start in starts:
        numbers = dict(zip(random.permutation(NAMES), random.integers(1000, 10_000, size=4)))
        facts = "".join(f"The number of {name} is {number}. " for name, number in numbers.items())
        prompt = encode(facts) + start[:PASSAGE] + encode(f"\nThe number of {NAMES[0]} is")
        answers = [encode(f" {numbers[name]}") for name in NAMES]
        questions.append((prompt, answers))
    return questions


class Evaluation:
    """What all models of a run are measured by: the columns of its table, and a text that they continue.

    columns: {name: Batches}, on which losses are measured. held_out: the Batches for all else. sequences: how
    many are read.
    """

    PROMPT_TOKENS = 48
    NEW_TOKENS = 48

    def __init__(self, columns: dict[str, Batches], held_out: Batches, sequences: int):
        self.columns = columns
        self.held_out = held_out
        self.sequences = sequences

    @classmethod
    def of_run(cls, training_text: Tokens, held_out_text: Tokens, options) -> "Evaluation":
        """That of a run of train.py, on both splits of its text."""
        columns = {
            "train": Batches(training_text, options.seq_len),
            "held-out": Batches(held_out_text, options.seq_len),
        }
        if options.target_offset == 2:  # the published task, beside the one that counts
            columns["train, t+2"] = Batches(training_text, options.seq_len, offset=2)
            columns["held-out, t+2"] = Batches(held_out_text, options.seq_len, offset=2)
        return cls(columns, columns["held-out"], options.eval_sequences)

    def held_out_loss(self, model, sequences: int | None = None) -> float:
        """The mean loss on held-out text, in nats per token."""
        losses = evaluate(model, self.held_out, sequences or self.sequences)
        return fmean(losses)

    def copied_share(self, model) -> float:
        """The mean share of a held-out passage that is copied, on a few passages, for the log."""
        return fmean(copied(model, self._passages(32)))

    def results(self, model, **loop) -> dict[str, list[float]]:
        """{column: the losses of its sequences}, and {"copies ...": the shares of copied tokens}.

        Raises UserError if a loss is not finite.
        """
        results = {}
        for name, batches in self.columns.items():
            results[name] = evaluate(model, batches, self.sequences, **loop)
            if not all(map(math.isfinite, results[name])):
                raise UserError(
                    f"a loss of the {type(model).__name__} on the {batches.tokens.name} is not finite; give "
                    "a smaller --depth or an earlier checkpoint, RUN/step-N, or train with --dtype float32"
                )
        passages = self._passages(self.sequences)
        generator = torch.Generator().manual_seed(0)
        random_passages = torch.randint(self.held_out.tokens.vocab_size, passages.shape, generator=generator)
        results["copies text"] = copied(model, passages, **loop)
        results["copies random"] = copied(model, random_passages, **loop)
        return results

    def choices(self, model, **loop) -> dict[str, list[float]]:
        """{"chooses ...": 1.0 or 0.0 for each question}: four answers, of which one is right."""
        ids, _ = self.held_out.batch(0, self.held_out.at_most(max(4, self.sequences)))
        starts = ids[:, :QUESTION].tolist()
        needles = needle_questions(starts, self.held_out.tokens.tokenizer)
        return {
            "chooses text": chosen(model, continuation_questions(starts), **loop),
            "chooses number": chosen(model, needles, **loop),
        }

    def _passages(self, count: int):
        """The first PASSAGE tokens, or fewer, of at most `count` held-out sequences. [N, P]"""
        ids, _ = self.held_out.batch(0, self.held_out.at_most(count))
        return ids[:, :PASSAGE]

    def continue_text(self, model) -> str:
        """How a model continues the prompt, with the same random numbers for every model."""
        torch.manual_seed(0)
        prompt = self._prompt_ids().to(model.norm.weight.device)  # [1, T]
        with eager():  # the shapes change with each token
            ids = model.generate(prompt, self.NEW_TOKENS, temperature=0.7)
        return self._text_of(ids[0, prompt.shape[1] :])

    def prompt(self) -> str:
        """A held-out text of some tokens."""
        return self._text_of(self._prompt_ids()[0])

    def _prompt_ids(self):
        ids, _ = self.held_out.batch(0, 1)
        return ids[:, : self.PROMPT_TOKENS]

    def _text_of(self, ids) -> str:
        tokenizer = self.held_out.tokens.tokenizer
        return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def labels_of(model: Ouroboros, depth: int | None = None) -> dict[str, str]:
    """What the full, the cut and the looped model are called in a table."""
    kept = len(model.prelude) + 1 + len(model.coda)
    return {
        "full": f"full model ({model.config.num_hidden_layers} layers)",
        "cut": f"cut to {kept} layers",
        "ouroboros": f"ouroboros, depth {model.checked_depth(depth)}",
    }


# ---- Opening a run ---------------------------------------------------------------------------------------


def open_run(run, base=None, dtype=torch.float32, device="cpu", checkpoint=None) -> Ouroboros:
    """The model of any run of train.py, from its folder, one of its checkpoints, or a Hub repository.

    base: where the pretrained model is now, if it was moved, or a Qwen, whose layers are then shared.
    Raises UserError for a folder that holds no run, or a damaged one.
    """
    checkpoint = checkpoint or read_run(run)
    _, about = checkpoint
    name = about.get("model", {}).get("class")
    for kind in (Ouroboros, Patched):
        if kind.__name__ == name:
            return kind.load(run, base, dtype, device, checkpoint)
    raise UserError(f"{run}: holds a {name}, which is not known here; open it with the code that saved it")


def open_run_and_baselines(run, base=None, dtype=torch.float32, device="cpu", checkpoint=None):
    """The looped, the full and the cut model of a run, which share layers. The arguments are open_run's."""
    checkpoint = checkpoint or read_run(run)
    _, about = checkpoint
    full = Qwen.from_pretrained(base or about["model"]["base"], dtype, device)
    looped = open_run(run, full, dtype, device, checkpoint)
    kept = {name: looped.settings[name] for name in ("prelude", "recurrent", "coda")}
    # the cut of the full model, and not of layers that a variant has trained
    cut = Ouroboros(full, modulation="none", **kept).cut
    return looped, full, cut


# ---- The command -----------------------------------------------------------------------------------------


def run_parser(description: str) -> ArgumentParser:
    """A command line with what sample.py, look.py and this program have in common."""
    parser = ArgumentParser(description=description, usage=SUPPRESS)
    option = parser.add_argument
    option("run", help="The folder that train.py wrote, such as runs/NAME, or a Hub repository with a run.")
    option("--depth", type=number(1, 1000), help="Steps of the loop. [as trained]")
    option("--model", help="Where the base model is now, if it was moved: a folder or a Hub name.")
    option("--device", default="auto", help="cuda, mps or cpu. [the first of these that there is]")
    return parser


def main(argv=None):
    parser = run_parser("Print the losses of the full, the cut and the looped model of a run.")
    parser.add_argument(
        "--data", help="Another text: a file, a folder, python or fineweb-edu. [that of the run]"
    )
    parser.add_argument("--sequences", type=number(1, 10**9), help="How many are read. [as in the run]")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    device = pick_device(arguments.device)
    checkpoint = read_run(arguments.run)
    _, about = checkpoint
    if "options" not in about:
        raise UserError(f"{arguments.run}: was not saved by train.py, so it has no text; give another run")
    options = Namespace(**about["options"])
    dtype = pick_dtype(options.dtype, device)
    model, full, cut = open_run_and_baselines(arguments.run, arguments.model, dtype, device, checkpoint)
    tokenizer = load_tokenizer(full.source)

    text = open_text(arguments.data or options.data)
    if arguments.data is None:
        training_text = Tokens(text, "train", tokenizer)
        evaluation = Evaluation.of_run(training_text, Tokens(text, "held-out", tokenizer), options)
    else:
        batches = Batches(Tokens(text, "all", tokenizer), options.seq_len)
        name = Path(full_name(arguments.data)).name
        evaluation = Evaluation({name: batches}, batches, options.eval_sequences)
    if arguments.sequences is not None:
        evaluation.sequences = arguments.sequences
    models = {"full": (full, {}), "cut": (cut, {}), "ouroboros": (model, {"depth": arguments.depth})}
    results = {}
    for name, (measured, loop) in models.items():
        results[name] = evaluation.results(measured, **loop)
        if model.settings["pool"] == "prefix":  # the other pool sees the answers
            results[name] |= evaluation.choices(measured, **loop)
    print_table(table_rows(results, labels_of(model, arguments.depth)))


if __name__ == "__main__":
    run_program(main)
