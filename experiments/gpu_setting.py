"""Where the checks of gpu_check.py run, and the lines of its table."""

from dataclasses import dataclass

import torch

from device import gpu_of, pick_dtype
from presets import PAPER_MODEL, default_model

# The verdicts.
OK = "ok"
FAILED = "FAILED"
MEASURED = "measured"  # a number, of which nothing is asked
NOT_RUN = "not run"

LARGE = 40e9  # bytes: from here on, the speed and the memory of the paper's command are checked

# The largest relative error beside float64.
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
    def is_large(self) -> bool:
        """Whether what is asked of the paper's command is asked of this GPU."""
        gpu = gpu_of(self.device)
        return "3B" in self.models and gpu is not None and gpu.memory >= LARGE

    @property
    def seq_len(self) -> int:
        """The tokens of a sequence in a training step."""
        return 64 if self.small else 2048

    @property
    def new_tokens(self) -> int:
        """How many tokens are generated after as many of a prompt."""
        return 8 if self.small else 64


def verdict(holds: bool) -> str:
    return OK if holds else FAILED
