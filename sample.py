"""Continue prompts with a trained run: python sample.py runs/NAME --prompt "..." """

import sys

import torch

from evaluate import open_run, open_run_and_baselines, run_parser
from qwen import load_tokenizer
from support.fast import keep_freed_memory
from support.files import UserError, run_program
from support.machine import pick_device, pick_dtype
from support.options import number


def parse_arguments(argv):
    parser = run_parser("Continue prompts with a trained run.")
    option = parser.add_argument
    option(
        "--prompt",
        action="append",
        help="The text to continue. It may be given several times. [each line of the standard input]",
    )
    option("--compare", action="store_true", help="Let the full and the cut model continue the prompt too.")
    option("--max-new-tokens", type=number(1, 10**6), default=100, help="At most so many tokens. [100]")
    option(
        "--temperature",
        type=number(0.0, 1000.0),
        default=0.0,
        help="0 takes the likeliest token each time; 0.8 gives variety. [0]",
    )
    option(
        "--top-p",
        type=number(1e-6, 1.0),
        default=1.0,
        help="Draw from the likeliest tokens that together have this probability. [1]",
    )
    option("--seed", type=number(0, 2**32 - 1), default=0, help="Another seed draws another text. [0]")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_arguments(argv)
    keep_freed_memory()
    device = pick_device(options.device)
    dtype = pick_dtype("auto", device)
    models = []  # (heading, model, the keyword arguments of its forward pass)
    if options.compare:
        looped, full, cut = open_run_and_baselines(options.run, options.model, dtype, device)
        models += [("full model", full, {}), ("cut model", cut, {})]
    else:
        looped = open_run(options.run, options.model, dtype, device)
    depth = looped.checked_depth(options.depth)
    models.append((f"ouroboros, depth {depth}", looped, {"depth": depth}))
    tokenizer = load_tokenizer(looped.source)

    for prompt in options.prompt or lines_of_input():
        prompt = prompt.encode("utf-8", "replace").decode()  # the shell may pass bytes that are no UTF-8
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        if not ids:
            raise UserError("--prompt is empty; give at least one character")
        if options.compare:
            print(f"prompt:\n{prompt}")
        for heading, model, loop in models:
            if options.compare:
                print(f"\n{heading}:")
            else:
                print(tokenizer.decode(ids, skip_special_tokens=False), end="")
            print_continuation(model, tokenizer, ids, options, **loop)


def lines_of_input():
    """The lines of the standard input that are not empty. Where they are typed, an empty one ends it."""
    typed = sys.stdin.isatty()
    if typed:
        print("Type a text to continue; an empty line ends the program.")
    for line in sys.stdin:
        line = line.rstrip("\n")
        if line:
            yield line
        elif typed:
            return


def print_continuation(model, tokenizer, ids: list[int], options, **loop):
    """Print how a model continues a prompt of these tokens, one by one. loop: its depth, if it is looped."""
    torch.manual_seed(options.seed)
    prompt = torch.tensor([ids], device=model.norm.weight.device)
    tokens = model.new_tokens(prompt, options.max_new_tokens, options.temperature, options.top_p, **loop)
    ids = list(ids)
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    for token in tokens:
        ids.append(token.item())
        text = tokenizer.decode(ids, skip_special_tokens=False)  # the end of the text is shown
        if not text.endswith("\ufffd"):  # a character may have several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(ids, skip_special_tokens=False)[len(shown) :])


if __name__ == "__main__":
    run_program(main)
