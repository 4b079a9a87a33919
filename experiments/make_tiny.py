"""Make the built-in model: python experiments/make_tiny.py --out FOLDER

Trains a byte-level BPE tokenizer, then a small decoder of the Qwen2.5 architecture, and writes both in the
format of the Hub. The text is the training split of `python`, all of it; the held-out files are left out of
both. It takes over an hour on two cores, and torch >= 2.9 for torch.optim.Muon, which train.py does not use.
"""

import json
import math
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import CHUNK_CHARACTERS, Batches, PythonSource, Tokens, grouped
from evaluate import evaluate
from qwen import Config, Qwen
from support.files import replace_file, run_program, write_json
from support.options import number
from support.pretrained import END_OF_TEXT
from support.report import estimate

VOCABULARY = 4096  # tokens
LAYERS = 12
WIDTH = 192  # the hidden size, a multiple of 96
HEAD_DIM = 32
LENGTH = 256  # tokens of a sequence
BATCH = 16  # sequences of a step


class AllPython(PythonSource):
    """All of the Python source code, of which train.py reads the first chunk."""

    def chunks(self, split: str):
        files = self._files("stdlib", Path(json.__file__).parents[1])
        files += self._files("torch", Path(torch.__file__).parent)
        yield from grouped(self._documents(sorted(files), split), CHUNK_CHARACTERS)


def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], usage=SUPPRESS)
    option = parser.add_argument
    option("--tokens", type=number(float(LENGTH * BATCH), 1e12), default=14.5e6, help="To train on. [14.5e6]")
    option("--out", type=Path, default=ROOT / "tiny", help="The folder of the model. [tiny]")
    option("--compile", action="store_true", help="Use torch.compile, which needs a C++ compiler.")
    options = parser.parse_args(argv)
    steps = int(options.tokens // (LENGTH * BATCH))
    torch.manual_seed(0)

    # ---- Text
    text = AllPython()
    tokenizer = make_tokenizer(text)
    replace_file(options.out / "tokenizer.json", lambda part: tokenizer.save(str(part)))
    training = Batches(Tokens(text, "train", tokenizer), LENGTH)
    held_out = Batches(Tokens(text, "held-out", tokenizer), LENGTH)

    # ---- Model
    end_token = tokenizer.token_to_id(END_OF_TEXT)
    write_json(options.out / "config.json", hub_config(end_token))
    model = Qwen(Config.from_pretrained(options.out))
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    loss_of = torch.compile(model.loss) if options.compile else model.loss
    muon, adam = make_optimizers(model)

    # ---- Training
    for step in range(steps):
        muon.param_groups[0]["lr"] = 0.02 * rate_scale(step, steps)
        adam.param_groups[0]["lr"] = 3e-3 * rate_scale(step, steps)

        ids, targets = training.batch(step * BATCH, BATCH)  # [BATCH, LENGTH] each
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()

        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(f"held-out {estimate(evaluate(model, held_out, 128))}", flush=True)
            save_weights(model, options.out)


def make_tokenizer(text) -> Tokenizer:
    """A byte-level BPE tokenizer of VOCABULARY tokens, from the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(text.chunks("train"), trainer)  # lists of documents
    return tokenizer


def hub_config(end_token: int) -> dict:
    """The content of config.json."""
    heads = WIDTH // HEAD_DIM
    return dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3,
        num_hidden_layers=LAYERS,
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


def make_optimizers(model: Qwen):
    """Muon for the matrices of the layers, AdamW for the embedding, the norms and the biases."""
    matrices = []
    others = []
    for name, p in model.named_parameters():
        if p.ndim == 2 and name.startswith("layers."):
            matrices.append(p)
        else:
            others.append(p)
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="original")
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    return muon, adam


def rate_scale(step: int, steps: int) -> float:
    """The learning rate as a share of its largest: it rises for 100 steps and falls over the last 40%."""
    return min(1, (step + 1) / 100, (steps - step) / (0.4 * steps))


def save_weights(model: Qwen, folder: Path):
    """Write model.safetensors in bfloat16, under the names of the Hub."""
    weights = {f"model.{name}": p.detach().bfloat16() for name, p in model.named_parameters()}
    path = folder / "model.safetensors"
    replace_file(path, lambda part: save_file(weights, part, metadata={"format": "pt"}))


if __name__ == "__main__":
    run_program(main)
