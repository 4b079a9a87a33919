"""Models beside the paper's system: the adapted full model, simple alternatives, and variants of the patch.

Each class keeps what it adds to the settings of its base class in self.settings, so that save() and load() of
Ouroboros work for it as well.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from ouroboros import (
    NoGate,
    NoModulation,
    NoStepNorm,
    Ouroboros,
    StepValues,
    TrainedLinear,
    check_choice,
    default_cut,
    no_pool,
)
from patch import ADAPTER_RANK, Adapter, NoAdapter, Patched
from qwen import apply_projection, rotary_at

# ---- The full model, adapted -----------------------------------------------------------------------------


class AdaptedFull(Ouroboros):
    """The full model with the adapters of the patch on every layer: norms and a LoRA of rank 2.

    Nothing is cut and nothing is looped. What it gains over the full model is what any model with such
    adapters gains by getting used to the text.
    """

    PRETRAINED = (*Ouroboros.PRETRAINED, "layers.")

    def __init__(self, qwen, **settings):
        super().__init__(qwen, depth=1, modulation="none", gate=False, step_norm=False)
        last = qwen.config.num_hidden_layers - 1
        self.settings = dict(prelude=last, recurrent=last, coda=1)  # so that load() reads every layer
        self.layers = qwen.layers
        self.adapters = nn.ModuleList(Adapter(layer, ADAPTER_RANK["all"]) for layer in qwen.layers)
        self.to(self.embed_tokens.weight.device)

    def hidden(self, ids, cache=None, depth=None):
        """ids [B, T] -> normalised last hidden states [B, T, d]. There is no loop, whatever the depth."""
        rotary = rotary_at(self.config, 0, ids.shape[1], ids.device)
        h = self.embed_tokens(ids)
        for layer, adapter in zip(self.layers, self.adapters):
            h = layer(h, rotary, None, adapter)
        return self.norm(h)

    def new_cache(self, depth=None):
        """None: generation reads everything again for each token."""
        return None


# ---- Simple alternatives to the paper's system -----------------------------------------------------------


class Alternative(Ouroboros):
    """The cut model with something simple that is trained, in the place of Controller, gate and step norm.

    There is no loop: the recurrent layer is applied once. What is trained depends on `kind`:
        "matrix"    a d x d matrix after the recurrent layer, the identity at the start (arXiv 2505.24680)
        "lora"      a LoRA on every projection of all kept layers
        "lora one"  a LoRA on every projection of the recurrent layer
    The LoRAs have the rank at which they have about as many parameters as the paper's system.
    """

    def __init__(self, qwen, kind="matrix", **settings):
        check_choice("kind", kind, ("matrix", "lora", "lora one"))
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
        if kind == "matrix":
            self.behind_recurrent = TrainedLinear(d, d, bias=False)
            nn.init.eye_(self.behind_recurrent.weight)
        elif kind == "lora":
            rank = rank_for([*self.prelude, self.recurrent, *self.coda], budget)
            self.prelude_adapters = nn.ModuleList(LayerLoRA(layer, rank) for layer in self.prelude)
            self.recurrent_adapter = LayerLoRA(self.recurrent, rank)
            self.coda_adapters = nn.ModuleList(LayerLoRA(layer, rank) for layer in self.coda)
        else:
            self.recurrent_adapter = LayerLoRA(self.recurrent, rank_for([self.recurrent], budget))
        self.to(self.embed_tokens.weight.device)

    def checked_depth(self, depth: int | None) -> int:
        return 1  # there is no loop, whatever the depth

    def run_prelude(self, h, rotary, cache):
        for layer, adapter, layer_cache in zip(self.prelude, self.prelude_adapters, cache.prelude):
            h = layer(h, rotary, layer_cache, adapter)
        return h

    def loop_step(self, h, t: int, rotary, step_cache=None):
        return self.behind_recurrent(self.recurrent(h, rotary, step_cache, self.recurrent_adapter))

    def run_coda(self, h, rotary, cache):
        for layer, adapter, layer_cache in zip(self.coda, self.coda_adapters, cache.coda):
            h = layer(h, rotary, layer_cache, adapter)
        return h


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


# ---- Variants of the patch -------------------------------------------------------------------------------


class Seams(Patched):
    """The patch with a matrix at one seam only.

    one_seam: "in" (before the loop) or "out" (after the loop). The other seam keeps P = 0.
    """

    def __init__(self, qwen, one_seam="in", **settings):
        check_choice("one_seam", one_seam, ("in", "out"))
        super().__init__(qwen, **settings)
        self.settings["one_seam"] = one_seam
        self.seam_in.requires_grad_(one_seam == "in")
        self.seam_out.requires_grad_(one_seam == "out")


class PaperCut(Patched):
    """The patch with the layers that the paper keeps."""

    def __init__(self, qwen, **settings):
        prelude, recurrent, coda = default_cut(qwen.config.num_hidden_layers)
        settings.update(prelude=prelude, recurrent=recurrent, coda=coda)
        super().__init__(qwen, **settings)


class StepAdapters(Patched):
    """The patch with a loop in which each step has an adapter of its own on the recurrent layer.

    Without modulation. The steps are as different from each other as so many layers could be, at the price
    of the parameters of an adapter for each.
    """

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        others = [copy.deepcopy(self.recurrent_adapter) for _ in range(self.depth - 1)]
        self.later_adapters = nn.ModuleList(others)

    def step_values(self, h, t: int, rotary, step_cache=None) -> StepValues:
        t = min(t, self.depth - 1)
        adapter = self.recurrent_adapter if t == 0 else self.later_adapters[t - 1]
        h_new = self.recurrent(h, rotary, step_cache, adapter)
        o = self.opening[t].to(h.dtype)
        return StepValues(None, o, torch.lerp(h, h_new, o))


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
