"""Look inside the loop of a trained run: python look.py runs/NAME --prompt "..."

For each token of the prompt and each step of the loop: what the model would say if the loop ended there, how
far the gate opens, how far the state moves, and how large the Controller's diagonals are. The terminal shows
the last tokens. A page, look.html, shows more of them; it needs no network.
"""

import json
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from evaluate import open_run, run_parser
from ouroboros import Ouroboros
from patch import Patched
from qwen import PROJECTIONS, load_tokenizer, rotary_at
from support.fast import promote
from support.files import UserError, run_program, write_text
from support.machine import pick_device, pick_dtype
from support.options import number
from support.run import STEP_FOLDER

TEMPLATE = Path(__file__).parent / "support" / "look.html"
PLACE_OF_DATA = "DATA_OF_THE_PAGE"  # in the template
SHOWN_TOKENS = 256  # values are kept of so many tokens at the end of a prompt
CHOICES = 3  # the likeliest next tokens that are kept of a prediction
NAMES = [k.removesuffix("_proj") for k in PROJECTIONS]

# ---- The values ------------------------------------------------------------------------------------------


@torch.no_grad()
def look_inside(model: Ouroboros, tokenizer, prompt: str, depth: int | None = None):
    """What the loop does at the last T tokens of a prompt, T being at most SHOWN_TOKENS.

    depth: the number of steps, by default the model's. Returns the values as JSON, whose keys are explained
    below, and the diagonals m_k of n projections, a tensor [T, steps, n, r]. n is 7, or 0 without a
    modulation. Raises UserError for an empty prompt, and for values that are not finite.
    """
    prompt = prompt.encode("utf-8", "replace").decode()  # the shell may pass bytes that are no UTF-8
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not tokens:
        raise UserError("--prompt is empty; give at least one character")
    ids = torch.tensor([tokens], device=model.norm.weight.device)

    # From here on as in Ouroboros.hidden, but the coda and the final norm follow each step.
    depth = model.checked_depth(depth)
    rotary = rotary_at(model.config, 0, len(tokens), ids.device)
    no_cache = model.no_cache(depth)
    h = model.run_prelude(model.embed_tokens(ids), rotary, no_cache)  # [1, all tokens, d]
    steps, diagonals = [], []
    for t in range(depth):
        t_trained = min(t, model.depth - 1)
        with recorded_outputs(model) as outputs:
            h_after = model.loop_step(h, t_trained, rotary)
        hidden = model.norm(model.run_coda(h_after, rotary, no_cache))
        likeliest, p, next_p = predictions(model, hidden, ids)
        opening = last_tokens(opening_of(model, t_trained, h, outputs))  # [T, d]
        before = last_tokens(h)
        movement = (last_tokens(h_after) - before).norm(dim=-1) / before.norm(dim=-1)
        if not (p.isfinite().all() and movement.isfinite().all()):
            raise UserError(f"step {t + 1} of the loop is not finite; give a lower --depth, or RUN/step-N")
        m = diagonals_of(model, h, outputs)
        step = {
            "would_say": texts_of(tokenizer, likeliest.tolist()),  # [T][CHOICES], the likeliest next tokens
            "p": rounded(p),  # [T][CHOICES], their probabilities
            "next_p": rounded(next_p),  # [T], the probability of the token that follows in the prompt
            "opening": rounded(opening.mean(-1)),  # [T], the mean over the channels
            "movement": rounded(movement),  # [T], |h after the step - h before it| / |h before it|
            "sizes": rounded(root_mean_square(m)),  # [T][n], of the diagonals
        }
        steps.append(step)
        diagonals.append(m)
        h = h_after

    texts = texts_of(tokenizer, tokens[-SHOWN_TOKENS:])
    values = {"tokens": texts, "left_out": len(tokens) - len(texts), "steps": steps}
    return values, torch.stack(diagonals, dim=1)


@contextmanager
def recorded_outputs(model: Ouroboros):
    """A dictionary that fills with {module: its output} while the block runs: the Controller and the gate."""
    outputs = {}

    def keep(module, inputs, output):
        outputs[module] = output

    modules = [module for module in (model.controller, model.gate) if module is not None]
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def last_tokens(x):
    """What is kept of a value of every token: [1, all tokens, ...] -> [T, ...], in float32 on the CPU."""
    return promote(x[0, -SHOWN_TOKENS:]).cpu()


def predictions(model: Ouroboros, hidden, ids):
    """The likeliest next tokens [T, CHOICES], their probabilities, and that of the token that follows, [T].

    The last one is nan where no token follows. hidden [1, all tokens, d] and ids [1, all tokens].
    """
    p = promote(F.linear(hidden[0, -SHOWN_TOKENS:], model.head_weight)).softmax(-1)  # [T, V]
    likeliest_p, likeliest = p.topk(CHOICES)
    following = ids[0, -len(p) :][1:, None]  # [T - 1, 1]
    next_p = p.new_full([len(p)], torch.nan)
    next_p[:-1] = p[:-1].gather(-1, following).squeeze(-1)
    return likeliest.cpu(), likeliest_p.cpu(), next_p.cpu()


def opening_of(model: Ouroboros, t: int, h, outputs: dict):
    """The share of the layer's output that step t takes over, [1, all tokens, d] like its input h."""
    if isinstance(model, Patched):
        return model.opening[t].expand_as(h)
    if model.gate is None:
        return torch.ones_like(h)
    return outputs[model.gate]


def diagonals_of(model: Ouroboros, h, outputs: dict):
    """The diagonals m_k of a step with the input h, [T, n, r]."""
    if model.controller is None:
        return last_tokens(h.new_zeros(1, h.shape[1], 0, model.settings["rank"]))
    m = outputs[model.controller]
    # a static table gives [r], and the mean of a sequence [1, 1, r], for all tokens
    of_projections = [m[k].expand(1, h.shape[1], -1) for k in PROJECTIONS]
    return last_tokens(torch.stack(of_projections, dim=2))


def root_mean_square(x):
    """[..., r] -> [...]"""
    return x.square().mean(-1).sqrt()


def rounded(x):
    """A tensor as nested lists of numbers with four digits; None for what is not finite."""
    if x.ndim > 0:
        return [rounded(row) for row in x]
    return float(f"{x:.4g}") if x.isfinite() else None


def texts_of(tokenizer, tokens):
    """The text of each token in a list, or in a list of lists, with escapes for what cannot be seen: \\n."""
    if isinstance(tokens, list):
        return [texts_of(tokenizer, token) for token in tokens]
    text = ""
    for character in tokenizer.decode([tokens], skip_special_tokens=False):
        text += character if character.isprintable() else repr(character)[1:-1]
    return text


# ---- The command -----------------------------------------------------------------------------------------


def main(argv=None):
    parser = run_parser("Look inside the loop of a trained run.")
    option = parser.add_argument
    option("--prompt", required=True, help="The text to read.")
    option("--tokens", type=number(1, SHOWN_TOKENS), default=12, help="How many the terminal shows. [12]")
    option("--page", type=Path, help="The page to write. [look.html in the folder of the run]")
    options = parser.parse_args(argv)
    page = options.page or default_page(options.run)
    if page.is_dir():
        raise UserError(f"--page {page}: is a folder; give the name of a file in it")

    device = pick_device(options.device)
    model = open_run(options.run, options.model, pick_dtype("auto", device), device)
    tokenizer = load_tokenizer(model.source)
    values, diagonals = look_inside(model, tokenizer, options.prompt, options.depth)
    values["summary"] = summary(options.run, values)
    values["projections"] = NAMES[: diagonals.shape[2]]  # none without a modulation
    write_page(page, values)

    print("\n".join(values["summary"]))
    print(f"\n{LEGEND}")
    print_steps(values, options.tokens)
    print(f"\nThe page {page} shows up to {SHOWN_TOKENS} tokens. Open it in a browser.")


def default_page(run: str) -> Path:
    """look.html in the folder of the run, also for one of its checkpoints; here for a run on the Hub."""
    folder = Path(run)
    if folder.match(STEP_FOLDER):  # a checkpoint, which a later one may replace
        folder = folder.parent
    return folder / "look.html" if folder.is_dir() else Path("look.html")


def summary(run: str, values: dict) -> list[str]:
    """The sentences above the values."""
    steps = values["steps"]
    opening = fmean(fmean(step["opening"]) for step in steps)
    movement = fmean(fmean(step["movement"]) for step in steps)
    sentences = [
        f"In {run}, a step of the loop takes over {opening:.0%} of the layer's output on average and "
        f"moves the state by {movement:.0%}."
    ]
    if len(steps) > 1:
        pairs = zip(steps[0]["would_say"], steps[-1]["would_say"])
        settled = [first[0] == last[0] for first, last in pairs]
        sentences.append(
            f"For {sum(settled)} of {len(settled)} tokens, the likeliest next token after the first step is "
            "that after the last."
        )
    return sentences


# ---- The terminal and the page ---------------------------------------------------------------------------

LEGEND = """\
would say: the likeliest next tokens if the loop ended after this step, with their probabilities
p(next): the probability of the token that follows in the prompt
opens: the mean opening of the gate, 1 without a gate; with --patch, the mean of the trained opening
moves: how far the step moves the state, relative to the length of the state
q to down: the root mean square of the diagonal m of each projection, where there is a modulation"""


def print_steps(values: dict, last: int):
    """A table of the steps for each of the last tokens."""
    tokens = values["tokens"]
    first = max(0, len(tokens) - last)
    print(f"\nThe last {len(tokens) - first} of {values['left_out'] + len(tokens)} tokens")
    for i in range(first, len(tokens)):
        title = f"token {values['left_out'] + i + 1}: {quoted(tokens[i])}"
        if i + 1 < len(tokens):
            title += f", followed by {quoted(tokens[i + 1])}"
        print(f"\n{title}")
        columns = "".join(f"{name:>6}" for name in values["projections"])
        print(f"step  {'would say':36}  p(next)  opens  moves{columns}")
        for t, step in enumerate(values["steps"], start=1):
            row = f"{t:4}  "
            for text, p in zip(step["would_say"][i][:2], step["p"][i]):
                row += f"{p:.2f} {quoted(text):13}"
            next_p = "-" if step["next_p"][i] is None else f"{step['next_p'][i]:.3f}"
            row += f"  {next_p:>7}  {step['opening'][i]:5.2f}  {step['movement'][i]:5.2f}"
            print(row + "".join(f"{size:6.2f}" for size in step["sizes"][i]))


def quoted(text: str) -> str:
    """The text of a token between quotes, so that its spaces can be seen; a long one is cut."""
    return f"'{text}'" if len(text) <= 10 else f"'{text[:9]}…'"


def write_page(path: Path, data: dict):
    """Put the data into the template. The page shows texts as texts, whatever they contain."""
    text = json.dumps(data, allow_nan=False)
    text = text.replace("<", "\\u003c")  # nothing in it can end the script element that holds it
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace(PLACE_OF_DATA, text))


if __name__ == "__main__":
    run_program(main)
