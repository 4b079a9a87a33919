"""Make the built-in model: python experiments/make_tiny.py --out FOLDER

Trains a byte-level BPE tokenizer, then a small decoder of the Qwen2.5 architecture, and writes both in the
format of the Hub. The text is the training split of the `python` source; its held-out files are left out of
both. That takes over an hour on two cores. torch >= 2.9 is needed for torch.optim.Muon, which train.py does
not use.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Batches
from estimates import mean_loss
from evaluate import evaluate
from files import UserError, exit_on_user_error, replace_file
from hub import END_OF_TEXT, load_tokenizer
from qwen import Config, Qwen
from sources import PythonSource

VOCABULARY = 4096  # tokens
LENGTH = 256  # tokens of a sequence
BATCH = 16  # sequences of a step
HELD_OUT_SEQUENCES = 128
HEAD_DIM = 32


def main():
    args = parse_arguments()
    steps = int(args.tokens // (LENGTH * BATCH))
    if steps < 1:
        raise UserError(f"--tokens {args.tokens:g}: one step alone has {LENGTH * BATCH} tokens; give more")
    torch.manual_seed(0)

    # ---- Text
    source = PythonSource()
    path = args.out / "tokenizer.json"
    if not path.exists():
        tokenizer = make_tokenizer(source)
        replace_file(path, lambda part: tokenizer.save(str(part)))
    tokenizer = load_tokenizer(args.out)
    batches = Batches(source, "train", tokenizer, LENGTH)
    held_out = Batches(source, "val", tokenizer, LENGTH)

    # ---- Model
    config = hub_config(args.width, args.layers, tokenizer.token_to_id(END_OF_TEXT))
    text = json.dumps(config, indent=2) + "\n"
    replace_file(args.out / "config.json", lambda part: part.write_text(text))
    model = Qwen(Config.from_pretrained(args.out))
    initialise(model)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f}M parameters", flush=True)

    train(model, batches, held_out, steps, args)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--tokens", type=float, default=14.5e6, help="The tokens to train on. Default: 14.5e6.")
    option("--out", type=Path, default=ROOT / "tiny", help="The folder of the model. Default: tiny.")
    option("--layers", type=int, default=12, help="The number of layers. Default: 12.")
    option("--width", type=int, default=192, help="The hidden size, a multiple of 96. Default: 192.")
    option("--muon-lr", type=float, default=0.02, help="Muon's learning rate. Default: 0.02.")
    option("--adam-lr", type=float, default=3e-3, help="AdamW's learning rate. Default: 3e-3.")
    option("--compile", action="store_true", help="Use torch.compile, which needs a C++ compiler.")
    return parser.parse_args()


def make_tokenizer(source: PythonSource) -> Tokenizer:
    """A byte-level BPE tokenizer of VOCABULARY tokens, from the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )

    def documents():
        for documents, _ in source.chunks("train"):
            yield from documents

    tokenizer.train_from_iterator(documents(), trainer)
    return tokenizer


def hub_config(width: int, layers: int, end_token: int) -> dict:
    """The content of config.json."""
    heads = width // HEAD_DIM
    return dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        hidden_act="silu",
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        use_sliding_window=False,
        torch_dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=end_token,
    )


def initialise(model: Qwen):
    """Normal matrices, zero biases, norms of one.

    The matrices that write to the residual stream are smaller, as in GPT-2, so that the sum over the layers
    does not grow with their number.
    """
    smaller = math.sqrt(2 * model.config.num_hidden_layers)
    for name, p in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.normal_(p, std=0.02 / smaller)
        elif p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
        elif "bias" in name:
            torch.nn.init.zeros_(p)


# ---- Training --------------------------------------------------------------------------------------------


def train(model: Qwen, batches: Batches, held_out: Batches, steps: int, args):
    """Train all weights, and write them to args.out every 500 steps and at the end."""
    muon, adam = make_optimizers(model, args)
    loss_of = torch.compile(model.loss) if args.compile else model.loss
    losses = []
    started = time.time()

    for step in range(steps):
        # ---- Learning rates
        scale = rate_scale(step, steps)
        muon.param_groups[0]["lr"] = args.muon_lr * scale
        adam.param_groups[0]["lr"] = args.adam_lr * scale

        # ---- Forward and backward
        ids, targets = batches.batch(step * BATCH, BATCH)  # [BATCH, LENGTH] each
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

        # ---- Print, evaluate, save
        is_last = step + 1 == steps
        if (step + 1) % 50 == 0 or is_last:
            recent = losses[-50:]
            mean = sum(recent) / len(recent)
            speed = (step + 1) * LENGTH * BATCH / (time.time() - started)
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  {speed:.0f} tokens/s", flush=True)
        if (step + 1) % 500 == 0 or is_last:
            losses = evaluate(model.loss, held_out, HELD_OUT_SEQUENCES, "cpu")
            print(f"held-out {mean_loss(losses)}", flush=True)
            save_weights(model, args.out)


def make_optimizers(model: Qwen, args):
    """Muon for the matrices of the layers, AdamW for the embedding, the norms and the biases."""
    matrices = []
    others = []
    for name, p in model.named_parameters():
        if p.ndim == 2 and name.startswith("layers."):
            matrices.append(p)
        else:
            others.append(p)
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.1, adjust_lr_fn="original")
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return muon, adam


def rate_scale(step: int, steps: int) -> float:
    """The learning rate as a share of its largest value.

    It rises over the first 100 steps and falls to zero over the last 40%.
    """
    rise = (step + 1) / 100
    fall = (steps - step) / (0.4 * steps)
    return min(1, rise, fall)


def save_weights(model: Qwen, folder: Path):
    """Write model.safetensors in bfloat16, under the names of the Hub."""
    weights = {}
    for name, p in model.named_parameters():
        weights[f"model.{name}"] = p.detach().to(torch.bfloat16)
    replace_file(
        folder / "model.safetensors",
        lambda part: save_file(weights, part, metadata={"format": "pt"}),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
