"""The device to compute on, its memory, and the number types to compute in."""

import os
import re
import sys
from pathlib import Path

import torch

from files import UserError
from presets import GPU


def promote(x):
    """x in float32, or unchanged if it is float64 already. bfloat16 is too coarse for long sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def available_devices() -> list[str]:
    """The kinds of device that this machine and this build of torch have, the fastest first."""
    devices = []
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    devices.append("cpu")
    return devices


def pick_device(name="auto") -> torch.device:
    """The device for --device: auto (the fastest there is), cuda, mps, cpu, or one of several, such as
    cuda:1. A CUDA device becomes the current one, and cuDNN's attention is switched off.

    Raises UserError for a device that is not there.
    """
    available = available_devices()
    if name == "auto":
        name = available[0]
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: one GPU for each process

    kind, _, number = name.partition(":")
    problem = None
    if kind not in available or not re.fullmatch(r"(:\d+)?", name[len(kind) :]):
        problem = "not a device of this machine"
    elif kind == "cuda" and int(number) >= torch.cuda.device_count():
        problem = f"there are {torch.cuda.device_count()} CUDA devices"
    elif kind == "cpu" and number not in ("", "0"):
        problem = "the CPU is one device"
    if problem:
        choices = ", ".join(available)
        raise UserError(
            f"--device {name}: cannot be used ({problem}); this machine and this torch have {choices}"
        )
    if kind == "cuda":
        torch.cuda.set_device(int(number))  # for all that is asked of "the current device"
        # Some versions of cuDNN's attention give wrong values where there are few key-value heads
        # (pytorch issue 193893), and each new length costs it time.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the frozen weights for --dtype: float32, bfloat16 or auto.

    auto is bfloat16 where the hardware multiplies it natively and float32 elsewhere.
    """
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """The name of a number type in options and tables, such as float32."""
    return str(dtype).removeprefix("torch.")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 natively: CUDA since Ampere, and a CPU that Linux says can."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and sys.platform == "linux":
        return bool(re.search("avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text()))
    return False


def gpu_of(device: torch.device) -> GPU | None:
    """What the defaults have to know of this device, or None if it is not a CUDA GPU."""
    if device.type != "cuda":
        return None
    return GPU(torch.cuda.get_device_properties(device).total_memory, multiplies_bfloat16(device))


def free_memory(device: torch.device) -> int:
    """The bytes of a CUDA GPU that this process can have: those that are free and those that it holds."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
