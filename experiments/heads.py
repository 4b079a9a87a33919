"""Which attention heads copy, and what a cut does to them: python experiments/heads.py RUN [RUN ...]

Copying a repeated passage takes two kinds of heads (arXiv 2209.11895). A previous-token head attends to the
token before. An induction head, in a later layer, attends to the token that followed the last time. This
program measures both in the full, the cut and the patched models of runs of one base, on repeated random
tokens. Then it removes heads and measures copying again. It draws OUT/heads.png and prints its tables.
"""

import sys
from argparse import SUPPRESS, ArgumentParser
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data import Batches, Tokens, open_text
from evaluate import PASSAGE, copied, open_run, open_run_and_baselines
from qwen import load_tokenizer, rotate
from support.fast import keep_freed_memory
from support.files import UserError, replace_file, run_program
from support.machine import pick_device, pick_dtype
from support.options import number
from support.report import estimate, markdown_table
from support.run import read_run

STRONG = 0.4  # of a head's attention, from which on it is called a previous-token or an induction head


def main(argv=None):
    parser = ArgumentParser(description="Find the heads that copy, and remove them.", usage=SUPPRESS)
    option = parser.add_argument
    option("runs", nargs="+", metavar="RUN", help="Runs of train.py --patch on one base model.")
    option("--passages", type=number(2, 10**6), default=48, help="How many are copied. [48]")
    option("--out", type=Path, default=Path("."), help="The folder of heads.png. [this one]")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    device = pick_device()
    dtype = pick_dtype("auto", device)

    first, full, cut = open_run_and_baselines(arguments.runs[0], dtype=dtype, device=device)
    numbers = kept_layers(first)
    recurrent = first.settings["recurrent"]
    models = {}  # {name: (model, its layers by their number in the full model)}
    models["full model"] = (full, dict(enumerate(full.layers)))
    models["cut model"] = (cut, dict(zip(numbers, cut.layers)))
    for run in arguments.runs:
        patched = open_run(run, full, dtype, device)
        if kept_layers(patched) != numbers or patched.depth != 1:
            raise UserError(f"{run}: loops, or keeps other layers than {arguments.runs[0]}; leave it out")
        layers = [*patched.prelude, patched.recurrent, *patched.coda]
        models[Path(run).name] = (patched, dict(zip(numbers, layers)))
    _, about = read_run(arguments.runs[0])
    tokenizer = load_tokenizer(full.source)
    batches = Batches(Tokens(open_text(about["options"]["data"]), "held-out", tokenizer), PASSAGE)
    text, _ = batches.batch(0, batches.at_most(arguments.passages))
    generator = torch.Generator().manual_seed(0)
    random_tokens = torch.randint(batches.tokens.vocab_size, text.shape, generator=generator)

    scores = {}  # {name of a model: {"previous" or "induction": {layer: the score of each head}}}
    for name, (model, layers) in models.items():
        scores[name] = head_scores(model, layers, random_tokens[:16])
    for kind in ("previous", "induction"):
        print(f"\nHeads with at least {STRONG} of their attention on the {kind} token, as layer.head:")
        print(markdown_table(strong_heads(kind, scores)))
    print("\nCopying after heads are removed:")
    print(markdown_table(removals(models, scores, recurrent, text, random_tokens)))
    draw(arguments.out / "heads.png", scores, numbers)


def kept_layers(model) -> list[int]:
    """The numbers, in the full model, of the layers that an Ouroboros has kept."""
    total = model.config.num_hidden_layers
    ends = range(total - len(model.coda), total)
    return [*range(len(model.prelude)), model.settings["recurrent"], *ends]


# ---- Scores ----------------------------------------------------------------------------------------------


@torch.no_grad()
def head_scores(model, layers: dict, passages) -> dict:
    """{"previous": {layer: [H]}, "induction": {layer: [H]}}: what heads attend to in passages read twice.

    previous: the mean attention of a token of the second reading to the token before it. induction: that to
    the token that followed the same token in the first reading.
    """
    ids = torch.cat([passages, passages], dim=1).to(model.norm.weight.device)  # [B, 2P]
    P = passages.shape[1]
    scores = {"previous": {}, "induction": {}}

    def record(i):
        def hook(attention, inputs):
            weights = attention_weights(attention, *inputs)  # [B, H, 2P, 2P]
            previous = weights.diagonal(-1, dim1=2, dim2=3)[..., P:]
            induction = weights.diagonal(1 - P, dim1=2, dim2=3)[..., 1:]
            scores["previous"][i] = previous.mean((0, 2))
            scores["induction"][i] = induction.mean((0, 2))

        return hook

    with ExitStack() as hooks:
        for i, layer in layers.items():
            hooks.enter_context(layer.self_attn.register_forward_pre_hook(record(i)))
        model(ids)
    return scores


def attention_weights(attention, x, rotary, cache, project):
    """The weights [B, H, T, T] of an Attention of qwen.py for its inputs."""
    q = rotate(attention.split_heads(project(attention.q_proj, x, "q_proj")), rotary)
    k = rotate(attention.split_heads(project(attention.k_proj, x, "k_proj")), rotary)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.float() @ k.float().mT) * attention.head_dim**-0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def heads_above(scores: dict[int, torch.Tensor], threshold: float) -> list[tuple[int, int]]:
    """The (layer, head) pairs whose score is at least the threshold."""
    return [(i, h) for i, row in scores.items() for h, score in enumerate(row.tolist()) if score >= threshold]


def strong_heads(kind: str, scores: dict) -> list[list[str]]:
    """A table of the heads that are strong in any model, with their score in each."""
    heads = sorted({head for by_kind in scores.values() for head in heads_above(by_kind[kind], STRONG)})
    rows = [["head", *scores]]
    for i, h in heads:
        cells = [f"{i}.{h}"]
        for by_kind in scores.values():
            cells.append(f"{by_kind[kind][i][h].item():.2f}" if i in by_kind[kind] else "removed")
        rows.append(cells)
    return rows


# ---- Removing heads --------------------------------------------------------------------------------------


@contextmanager
def without_heads(layers: dict, heads: list[tuple[int, int]]):
    """A context in which these heads give zero."""

    def zero(i):
        removed = [h for layer, h in heads if layer == i]

        def hook(attention, inputs):
            x, rotary, cache, project = inputs

            def project_without(projection, y, name):
                if name == "o_proj":
                    y = y.unflatten(-1, (-1, attention.head_dim)).clone()  # [B, T, H, D]
                    y[:, :, removed] = 0
                    y = y.flatten(2)
                return project(projection, y, name)

            return x, rotary, cache, project_without

        return hook

    with ExitStack() as hooks:
        for i, layer in layers.items():
            hooks.enter_context(layer.self_attn.register_forward_pre_hook(zero(i)))
        yield


def removals(models: dict, scores: dict, recurrent: int, text, random_tokens) -> list[list[str]]:
    """A table of the tokens that are copied without the heads of a kind, and without as many other heads.

    recurrent: the number of the layer up to which previous-token heads are removed, and then those behind it.
    """
    rows = [["model", "removed", "heads", "copies text", "copies random tokens"]]
    for name, (model, layers) in models.items():
        generator = torch.Generator().manual_seed(0)
        previous = heads_above(scores[name]["previous"], STRONG)
        induction = heads_above(scores[name]["induction"], STRONG)
        strong = {*previous, *induction}
        all_heads = [(i, h) for i, row in scores[name]["previous"].items() for h in range(len(row))]
        others = [head for head in all_heads if head not in strong]
        order = torch.randperm(len(others), generator=generator)[: len(strong)].tolist()
        kinds = {
            "nothing": [],
            f"previous-token heads up to layer {recurrent}": [(i, h) for i, h in previous if i <= recurrent],
            f"previous-token heads behind layer {recurrent}": [(i, h) for i, h in previous if i > recurrent],
            "induction heads": induction,
            "as many other heads": [others[n] for n in order],
        }
        for kind, heads in kinds.items():
            with without_heads(layers, heads):
                shares = [estimate(copied(model, passages)).percent() for passages in (text, random_tokens)]
            rows.append([name, kind, str(len(heads)), *shares])
    return rows


# ---- The picture -----------------------------------------------------------------------------------------


def draw(path: Path, scores: dict, kept: list[int]):
    """Draw layer x head for both kinds of heads, in the full model and in the last of the others."""
    from matplotlib.figure import Figure  # here, since it takes a second

    full = scores["full model"]
    last = list(scores)[-1]
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    panels = [(model, kind) for model in ("full model", last) for kind in ("previous", "induction")]
    for axis, (model, kind) in zip(axes, panels):
        rows = torch.full((len(full[kind]), len(full[kind][0])), torch.nan)
        for i, row in scores[model][kind].items():
            rows[i] = row
        image = axis.imshow(rows, vmin=0, vmax=1, aspect="auto", cmap="Blues")
        axis.set(title=f"{kind} token\n{model}", xlabel="head")
        axis.set_facecolor("0.85")  # of the removed layers
        axis.set_yticks(kept)
    axes[0].set_ylabel("layer; those with a number are kept")
    figure.colorbar(image, ax=axes, label="share of the attention", shrink=0.5)
    replace_file(path, lambda part: figure.savefig(part, dpi=110, format="png"))


if __name__ == "__main__":
    run_program(main)
