"""Print the table of Qwen2.5 sizes, with the memory that training takes: python experiments/sizes.py

Nothing is downloaded or computed: memory.py counts the bytes. The frozen weights are in bfloat16, and the
trained weights with their gradients and two moments in float32.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast import recompute_activations
from files import exit_on_user_error
from memory import training_peak
from ouroboros import Ouroboros
from patch import Patched
from qwen import Config, Qwen


@dataclass(frozen=True)
class Size:
    """The shape of one of the published models, and the licence of its weights."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    licence: str

    @property
    def config(self) -> Config:
        return Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            tie_word_embeddings=self.tie_word_embeddings,
        )


SIZES = {
    "0.5B": Size(896, 4864, 24, 14, 2, 151936, True, "Apache-2.0"),
    "1.5B": Size(1536, 8960, 28, 12, 2, 151936, True, "Apache-2.0"),
    "3B": Size(2048, 11008, 36, 16, 2, 151936, True, "Qwen Research"),
    "7B": Size(3584, 18944, 28, 28, 4, 152064, False, "Apache-2.0"),
    "14B": Size(5120, 13824, 48, 40, 8, 152064, False, "Apache-2.0"),
    "32B": Size(5120, 27648, 64, 40, 8, 152064, False, "Apache-2.0"),
    "72B": Size(8192, 29568, 80, 64, 8, 152064, False, "Qwen"),
}

# ---- The table -------------------------------------------------------------------------------------------

COLUMNS = (
    "size",
    "layers: kept",
    "whole model, bf16",
    "trained parameters",
    "training",
    "with activation checkpointing",
    "`--patch`: trained parameters",
    "training",
    "its licence",
)


def row_of(name: str, size: Size, args) -> list[str]:
    """The cells of a size under COLUMNS."""
    with torch.device("meta"):
        qwen = Qwen(size.config).to(torch.bfloat16)
        model = Ouroboros(qwen, rank=args.rank, depth=args.depth)
        patched = Patched(qwen, depth=1, modulation="none")
    bytes_of_all = 2 * count(qwen.parameters())
    del qwen  # and with it the layers that were cut out

    peak = training_peak(model, args.batch_size, args.seq_len)
    patched_peak = training_peak(patched, args.batch_size, args.seq_len)
    recompute_activations(model)  # last, because the patched model shares the layers
    recomputed_peak = training_peak(model, args.batch_size, args.seq_len)

    return [
        name,
        f"{size.num_hidden_layers}: {len(model.prelude)} + 1 + {len(model.coda)}",
        gigabytes(bytes_of_all),
        f"{count(model.trained_parameters().values()):,}",
        gigabytes(peak),
        gigabytes(recomputed_peak),
        f"{count(patched.trained_parameters().values()):,}",
        gigabytes(patched_peak),
        size.licence,
    ]


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def print_row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--depth", type=int, default=8, help="The number of steps of the loop. Default: 8.")
    option("--rank", type=int, default=32, help="The rank of the SVD LoRA. Default: 32.")
    option("--batch-size", type=int, default=2, help="The number of sequences in a step. Default: 2.")
    option("--seq-len", type=int, default=2048, help="The number of tokens in a sequence. Default: 2048.")
    args = parser.parse_args()

    print_row(COLUMNS)
    print("|" + "---|" * len(COLUMNS))
    for name, size in SIZES.items():
        print_row(row_of(name, size, args))


if __name__ == "__main__":
    exit_on_user_error(main)
