"""The models of the experiments that train.py does not offer.

They are variants of the paper's system, variants of the patch, and simple alternatives to the paper's system.

Each class keeps what it adds to the settings of its base class in self.settings, so that save() and load() of
Ouroboros work for it as well.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from device import promote
from ouroboros import NoGate, NoModulation, NoStepNorm, Ouroboros, TrainedLinear, check_choice, no_pool
from patch import NoAdapter, Patched
from qwen import apply_projection

# ---- Variants of the paper's system ----------------------------------------------------------------------


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
    """The paper's system with trained weights in bfloat16, as in the published code."""

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        for p in self.trained_parameters().values():
            p.data = p.data.bfloat16()


# ---- Variants of the patch -------------------------------------------------------------------------------


class Seams(Patched):
    """The patch with a matrix at one seam only.

    seams: "in" (before the loop), "out" (after the loop) or "none". A seam without a matrix keeps P = 0.
    """

    def __init__(self, qwen, seams: str, **settings):
        check_choice("seams", seams, ("in", "out", "none"))
        super().__init__(qwen, seams=True, **settings)
        self.settings["seams"] = seams
        self.seam_in.requires_grad_(seams == "in")
        self.seam_out.requires_grad_(seams == "out")


class LowRank(Patched):
    """The patch with matrices P of rank d / 8, which have a quarter of the parameters."""

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        d = qwen.config.hidden_size
        self.seam_in.P = low_rank_matrix(d, d // 8)
        self.seam_out.P = low_rank_matrix(d, d // 8)
        self.to(self.embed_tokens.weight.device)


def low_rank_matrix(d: int, rank: int) -> nn.Sequential:
    """The product of two trained matrices, [d, rank] and [rank, d], zero at the start. [.., d] -> [.., d]"""
    down = TrainedLinear(d, rank, bias=False)
    up = TrainedLinear(rank, d, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(down, up)


# ---- Alternatives to the paper's system ------------------------------------------------------------------


class Alternative(Ouroboros):
    """The cut model with something simple that is trained, in the place of Controller, gate and step norm.

    There is no loop: the recurrent layer is applied once. What is trained depends on `kind`:
        "scale"     a factor for each channel, behind the recurrent layer
        "matrix"    a d x d matrix behind the recurrent layer, the identity at the start (arXiv 2505.24680)
        "lora"      a LoRA on every projection of all kept layers
        "lora one"  a LoRA on every projection of the recurrent layer
        "layer"     all weights of the recurrent layer
    The LoRAs have the rank at which they have about as many parameters as the paper's system.
    """

    def __init__(self, qwen, kind="matrix", **settings):
        check_choice("kind", kind, ("scale", "matrix", "lora", "lora one", "layer"))
        super().__init__(qwen, **settings)
        self.settings["kind"] = kind
        budget = sum(p.numel() for p in self.trained_parameters().values())  # of the paper's system

        self.lora = nn.ModuleDict()
        self.pool = no_pool
        self.controller = NoModulation()
        self.gate = NoGate()
        self.step_norm = NoStepNorm()

        d = qwen.config.hidden_size
        self.prelude_adapters = nn.ModuleList(NoAdapter() for _ in self.prelude)
        self.recurrent_adapter = NoAdapter()
        self.coda_adapters = nn.ModuleList(NoAdapter() for _ in self.coda)
        self.behind_recurrent = nn.Identity()
        if kind == "scale":
            self.behind_recurrent = ChannelScale(d)
        elif kind == "matrix":
            self.behind_recurrent = TrainedLinear(d, d, bias=False)
            nn.init.eye_(self.behind_recurrent.weight)
        elif kind == "lora":
            rank = rank_for([*self.prelude, self.recurrent, *self.coda], budget)
            self.prelude_adapters = nn.ModuleList(LayerLoRA(layer, rank) for layer in self.prelude)
            self.recurrent_adapter = LayerLoRA(self.recurrent, rank)
            self.coda_adapters = nn.ModuleList(LayerLoRA(layer, rank) for layer in self.coda)
        elif kind == "lora one":
            self.recurrent_adapter = LayerLoRA(self.recurrent, rank_for([self.recurrent], budget))
        else:
            self.recurrent.float().requires_grad_(True)
            # What is not pretrained is saved, and so the trained layer no longer counts as pretrained.
            self.PRETRAINED = tuple(prefix for prefix in self.PRETRAINED if prefix != "recurrent.")
        self.to(self.embed_tokens.weight.device)

    def checked_depth(self, depth: int | None) -> int:
        return 1  # there is no loop, whatever the depth

    def run_prelude(self, h, rotary, cache):
        for layer, adapter, layer_cache in zip(self.prelude, self.prelude_adapters, cache.prelude):
            h = layer(h, rotary, layer_cache, adapter)
        return h

    def loop_step(self, h, t: int, rotary, step_cache=None):
        weights_type = self.recurrent.mlp.up_proj.weight.dtype  # float32 where the layer is trained
        h_new = self.recurrent(h.to(weights_type), rotary, step_cache, self.recurrent_adapter)
        return self.behind_recurrent(h_new.to(h.dtype))

    def run_coda(self, h, rotary, cache):
        for layer, adapter, layer_cache in zip(self.coda, self.coda_adapters, cache.coda):
            h = layer(h, rotary, layer_cache, adapter)
        return h


class ChannelScale(nn.Module):
    """h times a trained factor for each channel, 1 at the start. [B, T, d] -> [B, T, d]"""

    def __init__(self, d: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))

    def forward(self, h):
        return h * self.scale.to(h.dtype)


class LoRA(nn.Module):
    """The plain low-rank change B A x of one projection (arXiv 2106.09685), with B = 0 at the start.

    x [B, T, in] -> [B, T, out]
    """

    def __init__(self, projection: nn.Linear, rank: int):
        super().__init__()
        out_features, in_features = projection.weight.shape
        self.A = nn.Parameter(torch.randn(rank, in_features) / math.sqrt(in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, x):
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class LayerLoRA(nn.Module):
    """A LoRA on every projection of a layer, as the layer's `project`: W_k x + B_k A_k x."""

    def __init__(self, layer, rank: int):
        super().__init__()
        self.lora = nn.ModuleDict()
        for k, projection in layer.projections().items():
            self.lora[k] = LoRA(projection, rank)

    def forward(self, projection, x, k, apply=apply_projection):
        return apply(projection, x, k) + self.lora[k](x)


def rank_for(layers, budget: int) -> int:
    """The rank at which LoRAs on all projections of these layers have about `budget` parameters."""
    parameters_per_rank = 0
    for layer in layers:
        for projection in layer.projections().values():
            parameters_per_rank += sum(projection.weight.shape)
    return max(1, round(budget / parameters_per_rank))
