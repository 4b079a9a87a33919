"""Make the built-in model: python experiments/make_tiny.py [--tokens 14.5e6] [--out tiny] [--compile]

Trains a byte-level BPE tokenizer and then a small Qwen2.5-architecture decoder on the training split of the `python`
source, and writes the folder in Hub format. The held-out files of that source are left out of both. Over an hour
on two cores; needs torch >= 2.9 for torch.optim.Muon, which train.py does not use.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import END_OF_TEXT, Batches, PythonSource
from qwen import Config, Qwen

VOCABULARY, LENGTH, BATCH = 4096, 256, 16


def make_tokenizer(source) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator((document for chunk in source.chunks("train") for document in chunk), trainer)
    return tokenizer


def held_out_loss(model, batches, sequences=128) -> float:
    with torch.no_grad():
        return sum(model.loss(*batches.batch(n, 16)).item() for n in range(0, sequences, 16)) / (sequences // 16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=14.5e6)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tiny")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    source = PythonSource()
    if not (args.out / "tokenizer.json").exists():
        make_tokenizer(source).save(str(args.out / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    train, held_out = (Batches(source, split, tokenizer, LENGTH) for split in ("train", "val"))

    heads = args.width // 32
    raw = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=VOCABULARY, hidden_size=args.width,
        intermediate_size=args.width * 8 // 3, num_hidden_layers=args.layers, num_attention_heads=heads,
        num_key_value_heads=heads // 3, hidden_act="silu", max_position_embeddings=1024, rms_norm_eps=1e-6,
        rope_theta=10000.0, tie_word_embeddings=True, use_sliding_window=False, torch_dtype="bfloat16",
        bos_token_id=None, eos_token_id=tokenizer.token_to_id(END_OF_TEXT))
    (args.out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    model = Qwen(Config.from_json(args.out / "config.json"))
    for name, p in model.named_parameters():
        if p.ndim == 2:  # what writes to the residual stream starts smaller, as in GPT-2
            writes = "o_proj" in name or "down_proj" in name
            torch.nn.init.normal_(p, std=0.02 / (math.sqrt(2 * args.layers) if writes else 1))
        elif "bias" in name:
            torch.nn.init.zeros_(p)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)

    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.1, adjust_lr_fn="original"),
                  torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    def loss_of(ids, targets):  # model.loss is for a frozen head
        return F.cross_entropy(model(ids).float().flatten(0, 1), targets.flatten())

    if args.compile:
        loss_of = torch.compile(loss_of)

    steps, start, losses = int(args.tokens // (LENGTH * BATCH)), time.time(), []
    for step in range(steps):
        scale = min(1, (step + 1) / 100, (steps - step) / (0.4 * steps))  # warm up, stay, fall over the last 40%
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(*train.batch(step * BATCH, BATCH))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            speed = (step + 1) * LENGTH * BATCH / (time.time() - start)
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  {speed:.0f} tokens/s", flush=True)
            if (step + 1) % 500 == 0 or step + 1 == steps:
                print(f"held-out {held_out_loss(model, held_out):.4f}", flush=True)
                weights = {("model." + n): p.detach().to(torch.bfloat16) for n, p in model.named_parameters()}
                save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
