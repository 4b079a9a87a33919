"""What is measured of a model: its losses on fixed samples, and what explains them.

The samples are two disjoint pieces of a split in the evaluation's order. What is chosen, such as the best
learning rate of a row, is chosen on the validation sample. The test sample is only reported.
"""

import copy
import math
import re
from functools import partial

import torch
import torch.nn.functional as F

from data import Batches
from device import promote
from evaluate import evaluate
from experiments.variants import states_before_loop, token_pool, window_mean
from ouroboros import Gate, Ouroboros, StepNorm, prefix_mean, sequence_mean, svd_bases
from qwen import Qwen

SAMPLES = {"validation": (0, 64), "test": (64, 128)}  # the first sequence, and how many
FIRST_OF_TEST, TEST_SEQUENCES = SAMPLES["test"]
DEPTHS = (1, 2, 4, 8, 16)  # at which a looped model is tested
STATES_OF = 32  # test sequences whose states are compared
STRIDE = 16  # positions from one at which states are compared to the next
SENTENCE = (8, 64)  # the fewest and the most tokens of a sentence

# ---- Losses ----------------------------------------------------------------------------------------------


def sample_losses(loss_of, batches: Batches, device, sample="test") -> list[float | None]:
    """The loss of each sequence of a sample. loss_of(ids, targets): as for evaluate."""
    first, sequences = SAMPLES[sample]
    return rounded(evaluate(loss_of, batches, sequences, device, first))


def losses_on(loss_of, texts: dict[str, Batches], device) -> dict:
    """{text: {sample: the loss of each sequence}}"""
    losses = {}
    for name, batches in texts.items():
        losses[name] = {}
        for sample in SAMPLES:
            losses[name][sample] = sample_losses(loss_of, batches, device, sample)
    return losses


def rounded(losses: list[float]) -> list[float | None]:
    """The losses with five digits; None for what is not finite, for which JSON has no number."""
    return [round(loss, 5) if math.isfinite(loss) else None for loss in losses]


def losses_by_depth(model: Ouroboros, batches: Batches, device) -> dict:
    """{depth: the loss of each test sequence} for each of DEPTHS."""
    losses = {}
    for depth in DEPTHS:
        losses[depth] = sample_losses(partial(model.loss, depth=depth), batches, device)
    return losses


# ---- Another text's pool ---------------------------------------------------------------------------------


@torch.no_grad()
def losses_with_swapped_pool(model: Ouroboros, batches: Batches, device) -> list[float]:
    """The loss of each test sequence where the Controller is given the pooled state of another one.

    The sequences are read two at a time. At each position and step of the loop, each of the two gets the
    pooled state of the other.
    """
    swapped = copy.copy(model)  # shares all modules; only its pool is another

    def pool_of_the_other(h, cache=None):
        return model.pool(h, cache).flip(0)

    swapped.pool = pool_of_the_other
    losses = []
    for n in range(FIRST_OF_TEST, FIRST_OF_TEST + TEST_SEQUENCES, 2):
        ids, targets = batches.batch(n, 2, device)  # [2, T] each
        logits = promote(swapped(ids))
        token_losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses += token_losses.view(ids.shape).mean(1).tolist()
    return rounded(losses)


# ---- How much the Controller's input varies --------------------------------------------------------------

INPUTS_BY_POOL = {
    "prefix": prefix_mean,
    "sequence": sequence_mean,
    "window": window_mean,
    "token": token_pool,
}


@torch.no_grad()
def similarity_of_inputs(model: Ouroboros, batches: Batches, device) -> dict:
    """{pool: the mean cosine of what it gives of two different texts at the same position}.

    The states are those before the loop. "prefix from the second" is the prefix mean without the first
    position, whose state is many times larger than the others and hardly depends on the text.
    """
    ids, _ = batches.batch(FIRST_OF_TEST, STATES_OF, device)
    h = promote(torch.cat([states_before_loop(model, sequence) for sequence in ids.split(1)]))  # [N, T, d]
    similarity = {name: mean_cosine(pool(h)) for name, pool in INPUTS_BY_POOL.items()}
    similarity["prefix from the second"] = mean_cosine(prefix_mean(h[:, 1:]))
    return similarity


def mean_cosine(x) -> float:
    """The mean cosine of two rows of x [N, T or 1, d] at the same position, over every 16th position."""
    if x.shape[1] > 1:
        x = x[:, STRIDE - 1 :: STRIDE]
    x = F.normalize(x, dim=-1)
    cosines = torch.einsum("ntd,mtd->tnm", x, x)  # [T / 16, N, N]
    pairs = x.shape[1] * len(x) * (len(x) - 1)
    own = x.shape[1] * len(x)  # the cosine of a row with itself is 1
    return (cosines.sum().item() - own) / pairs


# ---- The bases -------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_bases(model: Ouroboros, full: Qwen) -> dict:
    """{projection: how R and the recurrent layer's own W are related}.

    "cosine": of R and -W. "input overlap" and "output overlap": of the spaces of the top r right and left
    singular vectors of R and W, from 0 to 1; "input chance" and "output chance": of random spaces. "layers":
    the mean absolute cosine of the same projection in two layers of the full model.
    """
    rank = model.settings["rank"]
    prelude = len(model.prelude)
    first_of_coda = len(full.layers) - len(model.coda)
    recurrent = model.settings["recurrent"]
    removed = [*full.layers[prelude:recurrent], *full.layers[recurrent + 1 : first_of_coda]]

    compared = {}
    for k, projection in model.recurrent.projections().items():
        W = promote(projection.weight)  # [out, in]
        R = sum(promote(layer.projections()[k].weight) for layer in removed) / len(removed) - W
        A_R, B_R = svd_bases(R, rank)
        A_W, B_W = svd_bases(W, rank)
        out_features, in_features = W.shape
        compared[k] = {
            "cosine": F.cosine_similarity(R.flatten(), -W.flatten(), dim=0).item(),
            "input overlap": overlap(A_R, A_W),
            "input chance": rank / in_features,
            "output overlap": overlap(F.normalize(B_R, dim=0).T, F.normalize(B_W, dim=0).T),
            "output chance": rank / out_features,
            "layers": similarity_of_layers([layer.projections()[k].weight for layer in full.layers]),
        }
    return compared


def overlap(X, Y) -> float:
    """The mean squared cosine between two spaces, which orthonormal rows X and Y [r, n] span: 0 to 1."""
    return ((X @ Y.T).square().sum() / len(X)).item()


def similarity_of_layers(weights) -> float:
    """The mean absolute cosine of two of these matrices."""
    flat = torch.stack([F.normalize(promote(weight).flatten(), dim=0) for weight in weights])
    cosines = (flat @ flat.T).abs()
    count = len(weights)
    return (cosines.sum().item() - count) / (count * (count - 1))


# ---- As the released code measures -----------------------------------------------------------------------


def losses_on_sentences(model, batches: Batches, device) -> list[float]:
    """The loss of the next token on single sentences, as the released code tests on held-out text.

    There is a sentence of each test sequence that has one of 8 to 64 tokens: the first. It is read alone.
    """
    losses = []
    for n in range(FIRST_OF_TEST, FIRST_OF_TEST + TEST_SEQUENCES):
        ids, _ = batches.batch(n, 1, device)
        sentence = first_sentence(batches.tokenizer, ids[0].tolist())
        if sentence is not None:
            sentence = torch.tensor([sentence], device=device)
            with torch.no_grad():
                losses.append(model.loss(sentence[:, :-1], sentence[:, 1:]).item())
    return rounded(losses)


def first_sentence(tokenizer, ids: list[int]) -> list[int] | None:
    """The tokens of the first whole sentence or line of a text, or None if none has a fitting length."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    pieces = re.split(r"\n+|(?<=[.!?]) +", text)
    fewest, most = SENTENCE
    for piece in pieces[1:-1]:  # the first and the last may be cut
        tokens = tokenizer.encode(piece, add_special_tokens=False).ids
        if fewest <= len(tokens) <= most:
            return tokens
    return None


def distance_from_start(model: Ouroboros) -> dict:
    """How far the weights of the step norm and the biases of the gate have moved, on average.

    Empty for a model that lacks one of the two.
    """
    if not isinstance(model.step_norm, StepNorm) or not isinstance(model.gate, Gate):
        return {}
    norm_change = model.step_norm.weight[: model.depth] - 1  # they start at 1
    bias_change = model.gate.linear.bias + 2  # they start at -2
    return {
        "step norm": norm_change.abs().float().mean().item(),
        "gate": bias_change.abs().float().mean().item(),
    }


# ---- Parameters ------------------------------------------------------------------------------------------


def parameters_by_part(model: Ouroboros) -> dict[str, int]:
    """{part: the number of its trained parameters}. A part is an attribute of the model."""
    counts = {}
    for name, p in model.trained_parameters().items():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + p.numel()
    return counts
