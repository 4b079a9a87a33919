"""The checks of gpu_check.py that ask how fast the program is on a device, and what follows from them.

Each takes a Setting and returns (lines of the table, numbers for the summary).
"""

import importlib.util
import os
import shutil
import time
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from device import name_of
from experiments.contestants import (
    COMPILED,
    COMPILED_RECOMPUTED,
    COMPILED_STATIC,
    DEPTH,
    OBVIOUS,
    OURS,
    RANK_OF_LORA,
    STATIC,
    Kind,
    config_of,
    flops_per_token,
    generation,
    generation_of_transformers,
    load_model,
    matrix_rate,
    model_and_loss,
    seconds_of,
    training,
)
from experiments.gpu_setting import MEASURED, NOT_RUN, Line, Setting, verdict
from fast import recompute_activations
from memory import MARGIN, meta_twin, training_peak
from ouroboros import Ouroboros

BATCH_SIZE = 2  # the sequences of a training step
# The kinds of steps that summary() compares.
KINDS = (OBVIOUS, OURS, STATIC, COMPILED, COMPILED_STATIC, COMPILED_RECOMPUTED)

# What the paper's command has to reach, with Qwen2.5-3B and 2 sequences of 2,048 tokens, on a large GPU.
LEAST_MATRIX_SHARE = 0.45
LEAST_SPEED = 2.0  # times the obvious way
MOST_MEMORY = 12e9  # bytes
MOST_MEMORY_RECOMPUTED = 5e9

# Relative, in bfloat16, of a first step that is compiled and one that is not.
LARGEST_CHANGE_OF_LOSS = 1e-3
LARGEST_CHANGE_OF_NORM = 0.05


def step_name(model: str, kind: Kind) -> str:
    return f"{model}, a step, {kind.name}"


def matrix_product(setting: Setting):
    """The rate of a large matrix product alone, with which that of a step is compared."""
    rate = matrix_rate(setting.device, setting.dtype)
    return [Line(name_of(setting.dtype), f"{rate / 1e12:.3g} TFLOP/s", MEASURED)], {"rate": rate}


def training_step(setting: Setting, name: str, kind: Kind):
    """Speed and memory of a whole training step of a kind."""
    needs = what_is_missing(setting, kind)
    if needs:
        return [Line("", f"needs {needs}", NOT_RUN)], {}
    model, loss_of = model_and_loss(kind, load_model(name, setting.device, setting.dtype))
    step = training(model, loss_of, BATCH_SIZE, setting.seq_len)

    started = time.perf_counter()
    first_loss, first_norm = step()
    seconds_to_first = time.perf_counter() - started
    step()
    rounds = 3 if setting.small else 10
    seconds = median(seconds_of(step, setting.device) for _ in range(rounds))
    tokens_per_s = BATCH_SIZE * setting.seq_len / seconds

    numbers = {
        "tokens/s": tokens_per_s,
        "first loss": first_loss,
        "first gradient norm": first_norm,
        "seconds to first": seconds_to_first,
    }
    result = f"{tokens_per_s:,.0f} tokens/s"
    if kind.compiled:
        result += f" after {seconds_to_first:.0f} s for the first step"
    lines = [Line("", result, MEASURED)]
    if setting.on_cuda:
        memory_lines, numbers["peak"] = memory_of(step, model, kind, setting)
        lines += memory_lines
    return lines, numbers


def what_is_missing(setting: Setting, kind: Kind) -> str | None:
    """What a kind of step needs that is not installed here."""
    if kind.obvious and importlib.util.find_spec("transformers") is None:
        return "transformers"
    if kind.compiled and not setting.on_cuda and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "a C++ compiler"
    return None


def memory_of(step, model, kind: Kind, setting: Setting):
    """(lines, bytes) of the memory of a step on CUDA at its peak, beside what memory.py counts."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    reserved = torch.cuda.max_memory_reserved()  # with what lies between the tensors
    lines = [Line("peak memory", f"{peak / 1e9:.2f} GB with the weights", MEASURED)]
    if not kind.obvious:
        counted = counted_peak(model, kind, setting)
        result = f"{reserved / 1e9:.2f} GB are taken from the GPU, {counted / 1e9:.2f} GB were counted"
        # what a small step takes is mostly workspaces, of one size for all steps
        found = MEASURED if setting.small else verdict(reserved <= MARGIN * counted)
        lines.append(Line("memory counted beforehand", result, found))
    return lines, peak


def counted_peak(model, kind: Kind, setting: Setting) -> int:
    """The peak of the step as memory.py counts it."""
    twin, full = meta_twin(model)
    if kind.recomputed:
        recompute_activations(twin)
    return training_peak(twin, BATCH_SIZE, setting.seq_len, full, kind.distill)


def step_with_cudnn(setting: Setting):
    """The compiled step with the attention of cuDNN where it takes the inputs. device.py switches it off."""
    if setting.dtype != torch.bfloat16:
        return [Line("", "needs bfloat16", NOT_RUN)], {}
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(backends, set_priority=True):
        lines, numbers = training_step(setting, setting.largest, COMPILED)
    return lines[:1], numbers


def profile(setting: Setting):
    """The kernels that take the most time in a compiled step."""
    model, loss_of = model_and_loss(COMPILED, load_model(setting.largest, setting.device, setting.dtype))
    step = training(model, loss_of, BATCH_SIZE, setting.seq_len)
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    total = sum(event.self_device_time_total for event in events)
    if total == 0:
        return [Line("", "needs the right to profile", NOT_RUN)], {}
    lines = []
    for event in events[:10]:
        share = event.self_device_time_total / total
        lines.append(Line(event.key[:80], f"{share:.1%} in {event.count} calls", MEASURED))
    return lines, {event.key: event.self_device_time_total for event in events[:40]}


def generation_speed(setting: Setting, batch_size: int):
    """Tokens per second of the full model, in this program and in transformers, and of the looped model."""
    qwen = load_model(setting.largest, setting.device, setting.dtype)
    looped = Ouroboros(qwen, depth=DEPTH, rank=RANK_OF_LORA)
    works = {
        "the full model": generation(qwen, batch_size, setting.new_tokens),
        f"looped, depth {DEPTH}": generation(looped, batch_size, setting.new_tokens),
    }
    if importlib.util.find_spec("transformers") is not None:
        theirs = generation_of_transformers(qwen, batch_size, setting.new_tokens)
        works["the full model, transformers"] = theirs
    lines = []
    numbers = {}
    for name, work in works.items():
        work()
        seconds = median(seconds_of(work, setting.device) for _ in range(3))
        numbers[name] = batch_size * setting.new_tokens / seconds
        lines.append(Line(f"{setting.largest}, {name}", f"{numbers[name]:,.0f} tokens/s", MEASURED))
    return lines, numbers


# ---- In sum ----------------------------------------------------------------------------------------------

SHARE = "share of the matrix rate"
SPEED = "beside the obvious way"
FIRST_STEP = "the first step, compiled and not"
PEAK = "peak memory, compiled"
PEAK_RECOMPUTED = "peak memory, compiled, with activation checkpointing"


def summary(results: dict, setting: Setting) -> list[Line]:
    """What follows from several rows. results: {row: {"numbers": {...}}}

    On a large GPU, this is where the paper's command has to reach what is asked of it.
    """
    model = setting.largest
    steps = {kind: numbers_of(results, step_name(model, kind)) for kind in KINDS}
    ours = steps[OURS]
    compiled = steps[COMPILED]
    recomputed = steps[COMPILED_RECOMPUTED]
    obvious = steps[OBVIOUS]
    rate = numbers_of(results, "matrix product").get("rate")

    found = {}  # {what: (its result, whether it is as asked)}
    if compiled and rate:
        share = compiled["tokens/s"] * flops_per_token(config_of(model)) / rate
        found[SHARE] = (f"{share:.0%}", share >= LEAST_MATRIX_SHARE)
    if compiled and obvious:
        times = compiled["tokens/s"] / obvious["tokens/s"]
        found[SPEED] = (f"{times:.2f} times as fast", times >= LEAST_SPEED)
    if compiled and ours:
        loss = abs(compiled["first loss"] / ours["first loss"] - 1)
        norm = abs(compiled["first gradient norm"] / ours["first gradient norm"] - 1)
        holds = loss < LARGEST_CHANGE_OF_LOSS and norm < LARGEST_CHANGE_OF_NORM
        found[FIRST_STEP] = (f"its loss differs by {loss:.1e}, its gradient norm by {norm:.1e}", holds)
    if "peak" in compiled:
        found[PEAK] = (f"{compiled['peak'] / 1e9:.2f} GB", compiled["peak"] <= MOST_MEMORY)
    if "peak" in recomputed:
        holds = recomputed["peak"] <= MOST_MEMORY_RECOMPUTED
        found[PEAK_RECOMPUTED] = (f"{recomputed['peak'] / 1e9:.2f} GB", holds)

    lines = []
    for what in (SHARE, SPEED, FIRST_STEP, PEAK, PEAK_RECOMPUTED):
        if what not in found:
            lines.append(Line(f"{model}, {what}", "needs a row that has not run", NOT_RUN))
            continue
        result, holds = found[what]
        is_asked = setting.is_large or what == FIRST_STEP
        lines.append(Line(f"{model}, {what}", result, verdict(holds) if is_asked else MEASURED))

    for kind, static in ((OURS, STATIC), (COMPILED, COMPILED_STATIC)):
        if steps[kind] and steps[static]:
            cost = steps[static]["tokens/s"] / steps[kind]["tokens/s"] - 1
            lines.append(Line(f"{model}, the Controller's cost, {kind.name}", f"{cost:.1%}", MEASURED))
    return lines


def numbers_of(results: dict, row: str) -> dict:
    """Those of a row; empty if it failed or has not run."""
    return results.get(row, {"numbers": {}})["numbers"]
