"""Check the program on a GPU, in about ten minutes and without a network: python experiments/gpu_check.py

The table is printed as it grows and written to OUT/table.md; the exit code is 1 if a row failed. The models
are tiny, and random weights in the shapes of Qwen2.5-0.5B and, where the GPU has room for it, of Qwen2.5-3B.
The released recipe needs transformers. Without a GPU, --device cpu --small checks what needs none on tiny.
"""

import gc
import os
import subprocess
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentParser
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train
from ouroboros import Ouroboros, prefix_mean
from patch import Patched, distillation_loss
from qwen import PROJECTIONS, Config, Qwen, rotary_at
from support import fast
from support.files import check_choice, is_out_of_memory, one_line, run_program, write_text
from support.machine import pick_device, pick_dtype
from support.options import PAPER_MODEL, default_model
from support.run import read_log

DEPTH = 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # the largest relative error
SIZES = {
    "0.5B": Config(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True),
    "3B": Config(151936, 2048, 11008, 36, 16, 2, 128, tie_word_embeddings=True),
}

# ---- Is it right? ----------------------------------------------------------------------------------------
#
# A row is a function of the device and of `small` that yields (what, result, whether it is as it should be).


def forget():
    """Free what is compiled and what no variable holds any more, so that each model begins alike."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def random_tokens(*shape):
    """The same tokens each time, on the CPU."""
    return torch.randint(0, 4096, shape, generator=torch.Generator().manual_seed(1))


def relative_error(value, expected) -> float:
    value, expected = value.double().cpu(), expected.double().cpu()
    return ((value - expected).norm() / expected.norm()).item()


def looped_model(kind, dtype, device):
    """(a looped model on tiny, its full model), with the same random weights in every type and place."""
    forget()
    torch.manual_seed(0)
    original = kind(Qwen.from_pretrained("tiny", torch.float64), depth=DEPTH)
    for p in original.trained_parameters().values():
        p.data += 0.05 * torch.randn(p.shape)  # so that no part is without effect
    full = Qwen.from_pretrained("tiny", dtype, device)
    model = kind(full, depth=DEPTH)
    model.restore(original.saved_tensors())
    return model, full


def values_of(model, full, length: int) -> dict:
    """{what: tensor} of the logits, the loss and all gradients."""
    ids, targets = random_tokens(2, 2, length).to(model.norm.weight.device)
    if isinstance(model, Patched):
        loss = distillation_loss(model, full, 0.5, ids, targets)
    else:
        loss = model.loss(ids, targets)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.trained_parameters().values()])
    return {"logits": model(ids).detach(), "loss": loss.detach(), "gradients": gradients}


@torch.no_grad()
def logits_with_cache(model, length: int):
    """The logits of the same text, read as a prompt, then several tokens at once, then one by one."""
    ids, _ = random_tokens(2, 2, length).to(model.norm.weight.device)
    cache = model.new_cache()
    pieces = ids.split([length - 16, 8] + 8 * [1], dim=1)
    with fast.eager():
        return torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)


def precision(device, small, compiled=False):
    """Logits, loss and gradients beside those in float64 on the CPU."""
    length = 64 if small else 256
    for kind in (Ouroboros, Patched):
        model, full = looped_model(kind, torch.float64, "cpu")
        exact = values_of(model.double(), full, length)
        exact["logits with a cache"] = exact["logits"]
        for dtype, tolerance in TOLERANCE.items():
            model, full = looped_model(kind, dtype, device)
            if compiled:
                fast.compile_blocks(model, full)
            values = values_of(model, full, length)
            values["logits with a cache"] = logits_with_cache(model, length)
            for what, value in values.items():
                error = relative_error(value, exact[what])
                name = f"{kind.__name__}, {str(dtype)[6:]}, {what}"
                yield name, f"relative error {error:.1e}, at most {tolerance:g}", error < tolerance


def compilations(device, small):
    """How many graphs torch.compile makes of a model as the depth grows to 16, and its breaks."""
    counters = torch._dynamo.utils.counters
    ids, targets = random_tokens(2, 2, 64).to(device)
    for kind in (Ouroboros, Patched):
        forget()
        counters.clear()
        model = kind(Qwen.from_pretrained("tiny", pick_dtype("auto", device), device), depth=16)
        fast.replace_blocks(model, partial(torch.compile, backend="eager"))  # the same graphs, not optimised
        for depth in (1, 2, 16):
            model.loss(ids, targets, depth=depth).backward()
        graphs = counters["stats"]["unique_graphs"]
        breaks = sum(counters["graph_break"].values())
        yield kind.__name__, f"{graphs} graphs, {breaks} graph breaks", graphs <= 4 and breaks == 0


def short_run(device, small, run: Path, steps: int) -> list[str]:
    """A command line of train.py for a short run of tiny on the source code of this program."""
    text = run.with_name("text.txt")
    write_text(text, "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))))
    options = f"--model tiny --steps {steps} --eval-every {steps} --eval-sequences 4 --compile off".split()
    if small:
        options += ["--seq-len", "64", "--batch-size", "2", "--depth", "2"]
    return [*options, "--data", str(text), "--device", str(device), "--out", str(run)]


def train_silently(*argv):
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        train.main(argv)


def waits(device, small):
    """How often an optimizer step waits for the GPU, by torch's own warnings."""
    counts = []
    torch.cuda.set_sync_debug_mode("warn")
    for steps in (3, 6):  # what comes before the first step and after the last is in both
        with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_silently(*short_run(device, small, Path(folder) / "run", steps), "--accumulation", "2")
        counts.append(sum("called a synchronizing" in str(warning.message) for warning in caught))
    torch.cuda.set_sync_debug_mode("default")
    waits_of_a_step = (counts[1] - counts[0]) / 3
    yield "in an optimizer step", f"{waits_of_a_step:g}", waits_of_a_step == 1


def out_of_memory(device, small):
    """A run that gets 200 MB of the GPU has to end with an error that run_program knows."""
    forget()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(2e8 / total, device)
    ended = None
    with TemporaryDirectory() as folder:
        argv = short_run(device, False, Path(folder) / "run", 3)
        try:
            train_silently(*argv, "--batch-size", "32", "--seq-len", "1024")
        except RuntimeError as error:
            ended = error
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    yield "with 200 MB", type(ended).__name__, ended is not None and is_out_of_memory(ended)


def killed_run(device, small):
    """A run that is killed and resumed, beside one that was left alone."""
    steps = 8 if small else 60
    with TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        killed = Path(folder) / "killed"
        saves = ["--save-every", str(steps // 4)]
        train_silently(*short_run(device, small, alone, steps), *saves)

        command = [sys.executable, "train.py", *short_run(device, small, killed, steps), *saves]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(read_log(killed)) <= steps // 2:
            time.sleep(0.01)
        process.kill()
        process.wait()
        train_silently("--resume", str(killed))
        losses = [[row["loss"] for row in read_log(run)] for run in (alone, killed)]
    difference = mean(abs(a - b) for a, b in zip(*losses, strict=True))
    limit = 0.0 if device.type == "cpu" else 0.02  # some kernels of CUDA add in an order that changes
    yield "", f"the losses of the steps differ by {difference:.1e} on average", difference <= limit


# ---- The released model's recipe -------------------------------------------------------------------------


class Recipe(nn.Module):
    """An Ouroboros as one would first write it, made of the weights of one of ours.

    It stands on the layers of transformers, computes all logits at once and everything in one type.
    """

    def __init__(self, ours: Ouroboros, full: Qwen):
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM

        shape = asdict(replace(full.config, eos_token_id=None))
        rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
        with torch.device("meta"):
            hf = Qwen2ForCausalLM(Qwen2Config(**shape, rope_parameters=rope))
        tensors = {f"model.{name}": tensor for name, tensor in full.state_dict().items()}
        hf.load_state_dict(tensors, strict=False, assign=True)
        self.config = full.config
        self.embed_tokens = hf.model.embed_tokens
        self.prelude = hf.model.layers[: len(ours.prelude)]
        self.recurrent = hf.model.layers[ours.settings["recurrent"]]
        self.coda = hf.model.layers[-len(ours.coda) :]
        self.norm = hf.model.norm
        self.requires_grad_(False)

        self.m = {}  # the diagonals of a step, set before the recurrent layer runs
        self.lora = ours.lora
        for name, projection in self.recurrent.named_modules():
            k = name.rpartition(".")[2]
            if k in PROJECTIONS:
                projection.register_forward_hook(partial(self.modulate, k))
        self.controller = ours.controller
        self.gate = ours.gate
        self.step_norm = ours.step_norm
        self.to(full.norm.weight)

    def modulate(self, k, projection, inputs, output):
        return output + self.lora[k](inputs[0], self.m[k])

    def loss(self, ids, targets):
        """The mean cross entropy of targets [B, T], aligned with ids [B, T]."""
        h = self.embed_tokens(ids)
        count = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        cos, sin = rotary_at(self.config, 0, ids.shape[1], ids.device)
        rotary = (cos[None].to(h.dtype), sin[None].to(h.dtype))
        for layer in self.prelude:
            h = layer(h, position_embeddings=rotary)
        for t in range(DEPTH):
            pooled = h.float().cumsum(1) / count[:, None]
            self.m = self.controller(pooled.to(h.dtype), t)
            h_new = self.step_norm(self.recurrent(h, position_embeddings=rotary), t)
            g = self.gate(h_new, h)
            h = g * h_new + (1 - g) * h
        for layer in self.coda:
            h = layer(h, position_embeddings=rotary)
        logits = F.linear(self.norm(h), self.embed_tokens.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- Is it fast? -----------------------------------------------------------------------------------------


def seconds_of(work, device) -> float:
    """The median time of some work, after two rounds that do not count."""
    times = []
    for _ in range(12 if device.type == "cuda" else 4):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[2:])


def matrix_rate(device, small):
    """The speed of a product of two large random matrices."""
    n = 1024 if small else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=pick_dtype("auto", device))
    rate = 2 * n**3 / seconds_of(lambda: a @ b, device)
    yield "", f"{rate / 1e12:.3g} TFLOP/s in {str(a.dtype)[6:]}", True


def full_model(size: str, device) -> Qwen:
    """tiny, or random weights in the shapes of a Qwen2.5."""
    forget()
    dtype = pick_dtype("auto", device)
    if size == "tiny":
        return Qwen.from_pretrained("tiny", dtype, device)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        full = Qwen(SIZES[size]).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    full.embed_tokens.weight.mul_(0.02)  # the head is the same matrix: a usual size for the logits
    return full


def training_step(device, small, size, recipe=False, compiled=False, checkpointed=False):
    """Speed and peak memory of a whole training step, of 2 sequences of 2,048 tokens."""
    full = full_model(size, device)
    model = Ouroboros(full, depth=DEPTH)
    # the least FLOP of a step: from the recurrent layer on, there is a backward pass, too
    layer = 2 * sum(projection.weight.numel() for projection in model.recurrent.projections().values())
    layers = len(model.prelude) + 2 * DEPTH + 2 * len(model.coda)
    flops_per_token = layer * layers + 2 * 2 * model.head_weight.numel()
    if recipe:
        model = Recipe(model, full)
    if compiled:
        fast.compile_blocks(model)
    if checkpointed:
        fast.recompute_activations(model)
    del full  # and with it the layers that were cut out
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids, targets = random_tokens(2, 2, 64 if small else 2048).to(device)

    def step():
        loss = model.loss(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    loss = step()
    rate = ids.numel() / seconds_of(step, device)
    result = f"loss {loss:.4f}, {rate:,.0f} tokens/s, {rate * flops_per_token / 1e12:.3g} TFLOP/s"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        result += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at the peak"
    yield "", result, loss < 100


def head_chunks(device, small, size):
    """The loss of 4,096 positions through the head and its gradient, by the positions of a chunk."""
    head = full_model(size, device).head_weight
    h = torch.randn(4096, head.shape[1], device=device, dtype=head.dtype, requires_grad=True)
    targets = random_tokens(4096).to(device)
    for chunk in (256, 512, 1024, 2048):
        fast.HEAD_CHUNK[device.type] = chunk
        seconds = seconds_of(lambda: fast.head_cross_entropy(h, head, targets), device)
        yield f"{chunk} positions", f"{1000 * seconds:.1f} ms", True


def scan(device, small):
    """The prefix mean of 2 x 2,048 states of 3B, as it is, and with its sum in 32 blocks of 64."""
    h = torch.randn(2, 2048, 2048, device=device, dtype=torch.bfloat16)

    def in_blocks(h):
        sums = h.float().unflatten(1, (-1, 64)).cumsum(2)  # [B, 32, 64, d]
        before = sums[:, :-1, -1:].cumsum(1)  # the sum of all blocks before each but the first
        sums = sums + F.pad(before, (0, 0, 0, 0, 1, 0))
        count = torch.arange(1, h.shape[1] + 1, device=h.device)
        return (sums.flatten(1, 2) / count[:, None]).to(h.dtype)

    forms = {"as it is": prefix_mean, "in blocks": in_blocks}
    if device.type == "cuda":
        forms["as it is, compiled"] = torch.compile(prefix_mean)
        forms["in blocks, compiled"] = torch.compile(in_blocks)
    for name, form in forms.items():
        result = f"{1000 * seconds_of(partial(form, h), device):.2f} ms"
        yield name, result, relative_error(form(h), prefix_mean(h)) < 0.01


# ---- The rows, and the program ---------------------------------------------------------------------------


def rows_of(device, small: bool) -> dict:
    """{name: row} of the rows that can run here, in the order in which they run."""
    on_cuda = device.type == "cuda"
    rows = {
        "precision": precision,
        "compilations": compilations,
        "killed and resumed": killed_run,
        "matrix rate": matrix_rate,
    }
    if on_cuda:
        rows["precision, compiled"] = partial(precision, compiled=True)
        rows["waits for the GPU"] = waits
        rows["out of memory"] = out_of_memory
    sizes = ["tiny"]
    if not small:
        sizes = ["0.5B", "3B"] if default_model(device) == PAPER_MODEL else ["0.5B"]
    for size in sizes:
        step = partial(training_step, size=size)
        if find_spec("transformers") is not None:
            rows[f"step of {size}, the released recipe"] = partial(step, recipe=True)
        rows[f"step of {size}"] = step
        if on_cuda:
            rows[f"step of {size}, compiled"] = partial(step, compiled=True)
            rows[f"step of {size}, compiled, checkpointed"] = partial(step, compiled=True, checkpointed=True)
    rows["chunks of the head"] = partial(head_chunks, size=sizes[-1])
    rows["prefix mean"] = scan
    return rows


def lines_of(rows: dict, device, small: bool):
    """Run the rows, and yield the lines of the table."""
    yield "| check | result | verdict |"
    yield "|---|---|---|"
    for name, row in rows.items():
        try:
            for what, result, holds in row(device, small):
                yield f"| {name} | {what} | {result} | {'ok' if holds else 'FAILED'} |"
        except RuntimeError as error:  # one of torch; the other rows go on
            yield f"| {name} | | {one_line(error)} | FAILED |"


def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], usage=SUPPRESS)
    option = parser.add_argument
    option("--device", default="auto", help="cuda, cuda:1, or cpu. [the GPU]")
    option("--small", action="store_true", help="Only tiny, with short sequences and few steps.")
    option("--out", type=Path, default=Path("gpu-check"), help="The folder for the table. [gpu-check]")
    option("--rows", nargs="+", metavar="ROW", help="Only the rows with these names. [all]")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    small = options.small or device.type != "cuda"
    rows = rows_of(device, small)
    for name in options.rows or []:
        check_choice("--rows", name, rows)
    rows = {name: rows[name] for name in options.rows or rows}

    started = time.monotonic()
    failed = 0
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "table.md", "w", encoding="utf-8") as table:
        for line in lines_of(rows, device, small):
            print(line, flush=True)
            print(line, file=table, flush=True)
            failed += line.endswith("FAILED |")
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes, {failed} failed; torch {torch.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_program(main)
