"""Training by several processes, and by processes that are told to stop.

torchrun starts the processes and sets the environment variables; without it there is one process, which
connects to nobody. Each takes its share of the sequences of a step. The gradients are summed, so the step is
the same however many there are.
"""

import os
import re
import signal
import sys
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from files import UserError, is_out_of_memory
from output import reader_is_gone

RANK = 0
WORLD_SIZE = 1
# Some programs that start no processes set RANK and WORLD_SIZE too, but not the other two.
UNDER_TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
if UNDER_TORCHRUN:
    RANK = int(os.environ["RANK"])
    WORLD_SIZE = int(os.environ["WORLD_SIZE"])


def join_processes(device: torch.device, sequences_per_step: int):
    """Connect to the other processes. Only the first one keeps its standard output.

    Raises UserError if a step has fewer sequences than there are processes.
    """
    if not UNDER_TORCHRUN:
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=3))
    if RANK > 0:
        sys.stdout = None
    if sequences_per_step < WORLD_SIZE:
        raise UserError(
            f"a step has {sequences_per_step} sequences for {WORLD_SIZE} processes; give --batch-size and "
            f"--accumulation a product of {WORLD_SIZE} or more"
        )


def leave_processes():
    """Disconnect from the other processes.

    Otherwise a thread of the connection may still run when Python ends, and the process is aborted.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def share_of(sequences_per_step: int) -> range:
    """The numbers of the sequences of a step that this process takes."""
    first = sequences_per_step * RANK // WORLD_SIZE
    end = sequences_per_step * (RANK + 1) // WORLD_SIZE
    return range(first, end)


def sum_over_processes(parameters, loss, stop: bool):
    """(loss, stop), summed over all processes, as scalar tensors on the device of the loss. The gradients of
    the parameters are summed in place.

    One all_reduce of one flat vector. The program does not wait for the device here. Raises UserError if
    another process has ended.
    """
    numbers = torch.stack([loss, loss.new_full((), stop)])
    if UNDER_TORCHRUN:
        tensors = [p.grad for p in parameters]
        tensors.append(numbers)
        vector = parameters_to_vector(tensors)
        try:
            dist.all_reduce(vector)
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"another process has ended ({reason}); --resume continues the run") from error
        vector_to_parameters(vector, tensors)
    return numbers.unbind()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process is gone, and not because of a bug."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, dist.DistError):  # of nccl
        return True
    return re.search("connection|socket|timed? ?out", str(error), re.IGNORECASE) is not None  # of gloo


def broadcast_from_first(tensors):
    """Give all processes the tensors of the first one, bit for bit, in place."""
    if UNDER_TORCHRUN:
        for tensor in tensors:
            dist.broadcast(tensor.view(torch.uint8), 0)


class StopSignals:
    """A context in which training can be told to stop, so that it ends with a whole step and saves it.

    It is told by Ctrl-C (SIGINT), by SIGTERM, by a terminal that closes (SIGHUP), or by a reader of the
    output that goes away. A signal that the caller of the program had switched off, as nohup does, stays
    off. A second Ctrl-C ends the program at once; but torchrun sends each signal twice, so not under
    torchrun.
    """

    HANDLED = ("SIGINT", "SIGTERM", "SIGHUP")

    def __enter__(self):
        self.received = []  # the numbers of the signals so far
        self.previous = {}
        for name in self.HANDLED:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT and not UNDER_TORCHRUN:
            sys.exit(128 + number)
        if not self.received and RANK == 0:
            more = "" if UNDER_TORCHRUN else "; a second Ctrl-C ends at once, without saving it"
            self._say(f"\nstopping after this step{more}\n")
        self.received.append(number)

    def _say(self, message: str):
        """Write to stderr, past its buffer, which may be in use at this very moment."""
        with suppress(OSError):
            os.write(2, message.encode())

    def ask_to_stop(self) -> bool:
        """Whether training has been told to stop."""
        return bool(self.received) or reader_is_gone()

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
