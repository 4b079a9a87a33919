"""The README's table of Qwen2.5 sizes: python experiments/sizes.py [--depth 8 --rank 32 --batch-size 2 --seq-len 2048]

Nothing is downloaded or computed: the models are laid out on torch's meta device. The training memory is a count, not a
measurement: frozen weights in bf16, trained weights with gradient and two moments in float32, every tensor that the
backward pass keeps, and three copies of the logits (bf16, float32, gradient). Attention scores are left out: CUDA's
fused attention does not keep them.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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


def kept_for_backward(model, batch_size: int, seq_len: int) -> int:
    """Bytes of all tensors that one forward keeps for its backward, weights and attention scores left out."""
    seen = {p.untyped_storage()._cdata: 0 for p in [*model.parameters(), *model.buffers()]}

    def keep(t):
        if t.shape[-2:] != (seq_len, seq_len):
            seen.setdefault(t.untyped_storage()._cdata, t.untyped_storage().nbytes())
            alive.append(t)
        return t

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.hidden(torch.zeros(batch_size, seq_len, dtype=torch.int64, device="meta")).sum()
    return sum(seen.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("depth", 8), ("rank", 32), ("batch-size", 2), ("seq-len", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print("| size | layers: kept | trained parameters | whole model, bf16 | training, counted | its licence |")
    print("|---|---|---|---|---|---|")
    for size, (d, inner, layers, heads, kv_heads, vocabulary, tied, licence) in SIZES.items():
        config = Config(vocabulary, d, inner, layers, heads, kv_heads, d // heads, tie_word_embeddings=tied)
        with torch.device("meta"):
            qwen = Qwen(config).to(torch.bfloat16)
            model = Ouroboros(qwen, rank=args.rank, depth=args.depth)
        count = {True: 0, False: sum(b.numel() for b in model.buffers())}
        for p in model.parameters():
            count[p.requires_grad] += p.numel()
        logits = args.batch_size * args.seq_len * vocabulary * (2 + 4 + 4)
        kept = kept_for_backward(model, args.batch_size, args.seq_len)
        training = 2 * count[False] + 16 * count[True] + kept + logits
        whole = 2 * sum(p.numel() for p in qwen.parameters())
        print(f"| {size} | {layers}: {len(model.prelude)} + 1 + {len(model.coda)} | {count[True]:,} "
              f"| {whole / 1e9:.1f} GB | {training / 1e9:.0f} GB | {licence} |")


if __name__ == "__main__":
    main()
