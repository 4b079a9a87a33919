"""Yardsticks without a network: tables of how often a token, and a pair of tokens, occurs in training text.

    p(b)     = (count(b) + 1) / (N + V)                        the unigram table, with add-one smoothing
    p(b | a) = (count(a, b) + k p(b)) / (count(a) + k)         the bigram table

N is the number of tokens and V that of the vocabulary. Where a token a is rare, the bigram table falls back
on the unigram table; k says how soon. It is chosen on the validation sample.
"""

import numpy as np
import torch

STRENGTHS = (3, 10, 30, 100, 300, 1000)  # the k that are tried


class Unigrams:
    """The unigram table of the tokens [N] of a text with a vocabulary of V tokens."""

    def __init__(self, tokens: np.ndarray, vocabulary: int):
        counts = np.bincount(tokens, minlength=vocabulary)
        self.p = (counts + 1) / (len(tokens) + vocabulary)  # [V]

    def loss(self, ids, targets):
        """The mean cross entropy, as that of a model: ids and targets [B, T] each."""
        return torch.tensor(-np.log(self.p[targets.numpy()]).mean())


class Bigrams:
    """The bigram table of the same tokens, with the strength k."""

    def __init__(self, tokens: np.ndarray, vocabulary: int, k: float):
        self.vocabulary = vocabulary
        self.k = k
        self.unigrams = Unigrams(tokens, vocabulary)
        self.firsts = np.bincount(tokens[:-1], minlength=vocabulary)  # count(a) [V]
        self.pairs, self.counts = np.unique(self.numbers(tokens[:-1], tokens[1:]), return_counts=True)

    def numbers(self, a, b) -> np.ndarray:
        """A number for each pair of tokens."""
        return a.astype(np.int64) * self.vocabulary + b

    def loss(self, ids, targets):
        """The mean cross entropy, as that of a model: ids and targets [B, T] each."""
        a = ids.numpy().ravel()
        b = targets.numpy().ravel()
        numbers = self.numbers(a, b)
        places = np.searchsorted(self.pairs, numbers).clip(max=len(self.pairs) - 1)
        counts = np.where(self.pairs[places] == numbers, self.counts[places], 0)
        p = (counts + self.k * self.unigrams.p[b]) / (self.firsts[a] + self.k)
        return torch.tensor(-np.log(p).mean())
