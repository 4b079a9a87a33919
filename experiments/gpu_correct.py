"""The checks of gpu_check.py that ask whether the program is right on a device.

Each takes a Setting and returns (lines of the table, numbers for the summary).
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch

from data import Batches
from device import name_of
from experiments.contestants import (
    DEPTH,
    RANK_OF_LORA,
    config_of,
    random_tokens,
)
from experiments.gpu_setting import MEASURED, TOLERANCE, Line, Setting, verdict
from fast import compile_blocks
from hub import load_tokenizer
from options import parse_options
from ouroboros import Ouroboros, svd_bases
from patch import Patched, distillation_loss
from qwen import Qwen
from run_folder import read_log
from sources import open_source
from train import train

ROOT = Path(__file__).resolve().parent.parent

# ---- Numbers -----------------------------------------------------------------------------------------------


def randomised(model):
    """The model, with small random changes of what is trained, so that no part is without effect."""
    generator = torch.Generator().manual_seed(0)
    for p in model.trained_parameters().values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator).to(p)
    return model


def looped_models(dtype, device) -> dict:
    """{name: (a looped model on tiny, its loss)} with the same weights for all types and devices."""
    exact = Qwen.from_pretrained("tiny", torch.float64)
    qwen = Qwen.from_pretrained("tiny", dtype, device)
    models = {}
    for name, make in {"the paper's": Ouroboros, "--patch": Patched}.items():
        torch.manual_seed(0)
        original = randomised(make(exact, depth=DEPTH, rank=RANK_OF_LORA))
        found = {k: (lora.A, lora.B) for k, lora in original.lora.items()}  # another device may find others
        model = make(qwen, depth=DEPTH, rank=RANK_OF_LORA, bases=found)
        if dtype == torch.float64:
            model.double()
        values = original.trained_parameters()
        for parameter_name, p in model.trained_parameters().items():
            p.data.copy_(values[parameter_name])
        loss_of = model.loss
        if make is Patched:
            loss_of = partial(distillation_loss, model, qwen, 0.5)
        models[name] = (model, loss_of)
    return models


def values_of(model, loss_of) -> dict:
    """{what: a vector in float64 on the CPU} of the logits, the loss and all gradients."""
    device = model.head_weight.device
    ids, targets = random_tokens(2, 2, 256).to(device)
    loss = loss_of(ids, targets)
    loss.backward()
    gradients = [p.grad.flatten() for p in model.trained_parameters().values()]
    with torch.no_grad():
        logits = model(ids)
    values = {"logits": logits.flatten(), "loss": loss.detach().reshape(1), "gradients": torch.cat(gradients)}
    return {what: value.double().cpu() for what, value in values.items()}


def precision(setting: Setting, compiled: bool):
    """Logits, loss and gradients of the device, and of the CPU, beside those in float64 on the CPU."""
    cpu = torch.device("cpu")
    exact = {name: values_of(*pair) for name, pair in looped_models(torch.float64, cpu).items()}
    lines = []
    for dtype, tolerance in TOLERANCE.items():
        on_device = looped_models(dtype, setting.device)
        on_cpu = looped_models(dtype, cpu)
        for name, expected in exact.items():
            model, loss_of = on_device[name]
            if compiled:
                torch.compiler.reset()
                compile_blocks(model)
            values = values_of(model, loss_of)
            values_of_cpu = values_of(*on_cpu[name])
            for what in expected:
                error = relative_error(values[what], expected[what])
                error_of_cpu = relative_error(values_of_cpu[what], expected[what])
                result = f"relative error {error:.1e} (a CPU: {error_of_cpu:.1e}; at most {tolerance:g})"
                holds = error < tolerance
                lines.append(Line(f"{name}, {name_of(dtype)}, {what}", result, verdict(holds)))
    return lines, {}


def relative_error(value, expected) -> float:
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm()).item()


@torch.no_grad()
def cached_generation(setting: Setting):
    """The states of generation with a cache, beside those of one pass over the whole text; in float32, the
    tokens too.
    """
    lines = []
    for dtype in dict.fromkeys((torch.float32, setting.dtype)):  # one or two
        models = {"the full model": Qwen.from_pretrained("tiny", dtype, setting.device)}
        for name, (model, _) in looped_models(dtype, setting.device).items():
            models[name] = model
        for name, model in models.items():
            model.config = replace(model.config, eos_token_id=())  # nothing ends a text early
            prompt = random_tokens(4, 16).to(setting.device)
            ids = model.generate(prompt, max_new_tokens=48)
            whole = model.hidden(ids)

            cache = model.new_cache()
            states = []
            for piece in ids.split([16, 8] + 40 * [1], dim=1):  # several new tokens at once, too
                states.append(model.hidden(piece, cache))
            error = relative_error(torch.cat(states, dim=1), whole)
            holds = error < TOLERANCE[dtype]
            result = f"relative error of the states {error:.1e}"
            if dtype == torch.float32:
                likeliest = (whole @ model.head_weight.T).argmax(-1)[:, 15:-1]
                same = (likeliest == ids[:, 16:]).sum().item()
                total = ids[:, 16:].numel()
                holds = holds and same == total
                result += f"; {same} of {total} tokens are the same"
            lines.append(Line(f"{name}, {name_of(dtype)}", result, verdict(holds)))
    return lines, {}


def bases(setting: Setting):
    """The SVD bases of a tall and of a wide matrix: orthonormal, and with the energy that the CPU finds.

    The two have the shapes of an up and a down projection of the largest model.
    """
    config = config_of(setting.largest)
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(config.intermediate_size, config.hidden_size, generator=generator)
    lines = []
    for what, R in {"tall": tall, "wide": tall.T.contiguous()}.items():
        A, B = svd_bases(R.to(setting.device), RANK_OF_LORA)
        _, B_of_cpu = svd_bases(R, RANK_OF_LORA)
        error = (A @ A.T - torch.eye(RANK_OF_LORA, device=A.device)).abs().max().item()
        energy = (B.norm().cpu() / B_of_cpu.norm()).item()
        holds = error < 1e-3 and abs(energy - 1) < 1e-3
        result = f"A A^T is the identity to {error:.1e}; the energy is {energy:.6f} of the CPU's"
        lines.append(Line(f"{what}, {list(R.shape)}", result, verdict(holds)))
    return lines, {}


# ---- Compilation -------------------------------------------------------------------------------------------


class CountingBackend:
    """A backend for torch.compile that counts what it is given to compile, and runs it as it is."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward


def compilation(setting: Setting):
    """How often something is compiled while the depth goes from 1 to 16, and what an evaluation and the
    distillation add.

    A graph break is an error here, and so is a function that is compiled more than eight times, which
    torch.compile does not do.
    """
    lines = []
    ids, targets = random_tokens(2, 2, 64).to(setting.device)
    for make in (Ouroboros, Patched):
        torch.compiler.reset()
        backend = CountingBackend()
        full = Qwen.from_pretrained("tiny", setting.dtype, setting.device)
        model = make(full, depth=16)
        compile_blocks(model, full, backend=backend, fullgraph=True)

        counts = []
        for depth in range(1, 17):
            model.loss(ids, targets, depth=depth).backward()
            counts.append(backend.count)
        more = counts[-1] - counts[0]
        result = f"{counts[0]} compilations at depth 1, {more} more up to depth 16; no graph break"
        lines.append(Line(make.__name__, result, verdict(counts[0] <= 3 and more <= 1)))

        distillation_loss(model, full, 0.5, ids, targets).backward()
        with torch.no_grad():
            model.loss(ids[:1], targets[:1])
        more = backend.count - counts[-1]
        result = f"{more} more compilations"
        lines.append(Line(f"{make.__name__}, distillation and an evaluation", result, verdict(more <= 6)))
    return lines, {}


# ---- The program -------------------------------------------------------------------------------------------


def tiny_options(setting: Setting, steps: int) -> list[str]:
    """The options of a short run of tiny."""
    options = ["--model", "tiny", "--data", "python", "--device", str(setting.device)]
    options += ["--steps", str(steps), "--eval-every", str(steps), "--eval-sequences", "8"]
    if setting.small:
        options += ["--seq-len", "64", "--batch-size", "2", "--depth", "2"]
    return options


def start(*command) -> subprocess.Popen:
    """Start Python with these arguments in the root folder. What it prints goes to the row's log."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)


def finish(*command):
    """Run Python with these arguments to its end. Raises CalledProcessError for an exit code other than 0."""
    code = start(*command).wait()
    if code != 0:
        raise subprocess.CalledProcessError(code, command)


def killed_run(setting: Setting):
    """The default command on tiny, killed with SIGKILL and resumed, beside a run that was left alone."""
    steps = 12 if setting.small else 200
    options = [*tiny_options(setting, steps), "--save-every", steps // 4]
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        killed = Path(folder) / "killed"
        started = time.monotonic()
        finish("train.py", *options, "--out", alone)
        seconds = time.monotonic() - started

        process = start("train.py", *options, "--out", killed)
        while process.poll() is None and rows_in_log(killed) < steps // 2 + 1:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        finish("train.py", "--resume", killed)

        losses = [row["loss"] for row in read_log(alone)]
        losses_of_killed = [row["loss"] for row in read_log(killed)]
        speeds = [row["tokens_per_s"] for row in read_log(alone)]

    after_the_kill = list(zip(losses, losses_of_killed))[steps // 2 :]
    difference = mean(abs(a - b) for a, b in after_the_kill)
    limit = 0.02 if setting.on_cuda else 0.0  # some kernels of CUDA add in an order that changes
    holds = code == -signal.SIGKILL and len(losses) == len(losses_of_killed) == steps and difference <= limit
    result = f"the losses of {len(after_the_kill)} steps after that differ by {difference:.1e} on average"
    lines = [Line("killed and resumed", result, verdict(holds))]
    result = f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last"
    lines.append(Line("loss", result, verdict(losses[-1] < losses[0])))
    lines.append(Line("whole command", f"{seconds:.0f} s, {median(speeds):,.0f} tokens/s", MEASURED))
    return lines, {}


def rows_in_log(run: Path) -> int:
    path = run / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def one_process_under_torchrun(setting: Setting):
    """A run of one process that connects to itself, on CUDA by NCCL and otherwise by gloo."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0"]
    options = [*tiny_options(setting, 3), "--compile", "off"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        finish(*torchrun, "train.py", *options, "--out", run)
        steps = rows_in_log(run)
    backend = "NCCL" if setting.on_cuda else "gloo"
    return [Line(f"one process, {backend}", f"{steps} of 3 steps", verdict(steps == 3))], {}


CAPPED = """
import runpy, sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]), sys.argv[2])
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def out_of_memory(setting: Setting):
    """A run that gets 200 MB of the GPU has to end with exit code 2 and one line."""
    share = 2e8 / torch.cuda.get_device_properties(setting.device).total_memory
    options = [*tiny_options(setting, 3), "--compile", "off", "--no-activation-checkpointing"]
    options += ["--batch-size", "64", "--seq-len", "1024"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CAPPED, str(share), str(setting.device)]
        command += ["train.py", *options, "--out", f"{folder}/run"]
        environment = dict(os.environ, PYTHONPATH=str(ROOT))
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    print(result.stdout, result.stderr)
    holds = result.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: out of memory; try")
    holds = holds and "Traceback" not in result.stderr
    shown = f"exit code {result.returncode}: {''.join(errors)[:100]}"
    return [Line("with 200 MB", shown, verdict(holds))], {}


def waits_of_a_step(setting: Setting):
    """How often an optimizer step waits for the GPU, by torch's own warnings."""
    counts = {}
    for steps in (3, 6):  # the evaluations before the first and after the last step are in both
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            train_tiny(setting, steps)
            torch.cuda.set_sync_debug_mode("default")
        messages = [str(warning.message) for warning in caught]
        counts[steps] = sum("called a synchronizing" in message for message in messages)
    waits = (counts[6] - counts[3]) / 3
    return [Line("in an optimizer step", f"{waits:g} times", verdict(waits == 1))], {}


def train_tiny(setting: Setting, steps: int):
    """Train tiny in this process for so many steps of two batches."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*tiny_options(setting, steps), "--accumulation", "2", "--out", f"{folder}/run"]
        options, _ = parse_options(arguments)
        options.out.mkdir()
        qwen = Qwen.from_pretrained("tiny", setting.dtype, setting.device)
        source = open_source("python")
        tokenizer = load_tokenizer("tiny")
        batches = Batches(source, "train", tokenizer, options.seq_len)
        held_out = Batches(source, "val", tokenizer, options.seq_len)
        train(Ouroboros(qwen, depth=options.depth), batches, held_out, options, setting.device)
