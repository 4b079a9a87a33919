"""Past the paper: mend the seams of the cut instead of gating a loop.

    ids -> embed -> prelude -> h = h + P_in h
    for t in 0 .. depth-1:
        h_new = Layer(h; W_k + (alpha/r) B_k diag(m_t,k) A_k)
        h     = h + o_t * (h_new - h)                    o_t: one number for each channel
    h = h + P_out h -> coda -> final norm -> lm head -> logits

A seam is a place where a layer now gets another state than the one it was trained on. A d x d matrix P at
each seam mends much of that (LinearPatch, arXiv 2505.24680, has one). An opening o replaces gate and step
norm. An adapter, which is a LoRA (arXiv 2106.09685) and a change of the norms' weights, trains the kept
layers a little. As many layers are kept as in the paper, but fewer of the first ones (patch_cut).

At the start P = 0, o_0 = 1, o_t = 0 for later steps, and the adapters change nothing: a new model is exactly
the cut model. mend_seams then gives P_in and P_out a better start, without a step of training.
"""

import torch
from torch import nn

from checkpoint import read_checkpoint
from fast import head_distillation
from files import UserError
from ouroboros import Ouroboros, StepValues, TrainedLinear, check_choice, default_cut
from qwen import Qwen, apply_projection, rotary_at
from saving import saved_model

# The rank of the adapters, by train_coda. At rank 0 only the norms' weights change.
ADAPTER_RANK = {"norms": 0, "lora": 4, "all": 2}


def patch_cut(num_layers: int, prelude=None, recurrent=None, coda=None) -> dict:
    """The layers that are kept, with defaults instead of None: as many as in the paper, and other ones.

    A tenth of the layers is kept at the start, one after four tenths, and the rest at the end. With seams in
    closed form this was the best cut of both models of RESULTS.md, which experiments/cuts.py found.
    """
    first, _, last = default_cut(num_layers)
    default_prelude = max(1, round(num_layers / 10))
    return {
        "prelude": default_prelude if prelude is None else prelude,
        "recurrent": round(num_layers * 4 / 10) if recurrent is None else recurrent,
        "coda": first + last - default_prelude if coda is None else coda,
    }


class Seam(nn.Module):
    """h + P h, with P = 0 at the start. [B, T, d] -> [B, T, d]"""

    def __init__(self, d: int):
        super().__init__()
        self.P = TrainedLinear(d, d, bias=False)
        nn.init.zeros_(self.P.weight)

    def forward(self, h):
        return h + self.P(h)


class Adapter(nn.Module):
    """A `project` for a kept layer: W_k x' + B_k A_k x', with x' = (1 + c) x after one of the layer's
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
    (and a LoRA of rank 4 on it) or "all" (both, with rank 2, on every kept layer). With seams, prelude,
    recurrent and coda are by default those of patch_cut. The other arguments are those of Ouroboros.
    """

    def __init__(
        self,
        qwen: Qwen,
        seams=True,
        train_coda="all",
        gate=True,
        step_norm=True,
        prelude=None,
        recurrent=None,
        coda=None,
        **settings,
    ):
        settings.update(prelude=prelude, recurrent=recurrent, coda=coda)
        if seams:
            settings.update(patch_cut(qwen.config.num_hidden_layers, prelude, recurrent, coda))
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

    def step_values(self, h, t: int, rotary, step_cache=None) -> StepValues:
        if not self.seams:
            return super().step_values(h, t, rotary, step_cache)
        t = min(t, self.depth - 1)
        m = self.controller(self.pool(h, step_cache), t)
        h_new = self.recurrent(h, rotary, step_cache, self.modulated_projection(m))
        o = self.opening[t].to(h.dtype)
        return StepValues(m, o, torch.lerp(h, h_new, o))  # h + o_t * (h_new - h)

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


# ---- The seams in closed form ----------------------------------------------------------------------------
#
# A seam is good if the state after it is the one that the full model has there. That is a linear
# regression: its solution needs some text and the full model, and no step of training.

# The strengths of the ridge that are tried, in units of the mean of the diagonal of h^T h.
RIDGE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@torch.no_grad()
def mend_seams(model: Patched, full: Qwen, ids, batch_size: int):
    """Set P_in and P_out of a new model so that the states after the seams come close to those of the full
    model.

    ids [N, T]: sequences of training text, read batch_size at a time. P_in is fitted first, to the state
    before the full model's recurrent layer. P_out is then fitted to the state before the coda, given P_in.
    A new model's loop is the recurrent layer once, whatever its depth, because o_t = 0 for later steps.
    Raises UserError for a text without four tokens.
    """
    if ids[:, 1:].numel() < 4:
        raise UserError("the text is too short to fit the seams; give more text, or --seam-tokens 0")
    first_of_coda = len(full.layers) - len(model.coda)
    places = (len(model.prelude), model.settings["recurrent"], first_of_coda)
    h, before_recurrent, before_coda = states_before(full, ids, batch_size, places)
    model.seam_in.P.weight.copy_(fitted_seam(token_states(h), token_states(before_recurrent)))

    rotary = rotary_at(full.config, 0, ids.shape[1], ids.device)
    batches = h.split(batch_size)
    h = torch.cat([model.loop_step(model.seam_in(batch), 0, rotary) for batch in batches])
    model.seam_out.P.weight.copy_(fitted_seam(token_states(h), token_states(before_coda)))


@torch.no_grad()
def states_before(full: Qwen, ids, batch_size: int, places) -> list:
    """The full model's states [N, T, d] before each of these layers, for sequences of tokens [N, T].

    places: numbers of layers, counted from 0. A new looped model has the same states before its first seam.
    """
    rotary = rotary_at(full.config, 0, ids.shape[1], ids.device)
    states = {place: [] for place in places}
    for batch in ids.split(batch_size):
        h = full.embed_tokens(batch)
        layers_done = 0
        for place in sorted(states):
            for layer in full.layers[layers_done:place]:
                h = layer(h, rotary)
            states[place].append(h)
            layers_done = place
    return [torch.cat(states[place]) for place in places]


def token_states(h):
    """The states [N, T, d] of all tokens but the first of each sequence: [tokens, d], in float64 on the CPU.

    The state of the first position is many times larger than the others.
    """
    return h[:, 1:].flatten(0, 1).cpu().double()


def fitted_seam(h, y):
    """The matrix P of the seam that turns states h into states y, [tokens, d] each -> [d, d].

    The strength of the ridge is the one with the smallest error on the last quarter of the tokens, when the
    others are fitted.
    """
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
    A large strength keeps P near 0, where the seam changes nothing. h and y [N, d] -> [d, d] in their type,
    which should be float64: the sizes of channels differ by orders of magnitude.
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
    """The mean cross entropy with mixed targets: 1 - weight of the token that follows in the text, weight of
    the full model's prediction.

    ids and targets are those of model.loss. weight 0 is model.loss, weight 1 leaves the text's own next
    tokens out.
    """
    with torch.no_grad():
        full_h = full.hidden(ids)
    return head_distillation(model.hidden(ids), model.head_weight, targets, full_h, weight)


def full_model_of(model: Ouroboros) -> Qwen:
    """The full model that a looped model was cut from. It shares the kept layers with the looped model, and
    the removed ones are loaded.
    """
    num_layers = model.config.num_hidden_layers
    kept = dict(enumerate(model.prelude))
    kept[model.settings["recurrent"]] = model.recurrent
    kept.update(enumerate(model.coda, start=num_layers - len(model.coda)))

    removed = set(range(num_layers)) - set(kept)
    like = model.norm.weight
    full = Qwen.from_pretrained(model.source, like.dtype, like.device, layers=removed)
    for i, layer in kept.items():
        full.layers[i] = layer
    full.embed_tokens = model.embed_tokens
    full.norm = model.norm
    full.lm_head = model.lm_head
    return full


# ---- Runs ------------------------------------------------------------------------------------------------


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
