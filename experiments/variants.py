"""Variants of the paper's system that train.py does not offer.

Each class keeps what it adds to the settings of its base class in self.settings, so that save() and load() of
Ouroboros work for it as well.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import nn

from device import promote
from ouroboros import LoopCache, Ouroboros, check_choice, prefix_mean, svd_bases
from qwen import rotary_at

# ---- Variants that start from a measurement --------------------------------------------------------------


class Measured(Ouroboros):
    """A variant of which a part is measured once on training text, before the training starts."""

    def measure(self, ids):
        """Set the part from training text, ids [B, T]."""
        raise NotImplementedError


@torch.no_grad()
def states_before_loop(model: Ouroboros, ids):
    """The states that a looped model's prelude hands to its loop: ids [B, T] -> [B, T, d]"""
    no_cache = LoopCache([None] * len(model.prelude), [], [])
    rotary = rotary_at(model.config, 0, ids.shape[1], ids.device)
    return model.run_prelude(model.embed_tokens(ids), rotary, no_cache)


# ---- Other inputs of the Controller ----------------------------------------------------------------------


class ZeroInput(Ouroboros):
    """The Controller sees zeros in the place of the pooled state, so that it knows the step alone."""

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        self.pool = zero_pool


def zero_pool(h, cache=None):
    """Zeros in the place of a pooled state. [B, T, d] -> [B, 1, d]"""
    return torch.zeros_like(h[:, :1])


class MeanInput(Measured):
    """The Controller sees one vector in the place of the pooled state, at every position and step.

    The vector is the mean of the pooled states before the loop, over training text.
    """

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        self.register_buffer("mean_input", torch.zeros_like(self.norm.weight))  # [d]
        self.pool = self.mean_pool

    def measure(self, ids):
        pooled = prefix_mean(states_before_loop(self, ids))
        self.mean_input.copy_(promote(pooled).mean((0, 1)))

    def mean_pool(self, h, cache=None):
        """The one vector, whatever h. [B, T, d] -> [B, 1, d]"""
        return self.mean_input.expand(len(h), 1, -1)


class TokenInput(Ouroboros):
    """The Controller sees the state of the token itself, without any mean."""

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        self.pool = token_pool


def token_pool(h, cache=None):
    """The state of each position, as it is. [B, T, d] -> [B, T, d]"""
    return h


class WindowInput(Ouroboros):
    """The Controller sees the mean over the last 16 positions."""

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        self.pool = window_mean

    def new_cache(self, depth=None):
        """None: a new token's mean needs states that the cache of the loop does not keep."""
        return None


WINDOW = 16  # positions


def window_mean(h, cache=None):
    """At every position, the mean of h over it and up to 15 positions before it. [B, T, d] -> [B, T, d]"""
    before = F.pad(promote(h), (0, 0, WINDOW - 1, 0))  # zeros before the first position
    sums = before.unfold(1, WINDOW, 1).sum(-1)
    count = torch.arange(1, h.shape[1] + 1, device=h.device).clamp(max=WINDOW)
    return (sums / count[:, None]).to(h.dtype)


# ---- Other bases -----------------------------------------------------------------------------------------


class RandomBases(Ouroboros):
    """The paper's system with random orthogonal bases, which have the singular values of the true ones."""

    def residual_bases(self, removed, rank: int) -> dict:
        generator = torch.Generator().manual_seed(0)
        bases = {}
        for k, (A, B) in super().residual_bases(removed, rank).items():
            singular_values = promote(B).norm(dim=0)
            random_A = random_orthogonal(A.shape[1], rank, generator).T  # [r, in]
            random_B = random_orthogonal(B.shape[0], rank, generator) * singular_values  # [out, r]
            bases[k] = (random_A.contiguous().to(A), random_B.contiguous().to(B))
        return bases


def random_orthogonal(n: int, rank: int, generator: torch.Generator):
    """`rank` random orthonormal columns, [n, rank]."""
    return torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q


class OwnBases(Ouroboros):
    """The paper's system with bases from the SVD of the recurrent layer itself: nothing of the removed layers
    is in them.
    """

    @torch.no_grad()
    def residual_bases(self, removed, rank: int) -> dict:
        bases = {}
        for k, projection in self.recurrent.projections().items():
            A, B = svd_bases(projection.weight, rank)
            bases[k] = (A.to(projection.weight), B.to(projection.weight))
        return bases


# ---- Other starts ----------------------------------------------------------------------------------------


class SizedStepNorm(Measured):
    """The weights of the step norm start at the size of the state, so that h_new is as large as h.

    size: "state", one number, the root mean square of the states before the loop; or "channel", that of each
    channel. The first position of a sequence is left out, because its state is many times larger.
    """

    def __init__(self, qwen, size="state", **settings):
        check_choice("size", size, ("state", "channel"))
        super().__init__(qwen, **settings)
        self.settings["size"] = size

    @torch.no_grad()
    def measure(self, ids):
        squares = promote(states_before_loop(self, ids)[:, 1:]).square()
        if self.settings["size"] == "state":
            self.step_norm.weight.fill_(squares.mean().sqrt())
        else:
            self.step_norm.weight.copy_(squares.mean((0, 1)).sqrt().expand_as(self.step_norm.weight))


class GateStart(Ouroboros):
    """The gate starts at another bias than -2: at -4 it is open by 0.02, at 0 by 0.5."""

    def __init__(self, qwen, gate_bias=-2.0, **settings):
        super().__init__(qwen, **settings)
        self.settings["gate_bias"] = gate_bias
        nn.init.constant_(self.gate.linear.bias, gate_bias)


# ---- Drawn depths, and the system as released ------------------------------------------------------------


class DrawnDepth(Ouroboros):
    """The paper's system, trained at a depth that is drawn for each batch: 1, 2, 4 or 8.

    A hash of the batch's tokens draws the depth, so that it is a function of the seed and the step, and a
    resumed run draws the same depths.
    """

    DEPTHS = (1, 2, 4, 8)

    def loss(self, ids, targets, **options):
        if torch.is_grad_enabled():  # in training; an evaluation says at which depth
            digest = hashlib.sha1(ids.cpu().numpy().tobytes()).hexdigest()
            options["depth"] = self.DEPTHS[int(digest, 16) % len(self.DEPTHS)]
        return super().loss(ids, targets, **options)


class Rounded(Ouroboros):
    """The paper's system with trained weights in bfloat16, as in the released code: each step of the
    optimizer rounds them.
    """

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        for p in self.trained_parameters().values():
            p.data = p.data.bfloat16()


class Released(Rounded, DrawnDepth):
    """Trained as the released script of the Controller does it: weights in bfloat16, a depth of 4, 8 or 16.

    The published target and pool are options of train.py, the constant rate is one of optimizers.py.
    """

    DEPTHS = (4, 8, 16)
