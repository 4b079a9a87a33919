"""The README's table of Qwen2.5 sizes: python experiments/sizes.py [--depth 8 --rank 32 --batch-size 2 --seq-len 2048]

Nothing is downloaded or computed: a training step runs on torch's meta device and the bytes alive are counted: frozen
weights in bf16, trained weights with gradient and two moments in float32, and every tensor of forward and backward. It
is the step without torch.compile, with a stand-in for CUDA's fused attention, which keeps no scores.
"""

import argparse
import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import qwen as qwen_module
from ouroboros import Ouroboros
from qwen import Config, Qwen

# size: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied head, licence of the weights
SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True, "Apache-2.0"),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True, "Apache-2.0"),
    "3B": (2048, 11008, 36, 16, 2, 151936, True, "Qwen Research"),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, "Apache-2.0"),
    "14B": (5120, 13824, 48, 40, 8, 152064, False, "Apache-2.0"),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, "Apache-2.0"),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, "Qwen"),
}


class FusedAttention(torch.autograd.Function):
    """Keeps for its backward what CUDA's kernel keeps."""
    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and the most there were."""
    def __init__(self, tensors):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0
        self.add(tensors)

    def add(self, tensors):
        for storage in (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def remove(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(tree_leaves(out))
        return out


def training_peak(model, batch_size: int, seq_len: int) -> int:
    """Bytes at the peak of a training step."""
    optimizer = torch.optim.AdamW(model.trained_parameters().values())

    def step():
        ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device="meta")
        model.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    with Peak([*model.parameters(), *model.buffers(), *moments]) as peak:
        step()
    return peak.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("depth", 8), ("rank", 32), ("batch-size", 2), ("seq-len", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    qwen_module.attend = FusedAttention.apply
    print("| size | layers: kept | whole model, bf16 | trained parameters | training | with activation checkpointing "
          "| `--patch`: trained parameters | training | its licence |\n|" + "---|" * 9)
    for size, (d, inner, layers, heads, kv_heads, vocabulary, tied, licence) in SIZES.items():
        config = Config(vocabulary, d, inner, layers, heads, kv_heads, d // heads, tie_word_embeddings=tied)
        with torch.device("meta"):
            qwen = Qwen(config).to(torch.bfloat16)
            model = Ouroboros(qwen, rank=args.rank, depth=args.depth)
            patched = Ouroboros(qwen, depth=1, modulation="none", patch=True, train_coda="all")
        whole = 2 * sum(p.numel() for p in qwen.parameters())
        del qwen
        cells = [f"{layers}: {len(model.prelude)} + 1 + {len(model.coda)}", f"{whole / 1e9:.1f} GB"]
        for each, ways in ((model, (False, True)), (patched, (False,))):
            cells.append(f"{sum(p.numel() for p in each.trained_parameters().values()):,}")
            for each.checkpointing in ways:
                cells.append(f"{training_peak(each, args.batch_size, args.seq_len) / 1e9:.1f} GB")
        print("|", " | ".join([size, *cells, licence]), "|")


if __name__ == "__main__":
    main()
