"""Measure speed and memory beside the same work done with transformers: python experiments/bench.py

The model is tiny on a CPU. On a CUDA GPU it has the shapes of Qwen2.5-3B and random weights. The program
needs transformers 5.

The contestants take turns, so that noise meets them alike. Each is a process of its own, so that none has
another's memory. Times are medians. Memory is what a training step holds at its peak beyond what was there
before it.
"""

import argparse
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from device import pick_device, pick_dtype
from experiments.contestants import (
    COMPILED,
    DEPTH,
    OBVIOUS,
    OBVIOUS_RETURNS,
    OURS,
    RANK_OF_LORA,
    RECOMPUTED,
    STATIC,
    Kind,
    config_of,
    flops_per_token,
    generation,
    generation_of_transformers,
    load_model,
    matrix_rate,
    model_and_loss,
    peak_memory,
    seconds_of,
    training,
)
from fast import keep_freed_memory
from files import UserError, exit_on_user_error

NEW_TOKENS = 64  # generated after as many tokens of a prompt
TRANSFORMERS = Kind("transformers", obvious=True)  # in generation

# ---- What the contestants do -----------------------------------------------------------------------------


def training_of(kind: Kind, args, device, dtype):
    """A function that takes one training step."""
    model, loss_of = model_and_loss(kind, load_model(args.model, device, dtype))
    return training(model, loss_of, args.batch_size, args.seq_len)


def generation_of(kind: Kind, args, device, dtype, batch_size: int):
    """A function that generates NEW_TOKENS tokens."""
    qwen = load_model(args.model, device, dtype)
    make = generation_of_transformers if kind.obvious else generation
    return make(qwen, batch_size, NEW_TOKENS)


# ---- The contest -----------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What a contestant was measured by."""

    seconds: float  # the median
    peak: int  # bytes; 0 if not measured
    first: object  # what its first run returned


class Contestant:
    """A process that does one kind of work whenever it is asked to."""

    def __init__(self, make, kind: Kind, args, device, dtype, *more):
        spawn = multiprocessing.get_context("spawn")
        self.kind = kind
        self.pipe, other_end = spawn.Pipe()
        arguments = (other_end, make, kind, args, device, dtype, *more)
        spawn.Process(target=serve, args=arguments, daemon=True).start()
        other_end.close()  # so that a contestant that fails ends the program
        self.first = self.receive()

    def ask(self, order: str):
        """The seconds of a run for "time", the bytes at its peak for "memory"."""
        self.pipe.send(order)
        return self.receive()

    def receive(self):
        try:
            return self.pipe.recv()
        except EOFError as error:
            raise UserError(f"the contestant {self.kind.name!r} failed, see above") from error

    def stop(self):
        self.pipe.send("stop")


def serve(pipe, make, kind: Kind, args, device, dtype, *more):
    """The process of a contestant: obey the orders that come through the pipe."""
    pick_device(str(device))  # with what it sets, as train.py
    if not kind.returns_memory:
        keep_freed_memory()
    work = make(kind, args, device, dtype, *more)
    first = work()
    work()  # the first runs are slower
    make_room()
    pipe.send(first)

    while True:
        order = pipe.recv()
        if order == "stop":
            return
        if device.type == "cuda":
            work()  # gets the memory again that make_room has given away
        answer = peak_memory(work, device) if order == "memory" else seconds_of(work, device)
        make_room()
        pipe.send(answer)


def make_room():
    """Leave the memory of a GPU to the others. Does nothing without a GPU."""
    torch.cuda.empty_cache()


def compete(make, kinds: list[Kind], args, device, dtype, *more, memory=False) -> dict[Kind, Measured]:
    """{kind: what it was measured by}. make(kind, args, device, dtype, *more) returns what a contestant does.

    memory: whether the peak memory is measured too.
    """
    contestants = []
    for kind in kinds:  # one after the other: two at once would wait for each other's threads
        contestants.append(Contestant(make, kind, args, device, dtype, *more))

    times = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for process in contestants:
            times[process.kind].append(process.ask("time"))

    results = {}
    for process in contestants:
        peak = process.ask("memory") if memory else 0
        results[process.kind] = Measured(median(times[process.kind]), peak, process.first)
    for process in contestants:
        process.stop()
    return results


def seconds_to_first_step(folder: str, run: str) -> float:
    """The time from the start of train.py, with its default options, to its first step.

    folder: for the run and for the cache.
    """
    command = [sys.executable, "-u", "train.py", "--model", "tiny", "--data", "python", "--steps", "1"]
    command += ["--device", "cpu", "--out", f"{folder}/{run}"]
    environment = dict(os.environ, XDG_CACHE_HOME=folder)

    started = time.perf_counter()
    seconds = None
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        for line in program.stdout:
            if line.startswith("1 steps of"):
                seconds = time.perf_counter() - started
    if seconds is None:
        raise UserError("train.py ended before its first step; run python train.py --steps 1 to see why")
    return seconds


# ---- The tables ------------------------------------------------------------------------------------------


def print_training_table(args, device, dtype):
    tokens = args.batch_size * args.seq_len
    rate = matrix_rate(device, dtype)
    flops = flops_per_token(config_of(args.model)) * tokens
    print(
        f"\nA training step, depth {DEPTH}, rank {RANK_OF_LORA}, {args.batch_size} x {args.seq_len} tokens; "
        f"a matrix product alone runs at {rate / 1e9:.0f} GFLOP/s\n"
    )
    print("| | tokens/s | | peak memory above the weights | | of the matrix rate | first loss |")
    print("|" + "---|" * 7)

    kinds = [OBVIOUS, OURS, STATIC, RECOMPUTED, COMPILED]
    if device.type == "cpu":
        kinds.insert(0, OBVIOUS_RETURNS)
    results = compete(training_of, kinds, args, device, dtype, memory=True)
    yardstick = results[OBVIOUS]
    for kind, measured in results.items():
        first_loss, _ = measured.first
        cells = [
            kind.name,
            f"{tokens / measured.seconds:.0f}",
            f"{yardstick.seconds / measured.seconds:.2f}x",
            f"{measured.peak / 1e6:.0f} MB",
            f"{measured.peak / yardstick.peak:.2f}x",
            f"{flops / measured.seconds / rate:.0%}",
            f"{first_loss:.4f}",
        ]
        print("| " + " | ".join(cells) + " |")
    cost = results[OURS].seconds / results[STATIC].seconds - 1
    print(f"\nThe Controller costs {cost:.1%} over static modulation.")
    if device.type == "cpu":
        times = results[OBVIOUS_RETURNS].seconds / yardstick.seconds
        print(f"keep_freed_memory makes the obvious way {times:.2f} times as fast. All others have it too.")


def print_generation_table(args, device, dtype):
    print(f"\nGeneration of {NEW_TOKENS} tokens after {NEW_TOKENS}, the plain Qwen\n")
    print("| batch | transformers | this project | |\n|---|---|---|---|")
    for batch_size in (1, 8):
        results = compete(generation_of, [TRANSFORMERS, OURS], args, device, dtype, batch_size)
        theirs = NEW_TOKENS * batch_size / results[TRANSFORMERS].seconds
        ours = NEW_TOKENS * batch_size / results[OURS].seconds
        print(f"| {batch_size} | {theirs:.0f} tokens/s | {ours:.0f} tokens/s | {ours / theirs:.2f}x |")


def print_start():
    with tempfile.TemporaryDirectory() as folder:
        first = seconds_to_first_step(folder, "first")
        second = seconds_to_first_step(folder, "second")  # finds what the first one cached
    print(
        f"\nFrom the start of train.py to its first step on tiny, CPU: {first:.1f} s, "
        f"the second time {second:.1f} s"
    )


def parse_arguments(on_cuda: bool):
    model = "3B" if on_cuda else "tiny"
    batch_size = 2 if on_cuda else 4
    seq_len = 2048 if on_cuda else 256

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option(
        "--model",
        default=model,
        help="tiny, a folder, a Hub name, or 0.5B, 3B and so on for random weights in these shapes. "
        f"Default: {model}.",
    )
    option(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="The number type of the frozen weights. auto is bfloat16 where the hardware multiplies it "
        "natively. Default: auto.",
    )
    option(
        "--batch-size",
        type=int,
        default=batch_size,
        help=f"The number of sequences in a training step. Default: {batch_size}.",
    )
    option(
        "--seq-len",
        type=int,
        default=seq_len,
        help=f"The number of tokens in a sequence. Default: {seq_len}.",
    )
    option("--rounds", type=int, default=11, help="How often each contestant is timed. Default: 11.")
    return parser.parse_args()


def main():
    device = pick_device("auto")
    args = parse_arguments(on_cuda=device.type == "cuda")
    dtype = pick_dtype(args.dtype, device)
    if importlib.util.find_spec("transformers") is None:
        raise UserError("the comparison needs transformers; install it with: pip install transformers")
    if min(args.batch_size, args.seq_len, args.rounds) < 1:
        raise UserError("--batch-size, --seq-len and --rounds must be 1 or more")
    print(f"{args.model}, {device}, {dtype}, torch {torch.__version__}, median of {args.rounds} rounds")

    print_training_table(args, device, dtype)
    print_generation_table(args, device, dtype)
    print_start()


if __name__ == "__main__":
    exit_on_user_error(main)
