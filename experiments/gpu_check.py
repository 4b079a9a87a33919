"""Check the program on a GPU, in about ten minutes and without a network: python experiments/gpu_check.py

The table is printed as it grows and written to OUT/table.md; the exit code is 1 if a check failed. The models
are tiny, and random weights in the shapes of Qwen2.5-0.5B and, where the GPU has room for it, of Qwen2.5-3B.
Without a GPU, --device cpu --small checks what needs none.
"""

import gc
import subprocess
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentParser
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train
from ouroboros import Ouroboros, prefix_mean
from patch import Patched, distillation_loss
from qwen import PROJECTIONS, Config, Qwen, rotary_at
from support import fast
from support.files import one_line, run_program, write_text
from support.machine import pick_device, pick_dtype
from support.options import PAPER_MODEL, default_model
from support.run import read_log

DEPTH = 8
RUN = "--model tiny --compile off --depth 2 --seq-len 64 --batch-size 2 --steps 30 --eval-sequences 4"
TOKENS = torch.randint(0, 4096, (2, 2, 2048), generator=torch.Generator().manual_seed(1))  # ids and targets
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # the largest relative error
SIZES = {
    "tiny": Config(4096, 192, 512, 12, 6, 2, 32, tie_word_embeddings=True),
    "0.5B": Config(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True),
    "3B": Config(151936, 2048, 11008, 36, 16, 2, 128, tie_word_embeddings=True),
}

# ---- Is it right? ----------------------------------------------------------------------------------------


def relative_error(value, expected) -> float:
    value, expected = value.double().cpu(), expected.double().cpu()
    return ((value - expected).norm() / expected.norm()).item()


def looped_model(kind, dtype, device):
    """(a looped model on tiny, its full model), with the same random weights in every type and place."""
    torch.compiler.reset()  # it compiles a function only so many times
    torch.manual_seed(0)
    original = kind(Qwen.from_pretrained("tiny", torch.float64), depth=DEPTH)
    for p in original.trained_parameters().values():
        p.data += 0.05 * torch.randn(p.shape)  # so that no part is without effect
    full = Qwen.from_pretrained("tiny", dtype, device)
    model = kind(full, depth=DEPTH)
    model.restore(original.saved_tensors())
    return model, full


def values_of(model, full) -> dict:
    """{what: tensor} of the loss, all gradients, and the logits of a text that is read piece by piece."""
    ids, targets = TOKENS[:, :, :128].to(model.norm.weight.device)
    if isinstance(model, Patched):
        loss = distillation_loss(model, full, 0.5, ids, targets)
    else:
        loss = model.loss(ids, targets)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.trained_parameters().values()])

    cache = model.new_cache()
    pieces = ids.split([112, 8] + 8 * [1], dim=1)  # a prompt, several tokens at once, single ones
    with torch.no_grad(), fast.eager():
        logits = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
    return {"loss": loss.detach(), "gradients": gradients, "logits with a cache": logits}


def precision(device, compiled=False):
    """Loss, gradients and logits beside those in float64 on the CPU."""
    for kind in (Ouroboros, Patched):
        model, full = looped_model(kind, torch.float64, "cpu")
        exact = values_of(model.double(), full)
        for dtype, tolerance in TOLERANCE.items():
            model, full = looped_model(kind, dtype, device)
            if compiled:
                fast.compile_blocks(model, full)
            for what, value in values_of(model, full).items():
                error = relative_error(value, exact[what])
                name = f"{kind.__name__}, {str(dtype)[6:]}, {what}"
                yield name, f"relative error {error:.1e}, at most {tolerance:g}", error < tolerance


def compilations(device):
    """How many graphs torch.compile makes of a model as the depth grows, and its breaks."""
    counters = torch._dynamo.utils.counters
    ids, targets = TOKENS[:, :, :64].to(device)
    for kind in (Ouroboros, Patched):
        model, _ = looped_model(kind, torch.bfloat16, device)
        fast.replace_blocks(model, partial(torch.compile, backend="eager"))  # the same graphs, not optimised
        counters.clear()
        for depth in (1, 2, DEPTH):
            model.loss(ids, targets, depth=depth).backward()
        graphs = counters["stats"]["unique_graphs"]
        breaks = sum(counters["graph_break"].values())
        yield kind.__name__, f"{graphs} graphs, {breaks} graph breaks", graphs <= 4 and breaks == 0


def short_run(device, run: Path) -> list[str]:
    """A command line that trains tiny on the source code of this program."""
    text = run.with_name("text.txt")
    write_text(text, "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))))
    return [*RUN.split(), "--data", str(text), "--device", str(device), "--out", str(run)]


def waits(device, folder: Path):
    """How often an optimizer step waits for the GPU, by torch's own warnings."""
    counts = []
    torch.cuda.set_sync_debug_mode("warn")
    for steps in ("10", "20"):  # what comes before the first step and after the last is in both
        argv = short_run(device, folder / f"waits-{steps}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.main([*argv, "--steps", steps, "--accumulation", "2"])
        counts.append(sum("called a synchronizing" in str(warning.message) for warning in caught))
    torch.cuda.set_sync_debug_mode("default")
    waits_of_a_step = (counts[1] - counts[0]) / 10
    yield "in an optimizer step", f"{waits_of_a_step:g}", waits_of_a_step == 1


def out_of_memory(device, folder: Path):
    """A run that gets 200 MB of the GPU has to end with an error in which run_program finds the reason."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(2e8 / total, device)
    result = "no error"
    try:
        train.main([*short_run(device, folder / "large"), "--batch-size", "32", "--seq-len", "1024"])
    except RuntimeError as error:
        result = one_line(error)
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    yield "with 200 MB", result[:60], "out of memory" in result


def killed_run(device, folder: Path):
    """A run that is killed and resumed, beside one that was left alone."""
    killed = folder / "killed"
    train.main(short_run(device, folder / "alone"))
    command = [sys.executable, "train.py", *short_run(device, killed), "--save-every", "10"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(read_log(killed)) < 15:
        time.sleep(0.01)
    process.kill()
    process.wait()
    train.main(["--resume", str(killed)])
    losses = [[row["loss"] for row in read_log(run)] for run in (folder / "alone", killed)]
    difference = mean(abs(a - b) for a, b in zip(*losses, strict=True))
    # some kernels of CUDA add in an order that changes
    yield "all steps", f"the losses differ by {difference:.1e} on average", difference <= 0.02


# ---- Is it fast? -----------------------------------------------------------------------------------------


def released_recipe(ours: Ouroboros, full: Qwen):
    """A function of ids and targets [B, T]: the loss of an Ouroboros as one would first write it, with the
    layers of transformers, all logits at once and everything in one type. The rest is from `ours`.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = asdict(replace(full.config, eos_token_id=None))
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    with torch.device("meta"):
        hf = Qwen2ForCausalLM(Qwen2Config(**shape, rope_parameters=rope))
    tensors = {f"model.{name}": tensor for name, tensor in full.state_dict().items()}
    hf.load_state_dict(tensors, strict=False, assign=True)
    hf.requires_grad_(False)
    embed, norm = hf.model.embed_tokens, hf.model.norm
    prelude = hf.model.layers[: len(ours.prelude)]
    recurrent = hf.model.layers[ours.settings["recurrent"]]
    coda = hf.model.layers[-len(ours.coda) :]
    ours.to(full.norm.weight)
    m = {}  # the diagonals of a step

    def add_update(k, projection, inputs, output):
        return output + ours.lora[k](inputs[0], m[k])

    for name, projection in recurrent.named_modules():
        k = name.rpartition(".")[2]
        if k in PROJECTIONS:
            projection.register_forward_hook(partial(add_update, k))

    def loss(ids, targets):
        h = embed(ids)
        count = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        cos, sin = rotary_at(ours.config, 0, ids.shape[1], ids.device)
        rotary = (cos[None].to(h.dtype), sin[None].to(h.dtype))
        for layer in prelude:
            h = layer(h, position_embeddings=rotary)
        for t in range(DEPTH):
            pooled = h.float().cumsum(1) / count[:, None]
            m.update(ours.controller(pooled.to(h.dtype), t))
            h_new = ours.step_norm(recurrent(h, position_embeddings=rotary), t)
            g = ours.gate(h_new, h)
            h = g * h_new + (1 - g) * h
        for layer in coda:
            h = layer(h, position_embeddings=rotary)
        logits = F.linear(norm(h), embed.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss


def seconds_of(work) -> float:
    """The mean time of some work, after two rounds that do not count."""
    return Timer("work()", globals={"work": work}).timeit(5).mean


def full_model(size: str, device) -> Qwen:
    """Random weights in the shapes of tiny or of a Qwen2.5."""
    torch.manual_seed(0)
    with torch.device("meta"):
        full = Qwen(SIZES[size]).to(pick_dtype("auto", device))
    full.to_empty(device=device)
    for p in full.parameters():
        nn.init.normal_(p, std=0.02)
    return full.requires_grad_(False)


def training_step(device, size, recipe=False, compiled=False, checkpointed=False):
    """Speed and peak memory of a whole training step, of 2 sequences of 2,048 tokens."""
    full = full_model(size, device)
    model = Ouroboros(full, depth=DEPTH)
    loss_of = released_recipe(model, full) if recipe else model.loss
    if compiled:
        fast.compile_blocks(model)
    if checkpointed:
        fast.recompute_activations(model)
    del full  # and with it the layers that were cut out
    parameters = model.trained_parameters().values()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids, targets = TOKENS[:, :, : 2048 if device.type == "cuda" else 64].to(device)

    def step():
        loss = loss_of(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    loss = step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = f"loss {loss:.4f}, {ids.numel() / seconds_of(step):,.0f} tokens/s"
    if device.type == "cuda":
        result += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at the peak"
    yield size, result, loss < 100


def kernels(device, size):
    """The speed of a matrix product, of the head and its loss, and of the prefix mean."""
    head = full_model(size, device).head_weight
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=head.dtype)
    rate = 2 * n**3 / seconds_of(lambda: a @ b)
    yield f"product of {n} x {n}", f"{rate / 1e12:.3g} TFLOP/s", True

    h = torch.randn(4096, head.shape[1], device=device, dtype=head.dtype, requires_grad=True)
    targets = TOKENS[0].flatten().to(device)
    for chunk in (256, 512, 1024, 2048):
        fast.HEAD_CHUNK[device.type] = chunk
        seconds = seconds_of(lambda: fast.head_cross_entropy(h, head, targets))
        yield f"head of {size}, chunks of {chunk}", f"{1000 * seconds:.1f} ms", True

    def in_blocks(h):
        sums = h.float().unflatten(1, (-1, 64)).cumsum(2)  # [B, 32, 64, d]
        before = sums[:, :-1, -1:].cumsum(1)  # the sum of all blocks before each but the first
        sums = sums + F.pad(before, (0, 0, 0, 0, 1, 0))
        count = torch.arange(1, h.shape[1] + 1, device=h.device)
        return (sums.flatten(1, 2) / count[:, None]).to(h.dtype)

    h = torch.randn(2, 2048, 2048, device=device, dtype=torch.bfloat16)
    for name, form in {"as it is": prefix_mean, "in 32 blocks": in_blocks}.items():
        if device.type == "cuda":
            form = torch.compile(form)
        seconds = seconds_of(partial(form, h))
        yield f"prefix mean of 2 x 2,048 states of 3B, {name}", f"{1000 * seconds:.2f} ms", True


# ---- The program -----------------------------------------------------------------------------------------


def lines_of(checks):
    """Run the checks, and yield the lines of the table.

    checks: pairs of a name and a generator of (what, result, whether it is as it should be).
    """
    yield "| check | of | result | verdict |"
    yield "|---|---|---|---|"
    for name, check in checks:
        try:
            for what, result, holds in check:
                yield f"| {name} | {what} | {result} | {'ok' if holds else 'FAILED'} |"
        except (RuntimeError, ImportError) as error:  # torch's, or no transformers; the others go on
            yield f"| {name} | | {one_line(error)} | FAILED |"
        torch.compiler.reset()
        gc.collect()  # a compiled model refers to itself


def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], usage=SUPPRESS)
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, or cpu with --small. [the GPU]")
    parser.add_argument("--small", action="store_true", help="Only models of the size of tiny.")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="The folder for the table.")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    on_cuda = device.type == "cuda"
    sizes = ["tiny"]
    if on_cuda and not options.small:
        sizes = ["0.5B", "3B"] if default_model(device) == PAPER_MODEL else ["0.5B"]

    terminal = sys.stdout
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # what the trainings print
        checks = [
            ("precision", precision(device)),
            ("compilations", compilations(device)),
            ("killed and resumed", killed_run(device, Path(folder))),
        ]
        if on_cuda:
            checks.append(("precision, compiled", precision(device, compiled=True)))
            checks.append(("waits for the GPU", waits(device, Path(folder))))
            checks.append(("out of memory", out_of_memory(device, Path(folder))))
        for size in sizes:
            step = partial(training_step, device, size)
            checks.append(("step", step()))
            if on_cuda:
                checks.append(("step, compiled", step(compiled=True)))
                checks.append(("step, compiled, checkpointed", step(compiled=True, checkpointed=True)))
            checks.append(("step, the released recipe", step(recipe=True)))
        checks.append(("speed", kernels(device, sizes[-1])))

        table = ""
        for line in lines_of(checks):
            print(line, file=terminal, flush=True)
            table += line + "\n"
            write_text(options.out / "table.md", table)
    return 1 if "FAILED" in table else 0


if __name__ == "__main__":
    run_program(main)
