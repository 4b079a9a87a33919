"""The rows of gpu_check.py: what each checks, and what has to hold.

A row is a function without arguments that returns (lines of the table, numbers for summary()). All rows that
need no GPU also run on a CPU.
"""

import copy
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from data import Batches
from device import gpu_of, pick_dtype
from experiments.contestants import (
    COMPILED,
    COMPILED_DISTILLED,
    COMPILED_PATCH,
    COMPILED_RECOMPUTED,
    COMPILED_STATIC,
    DEPTH,
    OBVIOUS,
    OURS,
    RANK,
    RECOMPUTED,
    STATIC,
    TRANSFORMERS,
    config_of,
    contestant,
    flops_per_token,
    generation,
    load_model,
    matrix_rate,
    random_tokens,
    seconds_of,
    training,
)
from fast import compile_blocks, recompute_activations
from hub import load_tokenizer
from memory import meta_twin, training_peak
from options import parse_options
from ouroboros import Ouroboros, svd_bases
from patch import Patched, distillation_loss
from presets import PAPER_MODEL, default_model
from qwen import Qwen
from run_folder import read_log
from sources import open_source
from train import train

ROOT = Path(__file__).resolve().parent.parent

# The verdicts.
OK = "ok"
FAILED = "FAILED"
MEASURED = "measured"  # a number, of which nothing is asked
NOT_RUN = "not run"

# What the paper's command has to reach on a large GPU, with Qwen2.5-3B and 2 sequences of 2,048 tokens.
LEAST_MATRIX_SHARE = 0.45
LEAST_SPEED = 2.0  # times the obvious way
MOST_MEMORY = 12e9  # bytes
MOST_MEMORY_RECOMPUTED = 5e9

# The largest relative error beside float64, and of the loss in nats.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    what: str
    result: str
    verdict: str


@dataclass(frozen=True)
class Setting:
    """Where the rows run. small: only with tiny, and with short sequences."""

    device: torch.device
    small: bool

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The type of the frozen weights in what is timed."""
        return pick_dtype("auto", self.device)

    @property
    def models(self) -> list[str]:
        """The models that are timed: the ones that train.py takes by default, up to this GPU's."""
        if self.small:
            return ["tiny"]
        if default_model(gpu_of(self.device)) == PAPER_MODEL:
            return ["0.5B", "3B"]
        return ["0.5B"]

    @property
    def largest(self) -> str:
        return self.models[-1]

    @property
    def seq_len(self) -> int:
        return 64 if self.small else 2048

    @property
    def batch_size(self) -> int:
        return 2

    @property
    def rounds(self) -> int:
        """How often a step is timed."""
        return 3 if self.small else 10

    @property
    def new_tokens(self) -> int:
        """How many tokens are generated after as many of a prompt."""
        return 8 if self.small else 64


def verdict(holds: bool) -> str:
    return OK if holds else FAILED


def rows_of(setting: Setting) -> dict:
    """{name: row}, in the order in which they run: first what is right, then how fast it is."""
    rows = {}

    def row(name: str, function, *arguments):
        rows[name] = partial(function, setting, *arguments)

    def cuda_row(name: str, function, *arguments):
        if setting.on_cuda:
            row(name, function, *arguments)
        else:
            rows[name] = needs_a_gpu

    row("precision", precision)
    row("generation with a cache", cached_generation)
    row("compilation", compilation)
    cuda_row("waiting for the GPU", waits_of_a_step)
    cuda_row("out of memory", out_of_memory)
    row("torchrun", one_process_under_torchrun)
    row("a run that is killed", killed_run)
    row("matrix product", matrix_product)
    for model in reversed(setting.models):  # the largest first
        kinds = [OURS, COMPILED, RECOMPUTED]
        if model == setting.largest:
            kinds = [OBVIOUS, OURS, COMPILED, RECOMPUTED, COMPILED_RECOMPUTED, STATIC, COMPILED_STATIC]
            kinds += [COMPILED_PATCH, COMPILED_DISTILLED]
        row(f"{model}, bases", bases, model)
        for kind in kinds:
            needs_time = kind.startswith(COMPILED) and kind != COMPILED  # each compiles other blocks
            add = cuda_row if needs_time else row
            add(step_name(model, kind), training_step, model, kind)
        if model == setting.largest:
            row("generation, batch of 1", generation_speed, 1)
            row("generation, batch of 8", generation_speed, 8)
            cuda_row("where the time goes", profile)
            cuda_row("cuDNN's attention", step_with_cudnn)
    return rows


def needs_a_gpu():
    return [Line("", "needs a CUDA GPU", NOT_RUN)], {}


def step_name(model: str, kind: str) -> str:
    return f"{model}, a step, {kind.removeprefix('... ')}"


# ---- What is right: numbers ------------------------------------------------------------------------------


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
        original = randomised(make(exact, depth=DEPTH, rank=RANK))
        found = {k: (lora.A, lora.B) for k, lora in original.lora.items()}  # another device may find others
        model = make(qwen, depth=DEPTH, rank=RANK, bases=found)
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


def precision(setting: Setting):
    """Logits, loss and gradients of the device, and of the CPU, beside those in float64 on the CPU."""
    cpu = torch.device("cpu")
    exact = {name: values_of(*pair) for name, pair in looped_models(torch.float64, cpu).items()}
    lines = []
    for dtype, tolerance in TOLERANCE.items():
        on_device = looped_models(dtype, setting.device)
        on_cpu = looped_models(dtype, cpu)
        for name, expected in exact.items():
            values = values_of(*on_device[name])
            values_of_cpu = values_of(*on_cpu[name])
            for what in expected:
                error = relative_error(values[what], expected[what])
                error_of_cpu = relative_error(values_of_cpu[what], expected[what])
                result = f"relative error {error:.1e} (a CPU: {error_of_cpu:.1e}; at most {tolerance:g})"
                type_name = str(dtype).removeprefix("torch.")
                lines.append(Line(f"{name}, {type_name}, {what}", result, verdict(error < tolerance)))
    return lines, {}


def relative_error(value, expected) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@torch.no_grad()
def cached_generation(setting: Setting):
    """Logits and tokens of generation with a cache, beside those of one pass over the whole text."""
    lines = []
    models = looped_models(torch.float32, setting.device)
    qwen = Qwen.from_pretrained("tiny", torch.float32, setting.device)
    for name, model in {"the full model": qwen, **{name: pair[0] for name, pair in models.items()}}.items():
        prompt = random_tokens(4, 16).to(setting.device)
        ids = model.generate(prompt, max_new_tokens=48)

        cache = model.new_cache()
        states = [model.hidden(prompt, cache)]
        for token in ids[:, 16:].split(1, dim=1):
            states.append(model.hidden(token, cache))
        whole = model.hidden(ids)
        error = relative_error(torch.cat(states, dim=1), whole)
        likeliest = (whole @ model.head_weight.T).argmax(-1)[:, 15:-1]
        same = (likeliest == ids[:, 16:]).sum().item()
        total = ids[:, 16:].numel()
        result = f"relative error of the states {error:.1e}; {same} of {total} tokens are the same"
        lines.append(Line(name, result, verdict(error < TOLERANCE[torch.float32] and same == total)))
    return lines, {}


def bases(setting: Setting, name: str):
    """The SVD bases: orthonormal, and with the energy that the CPU finds."""
    config = config_of(name)
    generator = torch.Generator().manual_seed(0)
    R = torch.randn(config.intermediate_size, config.hidden_size, generator=generator)
    A, B = svd_bases(R.to(setting.device), RANK)
    A_cpu, B_cpu = svd_bases(R, RANK)
    error = (A @ A.T - torch.eye(RANK, device=A.device)).abs().max().item()
    energy = (B.norm() / B_cpu.norm().to(B)).item()
    result = f"{list(R.shape)}: A A^T is the identity to {error:.1e}; the energy is {energy:.6f} of the CPU's"
    lines = [Line("", result, verdict(error < 1e-3 and abs(energy - 1) < 1e-3))]

    seconds = seconds_of(lambda: svd_bases(R.to(setting.device), RANK), setting.device)
    lines.append(Line("time for one matrix", f"{seconds:.2f} s", MEASURED))
    return lines, {}


# ---- What is right: compilation --------------------------------------------------------------------------


class CountingBackend:
    """A backend for torch.compile that counts what it is given to compile, and runs it as it is."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward


def compilation(setting: Setting):
    """How often something is compiled while the depth goes from 1 to 16. A graph break is an error here."""
    lines = []
    qwen = Qwen.from_pretrained("tiny", setting.dtype, setting.device)
    ids, targets = random_tokens(2, 2, 64).to(setting.device)
    for make in (Ouroboros, Patched):
        torch.compiler.reset()
        backend = CountingBackend()
        model = make(copy.deepcopy(qwen), depth=16)
        compile_blocks(model, backend=backend, fullgraph=True)
        counts = []
        for depth in range(1, 17):
            model.loss(ids, targets, depth=depth).backward()
            counts.append(backend.count)
        more = counts[-1] - counts[0]
        result = f"{counts[0]} compilations at depth 1, {more} more up to depth 16; no graph break"
        lines.append(Line(make.__name__, result, verdict(counts[0] <= 3 and more <= 1)))
    return lines, {}


# ---- What is right: the program --------------------------------------------------------------------------


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

    difference = max(abs(a - b) for a, b in zip(losses, losses_of_killed))
    limit = 0.05 if setting.on_cuda else 0.0  # some kernels of CUDA add in an order that changes
    holds = code == -signal.SIGKILL and len(losses) == len(losses_of_killed) == steps and difference <= limit
    result = f"the losses of {steps} steps differ by at most {difference:.1e}"
    lines = [Line("killed and resumed", result, verdict(holds))]
    lines.append(
        Line("loss", f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last", verdict(losses[-1] < losses[0]))
    )
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
    if setting.on_cuda:
        options[options.index("--device") + 1] = "cuda"  # the one of the process's number
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
        counts[steps] = sum("synchroniz" in str(warning.message) for warning in caught)
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


# ---- How fast it is --------------------------------------------------------------------------------------


def matrix_product(setting: Setting):
    rate = matrix_rate(setting.device, setting.dtype)
    type_name = str(setting.dtype).removeprefix("torch.")
    return [Line(type_name, f"{rate / 1e12:.3g} TFLOP/s", MEASURED)], {"rate": rate}


def training_step(setting: Setting, name: str, kind: str):
    """Speed and memory of a whole training step of a contestant."""
    if kind == OBVIOUS and importlib.util.find_spec("transformers") is None:
        return [Line("", "needs transformers", NOT_RUN)], {}
    if kind == COMPILED and not setting.on_cuda and shutil.which(os.environ.get("CXX", "g++")) is None:
        return [Line("", "needs a C++ compiler", NOT_RUN)], {}
    model, loss_of = contestant(kind, load_model(name, setting.device, setting.dtype))
    step = training(model, loss_of, setting.batch_size, setting.seq_len)

    started = time.perf_counter()
    first_loss = step()
    seconds_to_first = time.perf_counter() - started
    step()
    seconds = median(seconds_of(step, setting.device) for _ in range(setting.rounds))
    tokens_per_s = setting.batch_size * setting.seq_len / seconds
    numbers = {"tokens/s": tokens_per_s, "first loss": first_loss, "seconds to first": seconds_to_first}
    result = f"{tokens_per_s:,.0f} tokens/s"
    if kind.startswith(COMPILED):
        result += f" after {seconds_to_first:.0f} s for the first step"
    lines = [Line("", result, MEASURED)]

    if setting.on_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        numbers["peak"] = torch.cuda.max_memory_allocated()
        result = f"{numbers['peak'] / 1e9:.2f} GB with the weights"
        if kind != OBVIOUS:
            numbers["counted"] = counted_peak(model, kind, setting)
            result += f"; counted without a GPU {numbers['counted'] / 1e9:.2f} GB"
        lines.append(Line("peak memory", result, MEASURED))
    return lines, numbers


def counted_peak(model, kind: str, setting: Setting) -> int:
    """The peak of the step as memory.py counts it."""
    twin, full = meta_twin(model)
    if kind in (RECOMPUTED, COMPILED_RECOMPUTED):
        recompute_activations(twin)
    distill = 0.5 if kind == COMPILED_DISTILLED else 0.0
    return training_peak(twin, setting.batch_size, setting.seq_len, full, distill)


def step_with_cudnn(setting: Setting):
    """The compiled step with the attention of cuDNN, which device.py switches off."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    lines, numbers = training_step(setting, setting.largest, COMPILED)
    return lines[:1], numbers


def profile(setting: Setting):
    """The kernels that take the most time in a compiled step."""
    model, loss_of = contestant(COMPILED, load_model(setting.largest, setting.device, setting.dtype))
    step = training(model, loss_of, setting.batch_size, setting.seq_len)
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    total = sum(event.self_device_time_total for event in events)
    lines = []
    for event in events[:10]:
        share = event.self_device_time_total / total
        lines.append(Line(event.key[:80], f"{share:.1%} in {event.count} calls", MEASURED))
    return lines, {event.key: event.self_device_time_total for event in events[:40]}


def generation_speed(setting: Setting, batch_size: int):
    """Tokens per second of the full model, in this program and in transformers, and of the looped model."""
    lines = []
    numbers = {}
    qwen = load_model(setting.largest, setting.device, setting.dtype)
    works = {"the full model": generation(OURS, qwen, batch_size, setting.new_tokens)}
    works[f"looped, depth {DEPTH}"] = generation(
        OURS, Ouroboros(qwen, depth=DEPTH, rank=RANK), batch_size, setting.new_tokens
    )
    if importlib.util.find_spec("transformers") is not None:
        theirs = generation(TRANSFORMERS, qwen, batch_size, setting.new_tokens)
        works["the full model, transformers"] = theirs
    for name, work in works.items():
        work()
        seconds = median(seconds_of(work, setting.device) for _ in range(3))
        numbers[name] = batch_size * setting.new_tokens / seconds
        lines.append(Line(f"{setting.largest}, {name}", f"{numbers[name]:,.0f} tokens/s", MEASURED))
    return lines, numbers


# ---- In sum ----------------------------------------------------------------------------------------------


def summary(results: dict, setting: Setting) -> list[dict]:
    """What follows from several rows. results: {row: {"numbers": {...}}}

    What is asked for holds only for the paper's model on CUDA.
    """
    model = setting.largest
    is_asked = model == "3B"
    lines = []

    def numbers_of_row(name: str) -> dict:
        """Those of a row; empty if it failed or has not run."""
        return results.get(name, {"numbers": {}})["numbers"]

    def numbers_of(kind: str) -> dict:
        return numbers_of_row(step_name(model, kind))

    def compare(what: str, result: str, holds: bool):
        lines.append(vars(Line(f"{model}, {what}", result, verdict(holds) if is_asked else MEASURED)))

    ours = numbers_of(OURS)
    compiled = numbers_of(COMPILED)
    fastest = compiled or ours
    obvious = numbers_of(OBVIOUS)
    rate = numbers_of_row("matrix product").get("rate")
    if fastest and rate:
        share = fastest["tokens/s"] * flops_per_token(config_of(model)) / rate
        compare("share of the matrix rate", f"{share:.0%}", share >= LEAST_MATRIX_SHARE)
    if fastest and obvious:
        times = fastest["tokens/s"] / obvious["tokens/s"]
        compare("beside the obvious way", f"{times:.2f} times as fast", times >= LEAST_SPEED)
    if compiled and ours:
        difference = abs(compiled["first loss"] - ours["first loss"])
        compare("first loss, compiled and not", f"differ by {difference:.1e}", difference < 0.05)
    for kind, static in ((OURS, STATIC), (COMPILED, COMPILED_STATIC)):
        if numbers_of(kind) and numbers_of(static):
            cost = numbers_of(static)["tokens/s"] / numbers_of(kind)["tokens/s"] - 1
            line = Line(f"{model}, the Controller's cost over static, {kind}", f"{cost:.1%}", MEASURED)
            lines.append(vars(line))
    for kind, most in ((COMPILED, MOST_MEMORY), (COMPILED_RECOMPUTED, MOST_MEMORY_RECOMPUTED)):
        if "peak" in numbers_of(kind):
            peak = numbers_of(kind)["peak"]
            compare(f"peak memory, {kind}", f"{peak / 1e9:.2f} GB", peak <= most)
    return lines
