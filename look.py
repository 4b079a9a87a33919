"""Look inside the loop of a trained run: python look.py runs/NAME --prompt "..."

For each token of the prompt and each step of the loop: what the model would say if the loop ended there, how
far the gate opens, how far the state moves, and how large the Controller's diagonals are. The terminal shows
the last tokens; a page, look.html, shows more of them and needs no network. With a second --prompt, the
diagonals of the two prompts are compared.
"""

import threads  # noqa: F401 (it has to come before torch)

# isort: split

import json
import math
import unicodedata
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import NamedTuple

import torch

from device import pick_device, pick_dtype
from fast import keep_freed_memory
from files import UserError, exit_on_user_error, replace_file
from hub import load_tokenizer
from inside import Comparison, Step, compare, look_inside, root_mean_square, stacked_diagonals
from patch import load_run
from qwen import PROJECTIONS
from run_folder import output_path

TEMPLATE = Path(__file__).with_name("look.html")
PLACE_OF_DATA = "DATA_OF_THE_PAGE"  # in the template
PAGE_TOKENS = 256  # the most tokens of a prompt on the page
NAMES = [k.removesuffix("_proj") for k in PROJECTIONS]


class Prompt(NamedTuple):
    """A prompt and what the loop does at its last tokens."""

    tokens: list[str]  # the text of each of these tokens
    left_out: int  # how many tokens there are before them
    steps: list[Step]
    would_say: list  # [steps][tokens][CHOICES]: the texts of the likeliest next tokens

    def has_diagonals(self) -> bool:
        """Whether the model has a modulation."""
        return len(self.steps[0].diagonals) > 0


def parse_options():
    parser = ArgumentParser(description="Look inside the loop of a trained run.", usage=SUPPRESS)
    option = parser.add_argument
    option("run", help="The folder that train.py wrote, such as runs/NAME, or a Hub repository with a run.")
    option(
        "--prompt",
        required=True,
        action="append",
        dest="prompts",
        help="The text to read. A second --prompt is compared with the first.",
    )
    option("--tokens", type=int, default=12, help="How many tokens the terminal shows. Default: 12.")
    option("--page", type=Path, help="The page to write. Default: look.html in the folder of the run.")
    option("--depth", type=int, help="Steps of the loop. Default: as trained.")
    option("--model", help="Where the base model is now, if it was moved: a folder or a Hub name.")
    option("--device", default="auto", help="cuda, mps or cpu. Default: the first of these that is there.")
    return parser.parse_args()


def check_options(options):
    """Raise UserError for an option that makes no sense, before the model is loaded."""
    if len(options.prompts) > 2:
        raise UserError(f"--prompt is given {len(options.prompts)} times; give one prompt, or two to compare")
    if options.tokens < 1:
        raise UserError(f"--tokens {options.tokens}: give a whole number from 1 on")
    if options.depth is not None and options.depth < 1:
        raise UserError(f"--depth {options.depth}: give a whole number from 1 on")
    if options.page is not None and options.page.is_dir():
        raise UserError(f"--page {options.page}: is a folder; give the name of a file in it")


def main():
    options = parse_options()
    check_options(options)
    keep_freed_memory()
    device = pick_device(options.device)
    model = load_run(options.run, options.model, pick_dtype("auto", device), device)
    tokenizer = load_tokenizer(model.source, model.config.vocab_size)

    prompts = [read_prompt(model, tokenizer, text, options) for text in options.prompts]
    comparison = compare_prompts(prompts)
    sentences = summary(options.run, prompts, comparison)
    page = page_path(options)
    write_page(page, page_data(sentences, prompts, comparison))

    for sentence in sentences:
        print(sentence)
    print(f"\n{LEGEND}")
    if prompts[0].has_diagonals():
        print(LEGEND_OF_DIAGONALS)
    for number, prompt in enumerate(prompts, start=1):
        print_prompt(f"Prompt {number}", prompt, options.tokens)
    if comparison is not None:
        print_comparison(comparison, what_is_compared(prompts))
    print(f"\nThe page {page} shows up to {PAGE_TOKENS} tokens of a prompt. Open it in a browser.")


# ---- The values ------------------------------------------------------------------------------------------


def read_prompt(model, tokenizer, text: str, options) -> Prompt:
    """What the loop does at the last PAGE_TOKENS tokens of a prompt.

    Raises UserError for an empty prompt, and for a model whose values are not finite.
    """
    text = text.encode("utf-8", "replace").decode()  # the shell may pass bytes that are no UTF-8
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise UserError("--prompt is empty; give at least one character")
    device = model.norm.weight.device
    steps = look_inside(model, torch.tensor(ids, device=device), options.depth, last=PAGE_TOKENS)
    for t, step in enumerate(steps, start=1):
        if not step.is_finite():
            raise UserError(
                f"{options.run}: step {t} of the loop gives values that are not finite; give a smaller "
                "--depth or an earlier checkpoint, RUN/step-N"
            )

    tokens = [text_of(tokenizer, token) for token in ids[-PAGE_TOKENS:]]
    would_say = []
    for step in steps:
        of_step = []
        for choices in step.likeliest.tolist():
            of_step.append([text_of(tokenizer, token) for token in choices])
        would_say.append(of_step)
    return Prompt(tokens, len(ids) - len(tokens), steps, would_say)


def text_of(tokenizer, token: int) -> str:
    """The text of one token, where every character can be seen: a newline is \\n.

    A token that is a piece of a character has the replacement character.
    """
    characters = []
    for character in tokenizer.decode([token], skip_special_tokens=False):
        if not character.isprintable():
            character = repr(character)[1:-1]  # such as \n, \t, \x1b
        characters.append(character)
    return "".join(characters)


def compare_prompts(prompts: list[Prompt]) -> Comparison | None:
    """Compare the mean diagonals of two prompts; of one prompt, the diagonals of its tokens.

    None for a model without modulation, and for a prompt of one token.
    """
    if not prompts[0].has_diagonals():
        return None
    if len(prompts) == 2:
        means = [stacked_diagonals(prompt.steps).mean(0) for prompt in prompts]
        return compare(torch.stack(means))
    if len(prompts[0].tokens) == 1:
        return None
    return compare(stacked_diagonals(prompts[0].steps))


# ---- The sentences ---------------------------------------------------------------------------------------

LEGEND = """\
would say: the likeliest next tokens if the loop ended after this step, with their probabilities; a long
  token is cut, and the replacement character stands for a piece of a character
p(next): the probability of the token that follows in the prompt
opens: the mean opening of the gate, 1 without a gate; with --patch, the mean of the trained opening
moves: how far the step moves the state, relative to the length of the state"""
LEGEND_OF_DIAGONALS = "q to down: the root mean square of the diagonal m of each projection"


def summary(run: str, prompts: list[Prompt], comparison: Comparison | None) -> list[str]:
    """One sentence on the predictions and the state; one on the diagonals, where there are any to compare."""
    depth = len(prompts[0].steps)
    settled = 0
    tokens = 0
    openings = []
    movements = []
    for prompt in prompts:
        first = prompt.steps[0].likeliest[:, 0]
        last = prompt.steps[-1].likeliest[:, 0]
        settled += int((first == last).sum())
        tokens += len(prompt.tokens)
        for step in prompt.steps:
            openings.append(step.opening)
            movements.append(step.movement)
    opening = torch.cat(openings).mean()
    movement = torch.cat(movements).mean()

    sentence = (
        f"In {run}, a step of the loop takes over {opening:.0%} of the layer's output on average and moves "
        f"the state by {movement:.0%}"
    )
    if depth > 1:
        sentence += (
            f"; for {settled} of {tokens} tokens, the likeliest next token after the first of {depth} steps "
            "is that after the last"
        )
    sentences = [sentence + "."]
    if comparison is not None:
        sentences.append(sentence_on_diagonals(comparison, what_is_compared(prompts)))
    return sentences


def what_is_compared(prompts: list[Prompt]) -> str:
    return "prompt" if len(prompts) == 2 else "token"


def sentence_on_diagonals(comparison: Comparison, compared: str) -> str:
    of_texts = comparison.between_texts
    of_steps = comparison.between_steps
    if of_texts == 0:
        sentence = f"The diagonals of two {compared}s are the same at the same step"
    else:
        sentence = f"The diagonals of two {compared}s differ by {of_texts:.3f} at the same step"
    if of_steps is not None:
        sentence += f"; those of two steps differ by {of_steps:.3f}"
        if of_texts > 0:
            sentence += f", {of_steps / of_texts:.1f} times as much"
    return sentence + "."


# ---- The terminal ----------------------------------------------------------------------------------------


def print_prompt(name: str, prompt: Prompt, last: int):
    """A table of the steps for each of the last tokens."""
    shown = min(last, len(prompt.tokens))
    print(f"\n{name}: the last {shown} of {prompt.left_out + len(prompt.tokens)} tokens")
    for i in range(len(prompt.tokens) - shown, len(prompt.tokens)):
        print_token(prompt, i)


def print_token(prompt: Prompt, i: int):
    """The table of token i: one row for each step."""
    title = f"token {prompt.left_out + i + 1}: {quoted(prompt.tokens[i])}"
    if i + 1 < len(prompt.tokens):
        title += f", followed by {quoted(prompt.tokens[i + 1])}"
    print(f"\n{title}")

    header = f"step  {'would say':36}  p(next)  opens  moves"
    if prompt.has_diagonals():
        header += "".join(f"{name:>6}" for name in NAMES)
    print(header)
    for t, step in enumerate(prompt.steps):
        would_say = ""
        for token, p in zip(prompt.would_say[t][i][:2], step.likeliest_p[i]):
            would_say += padded(f"{p:.2f} {quoted(token)}", 18)
        next_p = "-" if math.isnan(step.next_p[i]) else f"{step.next_p[i]:.3f}"
        row = f"{t + 1:4}  {would_say}  {next_p:>7}  {step.opening[i]:5.2f}  {step.movement[i]:5.2f}"
        for diagonal in step.diagonals.values():
            row += f"{root_mean_square(diagonal[i]):6.2f}"
        print(row)


def print_comparison(comparison: Comparison, compared: str):
    """Three tables with a row for each step: sizes, differences and their ratios."""
    tables = {
        f"The mean diagonals of the {compared}s, root mean square": comparison.size,
        f"The difference of two {compared}s, root mean square": comparison.difference,
        "The difference in relation to the mean": comparison.ratio,
    }
    for title, table in tables.items():
        print(f"\n{title}")
        print("step" + "".join(f"{name:>7}" for name in NAMES))
        for t, row in enumerate(table.tolist()):
            print(f"{t + 1:4}" + "".join(f"{value:7.3f}" for value in row))


def quoted(text: str) -> str:
    """The text of a token between quotes, so that its spaces can be seen; a long one is cut."""
    if len(text) > 10:
        text = text[:9] + "…"
    return f"'{text}'"


def padded(text: str, width: int) -> str:
    """The text with spaces up to a width in columns of the terminal, of which some characters take two."""
    columns = 0
    for character in text:
        if unicodedata.east_asian_width(character) in "WF":
            columns += 2
        elif not unicodedata.combining(character):
            columns += 1
    return text + " " * (width - columns)


# ---- The page --------------------------------------------------------------------------------------------


def page_path(options) -> Path:
    """Where the page is written: at --page, otherwise into the folder of the run."""
    if options.page is not None:
        return options.page
    return output_path(options.run, "look.html")


def page_data(sentences: list[str], prompts: list[Prompt], comparison: Comparison | None) -> dict:
    """What the page shows, as JSON values."""
    data = {
        "summary": sentences,
        "projections": NAMES if prompts[0].has_diagonals() else [],
        "prompts": [prompt_data(prompt) for prompt in prompts],
        "compared": what_is_compared(prompts),
        "comparison": None,
    }
    if comparison is not None:
        data["comparison"] = {
            "size": rounded(comparison.size),
            "difference": rounded(comparison.difference),
            "ratio": rounded(comparison.ratio),
        }
    return data


def prompt_data(prompt: Prompt) -> dict:
    """The values of one prompt: those of each step are lists with an entry for each of T tokens."""
    steps = []
    for step, would_say in zip(prompt.steps, prompt.would_say):
        steps.append(
            {
                "would_say": would_say,  # [T][CHOICES]
                "p": rounded(step.likeliest_p),  # [T][CHOICES]
                "next_p": rounded(step.next_p),  # [T]
                "opening": rounded(step.opening),  # [T]
                "movement": rounded(step.movement),  # [T]
                "sizes": [rounded(root_mean_square(m, dim=-1)) for m in step.diagonals.values()],  # [7][T]
                "updates": [rounded(update) for update in step.updates.values()],  # [7][T]
            }
        )
    return {"left_out": prompt.left_out, "tokens": prompt.tokens, "steps": steps}


def rounded(values) -> list:
    """A tensor as nested lists of numbers with four digits; None for what is not finite."""
    if values.ndim > 1:
        return [rounded(row) for row in values]
    numbers = []
    for value in values.tolist():
        numbers.append(float(f"{value:.4g}") if math.isfinite(value) else None)
    return numbers


def write_page(path: Path, data: dict):
    """Put the data into the template. The page shows texts as texts, whatever they contain."""
    text = json.dumps(data, allow_nan=False)
    text = text.replace("<", "\\u003c")  # nothing in it can end the script element that holds it
    page = TEMPLATE.read_text(encoding="utf-8").replace(PLACE_OF_DATA, text)
    replace_file(path, lambda part: part.write_text(page, encoding="utf-8"))


if __name__ == "__main__":
    exit_on_user_error(main, "try a shorter --prompt, or a machine with more memory")
