"""Speed and memory beside the same things done with transformers: python experiments/bench.py

--model: tiny (the default), a folder or a Hub name; on a CUDA GPU the default is random weights in Qwen2.5-3B's shapes.
Needs transformers 5. Contestants take turns, each in a process of its own, so that noise meets them alike and none has
another's memory; times are medians. Memory is what a training step holds at its peak beyond what was there before it.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ouroboros import Ouroboros
from qwen import PROJECTIONS, Config, Qwen, exit_on_user_error, keep_freed_memory, pick_device

QWEN_3B = Config(151936, 2048, 11008, 36, 16, 2, 128, tie_word_embeddings=True)
OBVIOUS, OBVIOUS_KEEPS, OURS = "the obvious way", "the obvious way, memory kept", "this project"
STATIC, RECOMPUTED, COMPILED = "... static modulation", "... activation checkpointing", "... torch.compile"


# ---- The contestants -------------------------------------------------------------------------------------------------
def transformers_model(qwen: Qwen):
    """transformers' Qwen2 with the very tensors of ours."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
    rope = {"rope_type": "default", "rope_theta": qwen.config.rope_theta}
    config = Qwen2Config(**{name: getattr(qwen.config, name) for name in names}, rope_parameters=rope,
                         eos_token_id=None, bos_token_id=None)
    torch.set_default_dtype(qwen.head.dtype)
    with qwen.head.device:
        hf = Qwen2ForCausalLM(config).requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)
    tensors = {name if name.startswith("lm_head") else f"model.{name}": t for name, t in qwen.state_dict().items()}
    missing = hf.load_state_dict(tensors, strict=False, assign=True).missing_keys
    for name in missing:  # SmolLM2 has no biases
        if name.endswith("bias"):
            hf.get_parameter(name).zero_()
    hf.tie_weights()
    return hf


class ObviousLinear(nn.Module):
    """A projection that holds its modulation m, set before each call."""
    def __init__(self, linear, lora):
        super().__init__()
        self.linear, self.A, self.B, self.scale = linear, lora.A, lora.B, lora.scale

    def forward(self, x):
        return self.linear(x) + self.scale * ((x @ self.A.T * self.m) @ self.B.T)


class Obvious(nn.Module):
    """The model of ouroboros.py, with its weights, as one would first write it: on transformers' layers, a module for
    each part, all logits at once, and everything in one type."""
    def __init__(self, ours: Ouroboros, qwen: Qwen):
        super().__init__()
        self.hf, self.depth, controller = transformers_model(qwen), ours.depth, ours.controller
        layers, self.recurrent = self.hf.model.layers, self.hf.model.layers[ours.settings["recurrent"]]
        self.prelude, self.coda = layers[: len(ours.prelude)], layers[-len(ours.coda) :]
        for name, lora in zip(PROJECTIONS, ours.lora):
            self.recurrent.set_submodule(name, ObviousLinear(self.recurrent.get_submodule(name), lora))

        def linear(weight, bias=None):
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            module.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            return module

        self.pooled, self.join, self.last = (
            linear(part.weight, part.bias) for part in (controller.reduce, controller.join, controller.narrow))
        self.step = nn.Embedding.from_pretrained(controller.step.weight.detach(), freeze=False)
        self.heads = nn.ModuleList(linear(weight) for weight in controller.heads.weight.chunk(len(PROJECTIONS)))
        self.gate = linear(ours.gate.linear.weight, ours.gate.linear.bias)
        self.norms = nn.ModuleList(nn.RMSNorm(len(w), ours.step_norm.eps) for w in ours.step_norm.weight)
        for norm, weight in zip(self.norms, ours.step_norm.weight):
            norm.weight.data.copy_(weight)
        self.to(qwen.head)

    def loss(self, ids, targets):
        h, positions = self.hf.model.embed_tokens(ids), torch.arange(ids.shape[1], device=ids.device)
        how = {"position_embeddings": self.hf.model.rotary_emb(h, positions[None]), "attention_mask": None}
        for layer in self.prelude:
            h = layer(h, **how)
        for t in range(self.depth):
            p = F.silu(self.pooled((h.float().cumsum(1) / (positions[:, None] + 1)).to(h.dtype)))
            e = self.step(torch.tensor(t, device=ids.device)).expand(*p.shape[:2], -1)
            z = F.silu(self.last(F.silu(self.join(torch.cat([p, e], -1)))))
            for name, head in zip(PROJECTIONS, self.heads):
                self.recurrent.get_submodule(name).m = head(z)
            h_new = self.norms[t](self.recurrent(h, **how))
            g = torch.sigmoid(self.gate(torch.cat([h_new, h], -1)))
            h = g * h_new + (1 - g) * h
        for layer in self.coda:
            h = layer(h, **how)
        logits = self.hf.lm_head(self.hf.model.norm(h))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def load(args, device, dtype) -> Qwen:
    if args.model != "3B":
        return Qwen.from_pretrained(args.model, dtype, device)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        qwen = Qwen(QWEN_3B).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return qwen


def training(kind, args, device, dtype):
    """() -> loss of one whole training step"""
    qwen = load(args, device, dtype)
    model = Ouroboros(qwen, depth=8, rank=32, modulation="static" if kind == STATIC else "controller")
    torch.manual_seed(0)
    for p in model.trained_parameters().values():
        p.data += 0.01 * torch.randn(p.shape).to(p)
    model.checkpointing = kind == RECOMPUTED
    if kind in (OBVIOUS, OBVIOUS_KEEPS):
        model = Obvious(model, qwen)
    if kind == COMPILED:
        model.compile_blocks()
    del qwen
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=None if kind in (OBVIOUS, OBVIOUS_KEEPS) else True)
    random = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(0, 4096, (2, args.batch_size, args.seq_len), generator=random).to(device)

    def step():
        loss = model.loss(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def generation(kind, args, device, dtype, batch_size):
    """() -> 64 new tokens after 64, for each of a batch"""
    qwen = load(args, device, dtype)
    ids = torch.randint(0, 4096, (batch_size, 64), device=device)
    if kind == OURS:
        qwen.config = qwen.config._replace(eos_token_id=())
        return lambda: qwen.generate(ids, max_new_tokens=64)
    hf = transformers_model(qwen)
    mask = torch.ones_like(ids)
    return lambda: hf.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)


def peak_memory(step, device) -> int:
    """Bytes that a step holds at its peak beyond what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def contestant(pipe, make, kind, args, device, dtype, *how):
    if device.type == "cpu" and kind != OBVIOUS:
        keep_freed_memory()
    run = make(kind, args, device, dtype, *how)
    first, _ = run(), run()
    pipe.send(first)
    while (order := pipe.recv()) != "stop":
        torch.cuda.empty_cache()  # for the others; does nothing without a GPU
        if order == "memory":
            pipe.send(peak_memory(run, device))
        else:
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            pipe.send(time.perf_counter() - started)


def compete(make, kinds, args, device, dtype, *how, memory=False) -> dict:
    """kind -> (median seconds, bytes, what the first run gave)"""
    spawn, pipes, first = multiprocessing.get_context("spawn"), {}, {}
    for kind in kinds:  # one after the other: two at once on the same cores wait for each other's threads
        pipes[kind], theirs = spawn.Pipe()
        spawn.Process(target=contestant, args=(theirs, make, kind, args, device, dtype, *how), daemon=True).start()
        theirs.close()  # so that a contestant that fails ends the bench
        first[kind] = pipes[kind].recv()

    def ask(kind, order):
        pipes[kind].send(order)
        return pipes[kind].recv()

    rounds = [[ask(kind, "time") for kind in kinds] for _ in range(args.rounds)]
    peaks = [ask(kind, "memory") if memory else 0 for kind in kinds]
    for pipe in pipes.values():
        pipe.send("stop")
    return {kind: (median(times), peak, first[kind]) for kind, times, peak in zip(kinds, zip(*rounds), peaks)}


# ---- What they are measured by ---------------------------------------------------------------------------------------
def matrix_rate(device, dtype) -> float:
    """FLOP/s of a product of two large random matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * n**3 / median(times[2:])


def flops_per_token(args) -> int:
    """A lower bound: the frozen matrices, forward and, from the recurrent layer on, back to the activations."""
    with torch.device("meta"):
        config = QWEN_3B if args.model == "3B" else Qwen.from_pretrained(args.model, device="meta").config
        model = Ouroboros(Qwen(config), depth=8, rank=32)
    layer = sum(2 * p.numel() for name, p in model.recurrent.named_parameters() if name.endswith("proj.weight"))
    return layer * (len(model.prelude) + 2 * 8 + 2 * len(model.coda)) + 2 * 2 * model.head.numel()


def seconds_to_first_step() -> list:
    """Of two runs of the default command, from the start of the program; the second finds what the first cached."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for name in ("first", "second"):
            command = [sys.executable, "-u", "train.py", "--model", "tiny", "--data", "python", "--steps", "1",
                       "--device", "cpu", "--out", f"{folder}/{name}"]
            started = time.perf_counter()
            with subprocess.Popen(command, cwd=Path(__file__).parents[1], env=os.environ | {"XDG_CACHE_HOME": folder},
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
                next(line for line in program.stdout if line.startswith("1 steps of"))
                seconds.append(time.perf_counter() - started)
                program.stdout.read()
        return seconds


def main():
    device, dtype = pick_device("auto")
    cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="3B" if cuda else "tiny", help="tiny, a folder, a Hub name or 3B")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by hardware")
    parser.add_argument("--batch-size", type=int, default=2 if cuda else 4)
    parser.add_argument("--seq-len", type=int, default=2048 if cuda else 256)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype) if args.dtype else dtype
    tokens = args.batch_size * args.seq_len
    print(f"{args.model}, {device}, {dtype}, torch {torch.__version__}, median of {args.rounds} rounds")

    rate, floor = matrix_rate(device, dtype), flops_per_token(args) * tokens
    print(f"\nA training step, depth 8, rank 32, {args.batch_size} x {args.seq_len} tokens; "
          f"a matrix product alone runs at {rate / 1e9:.0f} GFLOP/s\n")
    print("| | tokens/s | | peak memory above the weights | | of the matrix rate | first loss |\n|" + "---|" * 7)
    kinds = [OBVIOUS, *([COMPILED] if cuda else [OBVIOUS_KEEPS]), OURS, STATIC, RECOMPUTED]
    results = compete(training, kinds, args, device, dtype, memory=True)
    for kind, (seconds, peak, loss) in results.items():
        print(f"| {kind} | {tokens / seconds:.0f} | {results[OBVIOUS][0] / seconds:.2f}x | {peak / 1e6:.0f} MB | "
              f"{peak / results[OBVIOUS][1]:.2f}x | {floor / seconds / rate:.0%} | {loss:.4f} |")
    print(f"\nThe Controller costs {results[OURS][0] / results[STATIC][0] - 1:.1%} over static modulation.")

    print("\nGeneration of 64 tokens after 64, the plain Qwen\n")
    print("| batch | transformers | this project | |\n|---|---|---|---|")
    for batch_size in (1, 8):
        results = compete(generation, ["transformers", OURS], args, device, dtype, batch_size)
        theirs, ours = (64 * batch_size / results[kind][0] for kind in ("transformers", OURS))
        print(f"| {batch_size} | {theirs:.0f} tokens/s | {ours:.0f} tokens/s | {ours / theirs:.2f}x |")

    first, second = seconds_to_first_step()
    print(f"\nFrom the start of train.py to its first step on tiny, CPU: {first:.1f} s, the second time {second:.1f} s")


if __name__ == "__main__":
    exit_on_user_error(main)
