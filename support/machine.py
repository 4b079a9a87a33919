"""The machine: its device and number types, the processes that torchrun starts, and signals."""

import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from support.files import UserError, is_out_of_memory

# ---- Devices and number types ----------------------------------------------------------------------------


def pick_device(name="auto") -> torch.device:
    """The device for --device: auto (the fastest there is), cuda, mps, cpu, or one of several, such as
    cuda:1.

    A CUDA device becomes the current one. Under torchrun, each process takes a GPU of its own. Raises
    UserError for a device that is not there.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    for number in range(torch.cuda.device_count()):
        available.insert(number, f"cuda:{number}")

    chosen = available[0] if name == "auto" else name
    if chosen == "cuda":
        chosen = "cuda:0"
    if under_torchrun() and chosen.startswith("cuda"):  # each process has a GPU of its own
        if name.startswith("cuda:"):
            raise UserError(f"--device {name}: torchrun's processes take a GPU each; give cuda")
        chosen = f"cuda:{process_number('LOCAL_RANK')}"
    if chosen not in available:
        raise UserError(f"--device {name}: is not there; this machine and torch have {', '.join(available)}")
    device = torch.device(chosen)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 natively: CUDA since Ampere, and a CPU that Linux says can."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and sys.platform == "linux":
        return re.search("avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text()) is not None
    return False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the frozen weights for --dtype; auto is bfloat16 where the hardware multiplies it."""
    if name == "auto":
        name = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return getattr(torch, name)


def gpu_memory(device: torch.device) -> float:
    """The memory of a CUDA device in bytes; infinite for other devices, which use that of the machine."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory


def faster_threads(work) -> int:
    """The number of threads with which work() takes less time on the CPU: 1, or what torch has chosen.

    Where other programs use the cores, threads that wait for each other can be ten times slower than one.
    """
    most = torch.get_num_threads()
    if most == 1:
        return 1
    seconds = {}
    for number in (most, 1, most, 1):  # the last two count, since a first pass takes longer
        torch.set_num_threads(number)
        started = time.perf_counter()
        work()
        seconds[number] = time.perf_counter() - started
    return min(seconds, key=seconds.get)


# ---- Several processes -----------------------------------------------------------------------------------


def under_torchrun() -> bool:
    """Whether torchrun has started this process. Other programs set RANK and WORLD_SIZE, but not all four."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def process_number(name="RANK") -> int:
    """The number of this process among those that torchrun started; 0 without torchrun.

    LOCAL_RANK: among those of this machine. Raises UserError for numbers that do not fit together.
    """
    if not under_torchrun():
        return 0
    number, count = os.environ.get(name, ""), os.environ["WORLD_SIZE"]
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"{name} {number!r}, WORLD_SIZE {count!r}: do not fit; use torchrun, or unset them")
    return int(number)


class BarStream:
    """Standard error for progress bars, whose reader may go away without ending anything."""

    def write(self, text: str):
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self):
        with suppress(OSError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


def progress(iterable=None, **details) -> tqdm:
    """A progress bar on stderr, in the first process, for what takes longer than a second. See tqdm.

    A file keeps every state of the bar, so that it is drawn there only twice a minute.
    """
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds
    columns = shutil.get_terminal_size().columns
    details = dict(leave=False, delay=1, unit_scale=True, mininterval=interval, ncols=columns) | details
    return tqdm(iterable, file=BarStream(), disable=process_number() > 0, **details)


class Workers:
    """A context of the processes that train together: those that torchrun started, or this one.

    Each takes its share of the sequences of a step, and the gradients are summed, so that a step is the same
    however many there are. Only the first process writes and prints. Raises UserError if the processes cannot
    connect, or if a step has fewer sequences than there are processes.
    """

    def __init__(self, options):
        self.device = pick_device(options.device)
        self.dtype = pick_dtype(options.dtype, self.device)  # of the frozen weights
        self.sequences = options.batch_size * options.accumulation  # of a step, all processes together
        self.number = process_number()
        self.count = 1
        self.is_first = self.number == 0
        self.connected = under_torchrun()
        if not self.connected:
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=15))
        except (RuntimeError, ValueError) as error:
            advice = "check MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
            raise UserError(f"torchrun's processes cannot connect ({error}); {advice}") from error
        self.count = dist.get_world_size()
        if not self.is_first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the program runs)
        if self.sequences < self.count:
            raise UserError(
                f"a step has {self.sequences} sequences for {self.count} processes; give --batch-size and "
                f"--accumulation a product of {self.count} or more"
            )

    def share(self, step: int) -> tuple[int, int]:
        """The sequences of a step that this process takes: the first, and the one after the last."""
        first = self.sequences * self.number // self.count
        end = self.sequences * (self.number + 1) // self.count
        return step * self.sequences + first, step * self.sequences + end

    def sum(self, tensors):
        """Replace each tensor by its sum over all processes, in place.

        One all_reduce of one flat vector. The program does not wait for the device here. Raises UserError if
        another process has ended.
        """
        if self.connected:
            vector = parameters_to_vector(tensors)
            with lost_connection_explained():
                dist.all_reduce(vector)
            vector_to_parameters(vector, tensors)

    def broadcast(self, tensors):
        """Give all processes the tensors of the first one, bit for bit, in place."""
        if self.connected:
            with lost_connection_explained():
                for tensor in tensors:
                    dist.broadcast(tensor.data.view(torch.uint8), 0)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Disconnect. Otherwise a thread of the connection may still run when Python ends."""
        if self.connected:
            dist.destroy_process_group()


@contextmanager
def lost_connection_explained():
    """Turn what is raised where another process is gone into a UserError."""
    try:
        yield
    except RuntimeError as error:
        is_lost = re.search("connection|socket|timed? ?out|nccl", str(error), re.IGNORECASE)
        if is_out_of_memory(error) or not (is_lost or isinstance(error, dist.DistError)):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"another process has ended ({reason}); --resume continues the run") from error


# ---- Signals ---------------------------------------------------------------------------------------------


class StopSignals:
    """Notes Ctrl-C, SIGTERM and a closing terminal from listen() to forget(), instead of ending the program.

    A signal that the caller of the program had switched off, as nohup does, stays off. A second Ctrl-C ends
    the program at once; but torchrun sends each signal twice, so not under torchrun.
    """

    HANDLED = ("SIGINT", "SIGTERM", "SIGHUP")

    def __init__(self):
        self.received = 0  # the number of the first signal
        self.previous = {}

    def listen(self):
        for name in self.HANDLED:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT and not under_torchrun():
            sys.exit(128 + number)
        if not self.received and process_number() == 0:
            with suppress(OSError):  # past the buffer of stderr, which may be in use at this very moment
                os.write(2, b"\nstopping after this step; a second Ctrl-C ends at once, without saving it\n")
        self.received = self.received or number

    def forget(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
