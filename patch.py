"""Past the paper: mend the seams of the cut instead of gating a loop.

    ids -> embed -> prelude -> h = h + P_in h
    for t in 0 .. depth-1:
        h_new = Layer(h; W_k + (alpha/r) B_k diag(m_t,k) A_k)
        h     = h + o_t * (h_new - h)                    o_t: one number for each channel
    h = h + P_out h -> coda -> final norm -> lm head -> logits

A seam is a place where a layer now gets another state than the one it was trained on. A d x d matrix P at
each seam mends much of that (LinearPatch, arXiv 2505.24680, has one). An opening o replaces gate and step
norm. An adapter, which is a LoRA (arXiv 2106.09685) and a change of the norms' weights, trains the kept
layers a little.

At the start P = 0, o_0 = 1, o_t = 0 for later steps, and the adapters change nothing, so training starts
exactly from the cut model.
"""

import torch
from torch import nn

from checkpoint import read_checkpoint
from files import UserError
from ouroboros import Ouroboros, TrainedLinear, check_choice
from qwen import Qwen, apply_projection
from saving import saved_model

# The rank of the adapters, by train_coda. At rank 0 only the norms' weights change.
ADAPTER_RANK = {"norms": 0, "lora": 4, "all": 2}


class Seam(nn.Module):
    """h + P h, with P = 0 at the start. [B, T, d] -> [B, T, d]"""

    def __init__(self, d: int):
        super().__init__()
        self.P = TrainedLinear(d, d, bias=False)
        nn.init.zeros_(self.P.weight)

    def forward(self, h):
        return h + self.P(h)


class Adapter(nn.Module):
    """A `project` for a kept layer: W_k x' + B_k A_k x', with x' = (1 + c) x behind one of the layer's
    two norms.

    Multiplying a norm's output by 1 + c is the same as multiplying its weight. c = 0 and B = 0 at the
    start. x [B, T, in] -> [B, T, out]
    """

    # which of the layer's two norms a projection's input comes from; the other two inputs pass no norm
    NORM = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 1, "up_proj": 1}

    def __init__(self, layer, rank: int):
        super().__init__()
        projections = layer.projections()
        d = projections["q_proj"].in_features
        self.norm_change = nn.Parameter(torch.zeros(2, d))  # c of each norm
        self.A = nn.ModuleDict()
        self.B = nn.ModuleDict()
        if rank > 0:
            for k, projection in projections.items():
                self.A[k] = TrainedLinear(projection.in_features, rank, bias=False)
            for k, projection in projections.items():
                self.B[k] = TrainedLinear(rank, projection.out_features, bias=False)
                nn.init.zeros_(self.B[k].weight)

    def forward(self, projection, x, k, apply=apply_projection):
        if k in self.NORM:
            c = self.norm_change[self.NORM[k]]
            x = x + x * c.to(x.dtype)
        y = apply(projection, x, k)
        if k in self.A:
            y = y + self.B[k](self.A[k](x))
        return y


class NoAdapter(nn.Module):
    """For a layer that stays as it is."""

    def forward(self, projection, x, k, apply=apply_projection):
        return apply(projection, x, k)


class Patched(Ouroboros):
    """The looped model with mended seams: ids [B, T] -> logits [B, T, V].

    seams: whether matrices at the seams and an opening take the place of gate and step norm; without them
    the paper's loop stays as it is. train_coda: "none", "norms" (the norms' weights of the coda), "lora"
    (and a LoRA of rank 4 on it) or "all" (both, with rank 2, on every kept layer). The other arguments
    are those of Ouroboros.
    """

    def __init__(self, qwen: Qwen, seams=True, train_coda="all", gate=True, step_norm=True, **settings):
        super().__init__(qwen, gate=gate and not seams, step_norm=step_norm and not seams, **settings)
        check_choice("train_coda", train_coda, ("none", *ADAPTER_RANK))
        self.settings.update(seams=seams, train_coda=train_coda, gate=gate, step_norm=step_norm)
        d = qwen.config.hidden_size

        self.seams = seams
        self.seam_in = nn.Identity()
        self.seam_out = nn.Identity()
        if seams:
            self.opening = nn.Parameter(torch.zeros(self.depth, d))  # o
            nn.init.ones_(self.opening[0])
            self.seam_in = Seam(d)
            self.seam_out = Seam(d)

        def adapter(layer, adapted: bool):
            return Adapter(layer, ADAPTER_RANK[train_coda]) if adapted else NoAdapter()

        all_layers = train_coda == "all"
        self.prelude_adapters = nn.ModuleList(adapter(layer, all_layers) for layer in self.prelude)
        self.recurrent_adapter = adapter(self.recurrent, all_layers)
        self.coda_adapters = nn.ModuleList(adapter(layer, train_coda != "none") for layer in self.coda)
        self.to(self.embed_tokens.weight.device)

    def run_prelude(self, h, rotary, cache):
        for layer, adapter, layer_cache in zip(self.prelude, self.prelude_adapters, cache.prelude):
            h = layer(h, rotary, layer_cache, adapter)
        return self.seam_in(h)

    def loop_step(self, h, t: int, rotary, step_cache=None):
        if not self.seams:
            return super().loop_step(h, t, rotary, step_cache)
        t = min(t, self.depth - 1)
        m = self.controller(self.pool(h, step_cache), t)
        h_new = self.recurrent(h, rotary, step_cache, self.modulated_projection(m))
        return torch.lerp(h, h_new, self.opening[t].to(h.dtype))  # h + o_t * (h_new - h)

    def modulated_projection(self, m: dict | None):
        """The recurrent layer's `project`: the modulation of the paper inside the layer's adapter."""
        modulate = super().modulated_projection(m)

        def project(projection, x, k):
            return self.recurrent_adapter(projection, x, k, apply=modulate)

        return project

    def run_coda(self, h, rotary, cache):
        h = self.seam_out(h)
        for layer, adapter, layer_cache in zip(self.coda, self.coda_adapters, cache.coda):
            h = layer(h, rotary, layer_cache, adapter)
        return h


def load_run(folder, base=None, dtype=torch.float32, device="cpu", checkpoint=None) -> Ouroboros:
    """The model of any run of train.py, whichever class it is of. The arguments are those of
    Ouroboros.load.

    Raises UserError for a folder that holds no run, a damaged one, or a run of a class that is not known
    here.
    """
    checkpoint = checkpoint or read_checkpoint(folder)
    name = saved_model(folder, checkpoint[1])["class"]
    for known in (Ouroboros, Patched):
        if known.__name__ == name:
            return known.load(folder, base, dtype, device, checkpoint)
    raise UserError(
        f"{folder}: holds a {name}, which this program does not know; load it with {name}.load of the code "
        "that saved it"
    )
