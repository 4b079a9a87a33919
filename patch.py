"""Past the paper: mend the seams of the cut instead of gating a loop.

    ids -> embed -> prelude -> h = h + P_in h
    for t in 0 .. depth-1:
        h_new = Layer(h; W_k + (alpha/r) B_k diag(m_t,k) A_k)
        h     = h + o_t * (h_new - h)                    o_t: one number for each channel
    h = h + P_out h -> coda -> final norm -> lm head -> logits

A seam is a place where a layer now gets another state than the one it was trained on: before the recurrent
layer and before the coda. A d x d matrix P at each seam mends much of that (LinearPatch, arXiv 2505.24680,
has one). An opening o replaces gate and step norm. An adapter, which is a LoRA (arXiv 2106.09685) and a
change of the norms' weights, trains the kept layers a little. As many layers are kept as in the paper, but
fewer of the first ones (patch_cut).

At the start P = 0, o_0 = 1, o_t = 0 for later steps, and the adapters change nothing: a new model is exactly
the cut model. mend_seams then gives P_in and P_out a better start, without a step of training.
"""

import torch
from torch import nn

from ouroboros import Ouroboros, TrainedLinear, default_cut
from qwen import Qwen, rotary_at
from support.fast import head_cross_entropy

ADAPTER_RANK = 2


def patch_cut(num_layers: int) -> tuple[int, int, int]:
    """(prelude, recurrent, coda): as many layers as the paper keeps, and other ones.

    A tenth of the layers is kept at the start, one after four tenths, and the rest at the end. With seams in
    closed form this was the best cut of tiny and of SmolLM2 (RESULTS.md).
    """
    first, _, last = default_cut(num_layers)
    prelude = max(1, round(num_layers / 10))
    return prelude, round(num_layers * 4 / 10), first + last - prelude


class Seam(nn.Module):
    """h + P h, with P = 0 at the start. [B, T, d] -> [B, T, d]"""

    def __init__(self, d: int):
        super().__init__()
        self.P = TrainedLinear(d, d, bias=False)
        nn.init.zeros_(self.P.weight)

    def forward(self, h):
        return h + self.P(h)


class Adapter(nn.Module):
    """A `project` for a kept layer: W_k x' + B'_k A'_k x', with x' = (1 + c) x after one of its two norms.

    Multiplying a norm's output by 1 + c is the same as multiplying its weight. c = 0 and B' = 0 at the start.
    A' and B' are trained, unlike the bases A and B of the SVD. x [B, T, in] -> [B, T, out]
    """

    # which of the layer's two norms a projection's input comes from; the other two inputs pass no norm
    NORM = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 1, "up_proj": 1}

    def __init__(self, layer):
        super().__init__()
        projections = layer.projections()
        d = projections["q_proj"].in_features
        self.norm_change = nn.Parameter(torch.zeros(2, d))  # c of each norm
        self.A = nn.ModuleDict()
        self.B = nn.ModuleDict()
        for k, projection in projections.items():
            self.A[k] = TrainedLinear(projection.in_features, ADAPTER_RANK, bias=False)
        for k, projection in projections.items():
            self.B[k] = TrainedLinear(ADAPTER_RANK, projection.out_features, bias=False)
            nn.init.zeros_(self.B[k].weight)

    def forward(self, projection, x, name):
        x = self.scaled(x, name)
        return projection(x) + self.update(x, name)

    def scaled(self, x, name):
        """x' = (1 + c) x, or x where it comes from no norm."""
        if name not in self.NORM:
            return x
        c = self.norm_change[self.NORM[name]]
        return x + x * c.to(x.dtype)

    def update(self, x, name):
        """B'_k A'_k x'"""
        return self.B[name](self.A[name](x))


class Patched(Ouroboros):
    """The looped model with mended seams: ids [B, T] -> logits [B, T, V].

    Without a modulation and with one step by default. prelude, recurrent and coda are by default those of
    patch_cut. The arguments are those of Ouroboros, without gate and step_norm.
    """

    default_cut = staticmethod(patch_cut)

    def __init__(self, qwen: Qwen, depth=1, modulation="none", **settings):
        super().__init__(qwen, depth=depth, modulation=modulation, gate=False, step_norm=False, **settings)
        del self.settings["gate"], self.settings["step_norm"]  # load() passes the settings; these are fixed
        d = qwen.config.hidden_size
        self.opening = nn.Parameter(torch.zeros(depth, d))  # o
        nn.init.ones_(self.opening[0])
        self.seam_in = Seam(d)
        self.seam_out = Seam(d)
        self.prelude_adapters = nn.ModuleList(Adapter(layer) for layer in self.prelude)
        self.recurrent_adapter = Adapter(self.recurrent)
        self.coda_adapters = nn.ModuleList(Adapter(layer) for layer in self.coda)
        self.to(self.norm.weight.device)

    def run_prelude(self, h, rotary, cache):
        for layer, adapter, layer_cache in zip(self.prelude, self.prelude_adapters, cache.prelude):
            h = layer(h, rotary, layer_cache, adapter)
        return self.seam_in(h)

    def loop_step(self, h, t: int, rotary, step_cache=None):
        m = self.diagonals(h, t, step_cache)
        h_new = self.recurrent(h, rotary, step_cache, self.modulated_by(m))
        o = self.opening[t].to(h.dtype)
        return torch.lerp(h, h_new, o)  # h + o * (h_new - h)

    def modulated_by(self, m: dict | None):
        """The recurrent layer's `project`: the modulation of the paper, and the layer's adapter."""
        modulated = super().modulated_by(m)

        def project(projection, x, name):
            x = self.recurrent_adapter.scaled(x, name)
            return modulated(projection, x, name) + self.recurrent_adapter.update(x, name)

        return project

    def run_coda(self, h, rotary, cache):
        h = self.seam_out(h)
        for layer, adapter, layer_cache in zip(self.coda, self.coda_adapters, cache.coda):
            h = layer(h, rotary, layer_cache, adapter)
        return h


# ---- The seams in closed form ----------------------------------------------------------------------------
#
# A seam is good if the state after it is the one that the full model has there. That is a linear
# regression: its solution needs some text and the full model, and no step of training.

# The strengths of the ridge that are tried, in units of the mean of the diagonal of h^T h.
RIDGE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@torch.no_grad()
def mend_seams(model: Patched, full: Qwen, ids, batch_size=8):
    """Set P_in and P_out of a new model so that the states after the seams are near those of the full model.

    ids [N, T]: sequences of training text, read batch_size at a time. P_in is fitted first, to the state
    before the full model's recurrent layer. P_out is then fitted to the state before the coda, given P_in.
    A new model's loop is the recurrent layer once, whatever its depth, because o_t = 0 for later steps.
    """
    first_of_coda = len(full.layers) - len(model.coda)
    # three passes of the full model, because one that keeps three states would be longer
    h = state_before(full, ids, len(model.prelude), batch_size)
    target = state_before(full, ids, model.settings["recurrent"], batch_size)
    model.seam_in.P.weight.copy_(fitted_seam(h, target))

    rotary = rotary_at(full.config, 0, ids.shape[1], ids.device)
    h = torch.cat([model.loop_step(model.seam_in(batch), 0, rotary) for batch in h.split(batch_size)])
    target = state_before(full, ids, first_of_coda, batch_size)
    model.seam_out.P.weight.copy_(fitted_seam(h, target))


@torch.no_grad()
def state_before(full: Qwen, ids, layer: int, batch_size=8):
    """The full model's states [N, T, d] before this layer, counted from 0, for sequences of tokens [N, T]."""
    rotary = rotary_at(full.config, 0, ids.shape[1], ids.device)
    states = []
    for batch in ids.split(batch_size):
        h = full.embed_tokens(batch)
        for earlier in full.layers[:layer]:
            h = earlier(h, rotary)
        states.append(h)
    return torch.cat(states)


def fitted_seam(h, y):
    """The matrix P [d, d] of the seam that turns states h into states y, [N, T, d] each.

    The first position of each sequence is left out: its state is many times larger than the others. The
    regression is done in float64 on the CPU, since the sizes of channels differ by orders of magnitude. The
    strength of the ridge is the one with the smallest error on the last quarter of the tokens, when the
    others are fitted.
    """
    h = h[:, 1:].flatten(0, 1).cpu().double()  # [tokens, d]
    y = y[:, 1:].flatten(0, 1).cpu().double()
    first_held_back = len(h) * 3 // 4
    errors = {}
    for strength in RIDGE_STRENGTHS:
        P = ridge_regression(h[:first_held_back], y[:first_held_back], strength)
        errors[strength] = seam_error(P, h[first_held_back:], y[first_held_back:])
    best = min(errors, key=errors.get)
    return ridge_regression(h, y, best)


def ridge_regression(h, y, strength: float):
    """The P with the smallest sum over the tokens of |y - (h + P h)|^2 / mean(y^2), plus a multiple of |P|^2.

    The weight of a token makes large and small states count alike, as after the norm of the next layer.
    A large strength keeps P near 0, where the seam changes nothing. h and y [tokens, d] -> [d, d]
    """
    weighted = h / y.square().mean(-1, keepdim=True)
    gram = h.T @ weighted  # [d, d]
    ridge = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, (y - h).T @ weighted, left=False)  # P (gram + ridge) = ...


def seam_error(P, h, y) -> float:
    """The mean over the tokens of |y - (h + P h)|^2 / |y|^2."""
    squares = (y - h - h @ P.T).square().sum(-1)
    return (squares / y.square().sum(-1)).mean().item()


# ---- Distillation ----------------------------------------------------------------------------------------


def distillation_loss(model: Ouroboros, full: Qwen, weight: float, ids, targets):
    """-sum q log p, the mean over the tokens, with q = (1 - weight) onehot(target) + weight p_full.

    p_full is the full model's prediction. ids and targets are those of model.loss. weight 0 is model.loss,
    weight 1 leaves the text's own next tokens out.
    """
    with torch.no_grad():
        full_h = full.hidden(ids)
    return head_cross_entropy(model.hidden(ids), model.head_weight, targets, full_h, weight)
