"""Continue prompts with a trained run: python sample.py runs/NAME --prompt "..." """

import threads  # noqa: F401 (it has to come before torch)

# isort: split

import math
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

import torch

from device import pick_device, pick_dtype
from documents import kind_of, read_documents
from fast import keep_freed_memory
from files import UserError, exit_on_user_error
from generation import new_tokens
from hub import load_tokenizer
from patch import full_model_of, load_run

LOWEST_TEMPERATURE = 0.001  # logits divided by a much smaller one are no float32

# ---- Options ---------------------------------------------------------------------------------------------


def parse_options():
    parser = ArgumentParser(
        description="Continue prompts with a trained run. Without a prompt, each line that you type is one; "
        "an empty line ends the program.",
        usage=SUPPRESS,
    )
    option = parser.add_argument
    option("run", help="The folder that train.py wrote, such as runs/NAME, or a Hub repository with a run.")
    option("--prompt", action="append", default=[], help="The text to continue. May be given several times.")
    option(
        "--prompt-file",
        type=Path,
        help="A file with prompts: a .txt, where a line <|endoftext|> lies between two, or a .jsonl.",
    )
    option("--compare", action="store_true", help="Let the full and the cut model continue the prompt, too.")
    option("--max-new-tokens", type=int, default=100, help="How many tokens are added at most. Default: 100.")
    option(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token each time; 0.8 gives variety. Default: 0.",
    )
    option(
        "--top-p",
        type=float,
        default=1.0,
        help="Draw only from the likeliest tokens that together have this probability. Default: 1, which is "
        "all tokens.",
    )
    option("--seed", type=int, default=0, help="Another seed draws another text. Default: 0.")
    option("--depth", type=int, help="Steps of the loop. Default: as trained.")
    option("--model", help="Where the base model is now, if it was moved: a folder or a Hub name.")
    option("--device", default="auto", help="cuda, mps or cpu. Default: the first of these that is there.")
    return parser.parse_args()


def check_options(options):
    """Raise UserError for a number that makes no sense, before the model is loaded."""
    can_divide = LOWEST_TEMPERATURE <= options.temperature < math.inf
    if not (can_divide or options.temperature == 0):
        raise UserError(
            f"--temperature {options.temperature}: give 0, or a number from {LOWEST_TEMPERATURE} on, "
            "such as 0.8"
        )
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}: give a number above 0 and up to 1, such as 0.9")
    if options.top_p < 1 and options.temperature == 0:
        raise UserError("--top-p draws tokens, and at temperature 0 none is drawn; add --temperature 0.8")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: give a whole number from 1 on")
    if options.depth is not None and options.depth < 1:
        raise UserError(f"--depth {options.depth}: give a whole number from 1 on")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed}: give a whole number from 0 on and below 2**63")


# ---- Prompts ---------------------------------------------------------------------------------------------


def prompts_of(options):
    """The prompts: those of the options, otherwise the piped input, otherwise what is typed."""
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        prompts += prompts_in(options.prompt_file)
    elif not prompts:
        if sys.stdin is not None and sys.stdin.isatty():
            sys.stdin.reconfigure(errors="replace")
            return typed_prompts()
        prompts.append(piped_prompt())
    if "" in prompts:
        raise UserError("--prompt is empty; give at least one character")
    return prompts


def prompts_in(file: Path) -> list[str]:
    """The documents of a file, each without the line break at its end. Empty ones are left out.

    Raises UserError for a file that is not there, cannot be read or holds no prompt.
    """
    if not file.is_file() or kind_of(file) is None:
        raise UserError(
            f"--prompt-file {file}: no such file, or not a .txt or .jsonl; name one with a prompt"
        )
    prompts = []
    prompt = ""
    for part, ends in read_documents(file):
        prompt += part
        if ends:
            prompt = prompt.removesuffix("\n")
            if prompt:  # nothing follows a separator at the end of a file
                prompts.append(prompt)
            prompt = ""
    if not prompts:
        raise UserError(f"--prompt-file {file}: holds no prompt; write one into it")
    return prompts


def piped_prompt() -> str:
    """All that a pipe or a file gives to standard input, without the line break at its end."""
    if sys.stdin is None:
        return ""
    sys.stdin.reconfigure(errors="replace")
    return sys.stdin.read().removesuffix("\n")


def typed_prompts():
    """Yield the lines that are typed, up to an empty one or the end of the input."""
    print("Type a text to continue; an empty line ends the program.")
    try:
        line = input("> ")
        while line:
            yield line
            line = input("\n> ")
    except EOFError:
        print()


# ---- Continuations ---------------------------------------------------------------------------------------


def print_continuation(model, prompt: str, tokenizer, options, show_prompt: bool, **model_options):
    """Print how a model continues a prompt, token by token."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    shown = "" if show_prompt else tokenizer.decode(ids, skip_special_tokens=False)
    device = model.norm.weight.device
    torch.manual_seed(options.seed)
    tokens = new_tokens(
        model,
        torch.tensor([ids], device=device),
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        **model_options,
    )
    for token in tokens:
        ids.append(token.item())
        text = tokenizer.decode(ids, skip_special_tokens=False)  # the end of the text is shown
        if not text.endswith("\ufffd"):  # a character may have several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(ids, skip_special_tokens=False)[len(shown) :])


def check_finite(model, prompt: str, tokenizer, options):
    """Raise UserError if the model gives no numbers for a prompt."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    with torch.no_grad():  # not the logits, which need V / d times the memory
        h = model.hidden(torch.tensor([ids], device=model.norm.weight.device), depth=options.depth)
    if not h.isfinite().all():
        raise UserError(f"{options.run}: its logits are not finite; give an earlier checkpoint, RUN/step-N")


def main():
    options = parse_options()
    check_options(options)
    prompts = prompts_of(options)
    keep_freed_memory()
    device = pick_device(options.device)
    model = load_run(options.run, options.model, pick_dtype("auto", device), device)
    tokenizer = load_tokenizer(model.source, model.config.vocab_size)
    full = full_model_of(model) if options.compare else None

    is_first = True
    for prompt in prompts:
        prompt = prompt.encode("utf-8", "replace").decode()  # the shell may pass bytes that are no UTF-8
        check_finite(model, prompt, tokenizer, options)
        if not is_first:
            print()
        is_first = False
        if options.compare:
            print(f"prompt:\n{prompt}")
            for name, yardstick in (("full model", full), ("cut model", model.cut)):
                print(f"\n{name}:")
                print_continuation(yardstick, prompt, tokenizer, options, show_prompt=False)
            print(f"\nouroboros, depth {options.depth or model.depth}:")
        show_prompt = not options.compare
        print_continuation(model, prompt, tokenizer, options, show_prompt, depth=options.depth)


if __name__ == "__main__":
    exit_on_user_error(main, "try a shorter --prompt, fewer --max-new-tokens, or a machine with more memory")
