"""Continue a prompt with a trained run: python sample.py runs/NAME --prompt "..." """

import threads  # noqa: F401 (it has to come before torch)

# isort: split

import math
from argparse import SUPPRESS, ArgumentParser

import torch

from device import pick_device, pick_dtype
from fast import keep_freed_memory
from files import UserError, exit_on_user_error
from hub import load_tokenizer
from patch import load_run


def parse_options():
    parser = ArgumentParser(description="Continue a prompt with a trained run.", usage=SUPPRESS)
    option = parser.add_argument
    option("run", help="The folder that train.py wrote, such as runs/NAME, or a Hub name.")
    option("--prompt", required=True, help="The text to continue.")
    option("--max-new-tokens", type=int, default=100, help="How many tokens are added at most. Default: 100.")
    option(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token each time; 0.8 gives variety. Default: 0.",
    )
    option("--depth", type=int, help="Steps of the loop. Default: as trained.")
    option("--model", help="Where the base model is now, if it was moved: a folder or a Hub name.")
    option("--device", default="auto", help="cuda, mps or cpu. Default: the first of these that is there.")
    return parser.parse_args()


def check_options(options):
    """Raise UserError for a number that makes no sense, before the model is loaded."""
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise UserError(f"--temperature {options.temperature}: give 0, or a number above 0 such as 0.8")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: give a whole number from 1 on")
    if options.depth is not None and options.depth < 1:
        raise UserError(f"--depth {options.depth}: give a whole number from 1 on")


def main():
    options = parse_options()
    check_options(options)
    keep_freed_memory()
    device = pick_device(options.device)
    model = load_run(options.run, options.model, pick_dtype("auto", device), device)

    tokenizer = load_tokenizer(options.model or model.source, model.config.vocab_size)
    prompt = options.prompt.encode("utf-8", "replace").decode()  # the shell may pass bytes that are no UTF-8
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise UserError("--prompt is empty; give at least one character")

    ids = torch.tensor([ids], device=device)
    with torch.no_grad():
        h = model.hidden(ids, depth=options.depth)  # not the logits, which need V / d times the memory
    if not h.isfinite().all():
        raise UserError(f"{options.run}: its logits are not finite; give an earlier checkpoint, RUN/step-N")
    out = model.generate(ids, options.max_new_tokens, options.temperature, depth=options.depth)
    print(tokenizer.decode(out[0].tolist(), skip_special_tokens=False))  # the end of the text is shown


if __name__ == "__main__":
    exit_on_user_error(main, "try a shorter --prompt, fewer --max-new-tokens, or a machine with more memory")
