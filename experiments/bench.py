"""Measure speed and memory beside the same work done with transformers: python experiments/bench.py

The model is tiny on a CPU. On a CUDA GPU it has the shapes of Qwen2.5-3B and random weights. The program
needs transformers 5.

The contestants take turns, so that noise meets them alike. Each is a process of its own, so that none has
another's memory. Times are medians. Memory is what a training step holds at its peak beyond what was there
before it.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from device import pick_device, pick_dtype
from fast import compile_blocks, keep_freed_memory, recompute_activations
from files import UserError, exit_on_user_error
from ouroboros import Ouroboros
from qwen import PROJECTIONS, Config, Qwen

QWEN_3B = Config(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=True,
)

# The contestants, by the names in the tables.
OBVIOUS = "the obvious way"
OBVIOUS_KEEPS = "the obvious way, memory kept"
OURS = "this project"
STATIC = "... static modulation"
RECOMPUTED = "... activation checkpointing"
COMPILED = "... torch.compile"
TRANSFORMERS = "transformers"

DEPTH = 8
RANK = 32
TOKEN_LIMIT = 4096  # random tokens are below it, so that every vocabulary has them
NEW_TOKENS = 64  # generated after as many tokens of a prompt

# ---- The obvious way -------------------------------------------------------------------------------------


def transformers_model(qwen: Qwen):
    """transformers' Qwen2 with the very tensors of ours."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ours = qwen.config
    config = Qwen2Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.rms_norm_eps,
        tie_word_embeddings=ours.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.set_default_dtype(qwen.head_weight.dtype)
    with qwen.head_weight.device:
        model = Qwen2ForCausalLM(config).requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)

    tensors = {}
    for name, tensor in qwen.state_dict().items():
        if not name.startswith("lm_head"):
            name = f"model.{name}"
        tensors[name] = tensor
    missing = model.load_state_dict(tensors, strict=False, assign=True).missing_keys
    for name in missing:
        if name.endswith("bias"):  # SmolLM2 has no biases
            model.get_parameter(name).zero_()
    model.tie_weights()
    return model


class ObviousProjection(nn.Module):
    """A projection that holds its diagonal m, set before each call. x [B, T, in] -> [B, T, out]"""

    def __init__(self, projection: nn.Linear, lora):
        super().__init__()
        self.projection = projection
        self.A = lora.A
        self.B = lora.B
        self.scale = lora.scale
        self.m = None  # [B, T, r]

    def forward(self, x):
        return self.projection(x) + self.scale * ((x @ self.A.T * self.m) @ self.B.T)


class Obvious(nn.Module):
    """The model of ouroboros.py, with its weights, as one would first write it.

    It stands on the layers of transformers, has a module for each part, computes all logits at once and
    everything in one type.
    """

    def __init__(self, ours: Ouroboros, qwen: Qwen):
        super().__init__()
        self.hf = transformers_model(qwen)
        self.depth = ours.depth
        layers = self.hf.model.layers
        self.prelude = layers[: len(ours.prelude)]
        self.recurrent = layers[ours.settings["recurrent"]]
        self.coda = layers[-len(ours.coda) :]

        self.projections = nn.ModuleDict()
        for name in PROJECTIONS:
            parent = (
                self.recurrent.self_attn if hasattr(self.recurrent.self_attn, name) else self.recurrent.mlp
            )
            self.projections[name] = ObviousProjection(getattr(parent, name), ours.lora[name])
            setattr(parent, name, self.projections[name])

        self.reduce = copy_of_linear(ours.controller.reduce)
        self.step = nn.Embedding.from_pretrained(ours.controller.step_embedding.weight.detach(), freeze=False)
        self.join = copy_of_linear(ours.controller.join)
        self.narrow = copy_of_linear(ours.controller.narrow)
        self.heads = nn.ModuleDict()
        for name, weight in zip(PROJECTIONS, ours.controller.heads.weight.chunk(len(PROJECTIONS))):
            self.heads[name] = linear_of(weight)

        self.gate = copy_of_linear(ours.gate.linear)
        self.norms = nn.ModuleList()
        for weight in ours.step_norm.weight:
            norm = nn.RMSNorm(len(weight), ours.step_norm.eps)
            norm.weight.data.copy_(weight)
            self.norms.append(norm)
        self.to(qwen.head_weight)

    def loss(self, ids, targets):
        """The mean cross entropy of targets [B, T], aligned with ids [B, T]."""
        h = self.hf.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        rotary = self.hf.model.rotary_emb(h, positions[None])
        for layer in self.prelude:
            h = layer(h, position_embeddings=rotary, attention_mask=None)

        for t in range(self.depth):
            pooled = h.float().cumsum(1) / (positions[:, None] + 1)
            self.set_diagonals(pooled.to(h.dtype), t)
            h_new = self.recurrent(h, position_embeddings=rotary, attention_mask=None)
            h_new = self.norms[t](h_new)
            g = torch.sigmoid(self.gate(torch.cat([h_new, h], -1)))
            h = g * h_new + (1 - g) * h

        for layer in self.coda:
            h = layer(h, position_embeddings=rotary, attention_mask=None)
        logits = self.hf.lm_head(self.hf.model.norm(h))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def set_diagonals(self, pooled, t: int):
        """The Controller: pooled [B, T, d] -> m [B, T, r] of each projection."""
        p = F.silu(self.reduce(pooled))
        e = self.step(torch.tensor(t, device=p.device)).expand(*p.shape[:2], -1)
        z = F.silu(self.join(torch.cat([p, e], -1)))
        z = F.silu(self.narrow(z))
        for name, projection in self.projections.items():
            projection.m = self.heads[name](z)


def linear_of(weight, bias=None) -> nn.Linear:
    """A linear layer with a copy of this weight [out, in] and this bias [out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def copy_of_linear(linear: nn.Linear) -> nn.Linear:
    return linear_of(linear.weight, linear.bias)


# ---- What the contestants do -----------------------------------------------------------------------------


def load_model(args, device, dtype) -> Qwen:
    """The frozen model of --model; for 3B, random weights."""
    if args.model != "3B":
        return Qwen.from_pretrained(args.model, dtype, device)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        qwen = Qwen(QWEN_3B).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return qwen


def training(kind: str, args, device, dtype):
    """A function that takes one whole training step and returns its loss."""
    qwen = load_model(args, device, dtype)
    modulation = "static" if kind == STATIC else "controller"
    torch.manual_seed(0)  # the same weights for every contestant
    model = Ouroboros(qwen, depth=DEPTH, rank=RANK, modulation=modulation)
    for p in model.trained_parameters().values():
        p.data += 0.01 * torch.randn(p.shape).to(p)  # so that no part is without effect

    is_obvious = kind in (OBVIOUS, OBVIOUS_KEEPS)
    if is_obvious:
        model = Obvious(model, qwen)
    elif kind == RECOMPUTED:
        recompute_activations(model)
    elif kind == COMPILED:
        compile_blocks(model)
    del qwen

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=None if is_obvious else True)
    generator = torch.Generator().manual_seed(1)
    shape = (2, args.batch_size, args.seq_len)
    ids, targets = torch.randint(0, TOKEN_LIMIT, shape, generator=generator).to(device)

    def training_step() -> float:
        loss = model.loss(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return training_step


def generation(kind: str, args, device, dtype, batch_size: int):
    """A function that generates NEW_TOKENS tokens after a prompt, for each sequence of a batch."""
    qwen = load_model(args, device, dtype)
    ids = torch.randint(0, TOKEN_LIMIT, (batch_size, NEW_TOKENS), device=device)

    if kind == OURS:
        qwen.config = replace(qwen.config, eos_token_id=())  # nothing ends a text early

        def generate():
            return qwen.generate(ids, max_new_tokens=NEW_TOKENS)

    else:
        model = transformers_model(qwen)
        mask = torch.ones_like(ids)

        def generate():
            return model.generate(
                ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )

    return generate


# ---- The contest -----------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What a contestant was measured by."""

    seconds: float  # the median
    peak: int  # bytes; 0 if not measured
    first: object  # what its first run returned


class Contestant:
    """A process that does one kind of work whenever it is asked to."""

    def __init__(self, make, kind: str, args, device, dtype, *more):
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
            raise UserError(f"the contestant {self.kind!r} failed, see above") from error

    def stop(self):
        self.pipe.send("stop")


def serve(pipe, make, kind: str, args, device, dtype, *more):
    """The process of a contestant: obey the orders that come through the pipe."""
    if device.type == "cpu" and kind != OBVIOUS:
        keep_freed_memory()
    work = make(kind, args, device, dtype, *more)
    first = work()
    work()  # the first runs are slower
    pipe.send(first)

    while True:
        order = pipe.recv()
        if order == "stop":
            return
        torch.cuda.empty_cache()  # for the others; does nothing without a GPU
        if order == "memory":
            pipe.send(peak_memory(work, device))
        else:
            pipe.send(seconds_of(work, device))


def compete(make, kinds: list[str], args, device, dtype, *more, memory=False) -> dict[str, Measured]:
    """{kind: what it was measured by}. make(kind, args, device, dtype, *more) returns what a contestant does.

    memory: whether the peak memory is measured too.
    """
    contestants = []
    for kind in kinds:  # one after the other: two at once would wait for each other's threads
        contestants.append(Contestant(make, kind, args, device, dtype, *more))

    times = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for contestant in contestants:
            times[contestant.kind].append(contestant.ask("time"))

    results = {}
    for contestant in contestants:
        peak = contestant.ask("memory") if memory else 0
        results[contestant.kind] = Measured(median(times[contestant.kind]), peak, contestant.first)
    for contestant in contestants:
        contestant.stop()
    return results


# ---- Measuring -------------------------------------------------------------------------------------------


def seconds_of(work, device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(work, device) -> int:
    """The bytes that are held at the peak of the work beyond those that were held before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def matrix_rate(device, dtype) -> float:
    """The FLOP/s of a product of two large random matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)

    def product():
        a @ b

    times = [seconds_of(product, device) for _ in range(12)]
    return 2 * n**3 / median(times[2:])


def flops_per_token(args) -> int:
    """A lower bound of the FLOP that a training step takes for each token.

    It counts the frozen matrices: in the forward pass and, from the recurrent layer on, in the backward pass
    to the activations.
    """
    config = QWEN_3B if args.model == "3B" else Config.from_pretrained(args.model)
    with torch.device("meta"):
        model = Ouroboros(Qwen(config), depth=DEPTH, rank=RANK)
    layer = 2 * sum(projection.weight.numel() for projection in model.recurrent.projections().values())
    head = 2 * model.head_weight.numel()
    return layer * (len(model.prelude) + 2 * DEPTH + 2 * len(model.coda)) + 2 * head


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
    flops = flops_per_token(args) * tokens
    print(
        f"\nA training step, depth {DEPTH}, rank {RANK}, {args.batch_size} x {args.seq_len} tokens; "
        f"a matrix product alone runs at {rate / 1e9:.0f} GFLOP/s\n"
    )
    print("| | tokens/s | | peak memory above the weights | | of the matrix rate | first loss |")
    print("|" + "---|" * 7)

    second = COMPILED if device.type == "cuda" else OBVIOUS_KEEPS
    kinds = [OBVIOUS, second, OURS, STATIC, RECOMPUTED]
    results = compete(training, kinds, args, device, dtype, memory=True)
    yardstick = results[OBVIOUS]
    for kind, measured in results.items():
        cells = [
            kind,
            f"{tokens / measured.seconds:.0f}",
            f"{yardstick.seconds / measured.seconds:.2f}x",
            f"{measured.peak / 1e6:.0f} MB",
            f"{measured.peak / yardstick.peak:.2f}x",
            f"{flops / measured.seconds / rate:.0%}",
            f"{measured.first:.4f}",
        ]
        print("| " + " | ".join(cells) + " |")
    cost = results[OURS].seconds / results[STATIC].seconds - 1
    print(f"\nThe Controller costs {cost:.1%} over static modulation.")


def print_generation_table(args, device, dtype):
    print(f"\nGeneration of {NEW_TOKENS} tokens after {NEW_TOKENS}, the plain Qwen\n")
    print("| batch | transformers | this project | |\n|---|---|---|---|")
    for batch_size in (1, 8):
        results = compete(generation, [TRANSFORMERS, OURS], args, device, dtype, batch_size)
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
        help="tiny, a folder, a Hub name, or 3B for random weights in the shapes of Qwen2.5-3B. "
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
