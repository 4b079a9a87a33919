"""Variants of the paper's system, one class for each question of the study.

Each overrides a method of Ouroboros. save() and load() work for them as they are; evaluate.py and the other
programs open only the classes of ouroboros.py and patch.py.
"""

import hashlib

import torch
from torch import nn

from ouroboros import Ouroboros, StaticModulation, prefix_mean, svd_bases
from patch import Adapter
from qwen import PROJECTIONS, rotary_at
from support.fast import promote

# ---- Another input of the Controller ---------------------------------------------------------------------


class MeanInput(Ouroboros):
    """The Controller sees one vector in the place of the pooled state, at every position and step.

    The vector is the mean of the pooled states before the loop. measure() finds it once, on training text.
    """

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        d = qwen.config.hidden_size
        self.register_buffer("mean_input", torch.zeros(d, device=self.norm.weight.device))

    @torch.no_grad()
    def measure(self, ids):
        """Set the vector from training text, ids [B, T]."""
        rotary = rotary_at(self.config, 0, ids.shape[1], ids.device)
        no_cache = self.no_cache(self.depth)
        h = self.run_prelude(self.embed_tokens(ids), rotary, no_cache)
        self.mean_input.copy_(promote(prefix_mean(h)).mean((0, 1)))

    def diagonals(self, h, t: int, step_cache=None):
        return self.controller(self.mean_input.to(h.dtype).expand(len(h), 1, -1), t)


# ---- A faster static table -------------------------------------------------------------------------------


class FastTable(StaticModulation):
    """A static table that learns 100 times as fast as its learning rate says: m = 100 * table.

    AdamW moves an entry of the table by about the learning rate in each step, however large its gradient is.
    The gradient is that of m itself, so that clipping treats it as it would with a larger learning rate.
    """

    def forward(self, t: int):
        entries = self.table[t]
        m = entries + (100 - 1) * entries.detach()
        return dict(zip(PROJECTIONS, m))


class Static100(Ouroboros):
    """Static modulation, whose table has 100 times the learning rate of the gate and the step norm.

    An entry of the table can move by at most the sum of the learning rates of a run. The diagonals of the
    Controller are products of many weights and grow further, so that equal rates are not a fair comparison.
    """

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        self.controller = FastTable(self.settings["rank"]).to(self.norm.weight.device)


# ---- Other bases -----------------------------------------------------------------------------------------


class RandomBases(Ouroboros):
    """The paper's system with random orthogonal bases, which have the singular values of the true ones."""

    def residual_bases(self, removed, rank: int) -> dict:
        generator = torch.Generator().manual_seed(0)
        bases = {}
        for k, (A, B) in super().residual_bases(removed, rank).items():
            singular_values = promote(B).norm(dim=0)
            random_A = random_orthogonal(A.shape[1], rank, generator).T  # [r, in]
            random_B = random_orthogonal(B.shape[0], rank, generator).to(singular_values)
            random_B = random_B * singular_values  # [out, r]
            bases[k] = (random_A.contiguous().to(A), random_B.contiguous().to(B))
        return bases


def random_orthogonal(n: int, rank: int, generator: torch.Generator):
    """`rank` random orthonormal columns, [n, rank], on the CPU."""
    return torch.linalg.qr(torch.randn(n, rank, generator=generator, device="cpu")).Q


class OwnBases(Ouroboros):
    """The paper's system with bases from the SVD of the recurrent layer itself.

    Nothing of the removed layers is in them.
    """

    @torch.no_grad()
    def residual_bases(self, removed, rank: int) -> dict:
        bases = {}
        for k, projection in self.recurrent.projections().items():
            A, B = svd_bases(projection.weight, rank)
            bases[k] = (A.to(projection.weight), B.to(projection.weight))
        return bases


# ---- As released -----------------------------------------------------------------------------------------


class Released(Ouroboros):
    """Trained as the released script of the Controller does it: weights in bfloat16, a depth of 4, 8 or 16.

    Each step of the optimizer rounds the weights. A hash of the batch draws its depth, so that a resumed run
    draws the same depths. The published target and pool are options of train.py. The learning rate of the
    released script hardly falls; here it falls as for the other rows.
    """

    DEPTHS = (4, 8, 16)

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        for p in self.trained_parameters().values():
            p.data = p.data.bfloat16()

    def loss(self, ids, targets, **depth):
        if torch.is_grad_enabled():  # in training; an evaluation has the model's own depth
            batch_hash = hashlib.sha1(ids.cpu().numpy().tobytes()).hexdigest()
            depth["depth"] = self.DEPTHS[int(batch_hash, 16) % len(self.DEPTHS)]
        return super().loss(ids, targets, **depth)


# ---- The full model, adapted -----------------------------------------------------------------------------


class AdaptedFull(Ouroboros):
    """The full model with the adapters of --patch on every layer. Nothing is removed and nothing is looped.

    What it gains over the full model is what any model with such adapters gains by getting used to the text.
    Its prelude, recurrent layer and coda are those of the paper's cut, for the cut baseline.
    """

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        first = len(self.prelude)
        middle = self.settings["recurrent"]
        end = len(qwen.layers) - len(self.coda)
        self.removed = nn.ModuleList([*qwen.layers[first:middle], *qwen.layers[middle + 1 : end]])
        self.removed.requires_grad_(False)
        self.removed_before = middle - first  # how many of them lie before the recurrent layer
        self.adapters = nn.ModuleList(Adapter(layer) for layer in qwen.layers)
        self.to(self.norm.weight.device)

    def hidden(self, ids, cache=None, depth=None):
        """ids [B, T] -> normalised last hidden states [B, T, d]. There is no loop, whatever the depth."""
        before = self.removed[: self.removed_before]
        behind = self.removed[self.removed_before :]
        layers = [*self.prelude, *before, self.recurrent, *behind, *self.coda]
        rotary = rotary_at(self.config, 0, ids.shape[1], ids.device)
        h = self.embed_tokens(ids)
        for layer, adapter in zip(layers, self.adapters):
            h = layer(h, rotary, None, adapter)
        return self.norm(h)

    def new_cache(self, depth=None):
        """None: generation reads everything again for each token."""
        return None

    @classmethod
    def load(cls, folder, base=None, dtype=torch.float32, device="cpu", checkpoint=None) -> "AdaptedFull":
        model = super().load(folder, base, dtype, device, checkpoint)
        model.removed.to(model.norm.weight)  # their device and their type
        return model
