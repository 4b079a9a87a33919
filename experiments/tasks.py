"""Two tasks that need nothing to be downloaded. A model is a function from ids [B, T] to logits [B, T, V].

Choice: a piece of held-out text, and four pieces of the same length. One of them follows it in the text, and
the others follow other pieces. The model chooses the piece to which it gives the largest probability.

Copying: a sequence of random tokens, twice. The model predicts the second half, all of which it has seen.
"""

import math

import torch
import torch.nn.functional as F

from device import promote
from estimates import Estimate

PROMPT = 64  # tokens of the text before the continuation
CONTINUATION = 32  # tokens
OTHERS = 3  # the wrong continuations of a question
COPY_LENGTH = 64  # random tokens, which are then repeated
COPIES = 32  # sequences of the copying task


def measure_tasks(model, batches, first: int, questions: int, vocabulary: int, device) -> dict:
    """{"choice": 1 or 0 for each question, "copy loss" and "copy accuracy": one number for each sequence}.

    The questions are made of as many sequences of the text, of which `first` is the number of the first.
    """
    losses, accuracies = copying(model, vocabulary, device)
    return {
        "choice": choices(model, batches, first, questions, device),
        "copy loss": losses,
        "copy accuracy": accuracies,
    }


# ---- The true continuation among four --------------------------------------------------------------------


@torch.no_grad()
def choices(model, batches, first: int, questions: int, device) -> list[int]:
    """1 for each question that is answered right, else 0.

    The prompt of a question is the beginning of a sequence. The wrong continuations are those of the next
    three sequences; after the last sequence comes the first.
    """
    length = PROMPT + CONTINUATION
    starts = []
    for n in range(first, batches.at_most(first + questions)):
        ids, _ = batches.batch(n, 1, device)
        starts.append(ids[0, :length])

    right = []
    for n in range(len(starts)):
        candidates = []
        for i in range(1 + OTHERS):
            source = starts[(n + i) % len(starts)]
            candidates.append(torch.cat([starts[n][:PROMPT], source[PROMPT:]]))
        scores = log_probabilities(model, torch.stack(candidates))
        right.append(int(scores.argmax() == 0))
    return right


def log_probabilities(model, ids):
    """The log probability of the tokens after each prompt: ids [B, T] -> [B]"""
    logits = promote(model(ids))[:, PROMPT - 1 : -1]  # those that predict the continuation
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, ids[:, PROMPT:, None]).sum((1, 2))


def binomial(right: list[int]) -> Estimate:
    """The share of right answers and its binomial error."""
    share = sum(right) / len(right)
    return Estimate(share, math.sqrt(share * (1 - share) / len(right)))


# ---- Copying ---------------------------------------------------------------------------------------------


@torch.no_grad()
def copying(model, vocabulary: int, device) -> tuple[list[float], list[float]]:
    """(losses, accuracies) of the repeated half of random sequences, one number for each sequence.

    The first token of the second half is left out, because nothing says that the sequence is repeated there.
    """
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(0, vocabulary, (COPIES, COPY_LENGTH), generator=generator)
    losses = []
    accuracies = []
    for ids in torch.cat([half, half], dim=1).to(device).split(1):
        logits = promote(model(ids))[:, COPY_LENGTH:-1].flatten(0, 1)
        targets = ids[:, COPY_LENGTH + 1 :].flatten()
        losses.append(F.cross_entropy(logits, targets).item())
        accuracies.append((logits.argmax(-1) == targets).double().mean().item())
    return losses, accuracies
