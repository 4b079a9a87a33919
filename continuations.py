"""One held-out text, and how the full, the cut and the looped model continue it.

A run keeps them in continuations.json.
"""

from pathlib import Path

import torch

from data import Batches
from files import read_json, write_json

FILE_NAME = "continuations.json"
PROMPT_TOKENS = 48
NEW_TOKENS = 48
TEMPERATURE = 0.7
SEED = 0  # the same for all models and runs


def save_continuations(run: Path, models: dict, held_out: Batches, device):
    """Add to a run's continuations.json how each of these models, {name: model}, continues the text."""
    ids, _ = held_out.batch(0, 1, device)
    prompt = ids[:, : max(1, min(PROMPT_TOKENS, held_out.length // 2))]  # [1, T]
    continuations = read_continuations(run)
    # special tokens too: without them, the end of one document and the beginning of the next run together
    continuations["prompt"] = held_out.tokenizer.decode(prompt[0].tolist(), skip_special_tokens=False)
    for name, model in models.items():
        torch.manual_seed(SEED)
        out = model.generate(prompt, NEW_TOKENS, TEMPERATURE)
        new = out[0, prompt.shape[1] :].tolist()
        continuations[name] = held_out.tokenizer.decode(new, skip_special_tokens=False)
    write_json(run / FILE_NAME, continuations)


def read_continuations(run: Path) -> dict[str, str]:
    """{"prompt": text, name of a model: how it continues the text}. Empty for a run that has none yet."""
    path = run / FILE_NAME
    if not path.exists():
        return {}
    return read_json(path, "delete it")


def print_continuations(run: Path, depth: int):
    """Print the held-out text and its continuations one below the other. depth: that of the looped model."""
    continuations = read_continuations(run)
    names = {
        "prompt": "a held-out text",
        "full": "the full model continues",
        "cut": "the cut model continues",
        "ouroboros": f"ouroboros, depth {depth}, continues",
    }
    for key, name in names.items():
        if key in continuations:
            print(f"\n{name}:\n{continuations[key]}")
