"""Ouroboros: a pretrained decoder cut to its first layers (the prelude), one layer from the middle (the
recurrent layer) and its last layers (the coda). The recurrent layer is applied in a loop, modulated anew
in each step. All other layers are removed; what is left of them is a low-rank summary, the bases A_k and
B_k.

    R_k   = (mean over the removed layers of W_k) - (W_k of the recurrent layer)
    A_k, B_k: the best factors of rank r of R_k, from its SVD

    ids [B,T] -> embed -> prelude -> h
    for t in 0 .. depth-1:
        m_t   = Controller(pool(h), t)
        h_new = StepNorm_t( Layer(h; W_k + (alpha/r) B_k diag(m_t,k) A_k) )
        g     = sigmoid(W_g [h_new; h] + b_g)
        h     = g * h_new + (1 - g) * h
    h -> coda -> final norm -> lm head -> logits [B,T,V]

k is the name of one of the seven projections of a layer, q_proj to down_proj. Layer is the whole decoder
layer with its residual connections, norms and biases; only the seven matrices change. alpha is a
constant, as in LoRA. The state h is [B, T, d]. The diagonals m_t,k are [B, T, r]: each position has its
own, so each position has its own weights. The bases point from the recurrent layer to the layers that
were removed, so that the loop can take on what those did.

Source: arXiv 2604.02051. The pretrained weights W and the bases A, B are frozen. The Controller, the gate
and the StepNorm are trained. Their weights are float32 and are cast to the dtype of h where they are
used, so a bfloat16 model needs no autocast. As in the paper, an untrained loop is not the identity: h_new
has a root mean square of 1, which the coda does not expect, so training starts at a higher loss than that
of the cut model.

One thing differs from the published code. There, pool(h) is the mean over the whole sequence, which lets
each position see later tokens. Here it is the mean over the positions so far; pool="sequence" gives the
published one.

Letters in shapes: B sequences (not the basis B_k), T tokens, d hidden_size, r rank, s the width of the
Controller, V vocab_size (in svd_bases a factor of the SVD).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from device import promote  # to float32, or float64 if it is that already
from fast import linear_of_joined, top_right_singular_vectors
from files import UserError
from qwen import (
    PROJECTIONS,
    Config,
    DecoderLayer,
    KVCache,
    LanguageModel,
    NotLoaded,
    Qwen,
    apply_projection,
    rotary_at,
)
from saving import load_model, save_model

# Rows of the per-step tables (step embedding, StepNorm, static table). A model's own depth is at most this. A
# forward pass may take more steps (see loop_step).
MAX_STEPS = 64

# ---- A_k, B_k, and the low-rank update (alpha/r) B_k diag(m) A_k -----------------------------------------


def svd_bases(R, rank: int):
    """The bases A [r, in] and B [out, r] of a difference R [out, in] of weights, from its SVD R = U S V^T.

    A is the top r right singular vectors (rows of V^T), B the top r left ones times their singular values
    (U S). B A is the best rank-r approximation of R. With every entry of m equal to r/alpha the scale
    cancels and the update is B A: the recurrent layer then has about the mean weights of the removed ones.
    """
    R = promote(R)
    A = top_right_singular_vectors(R, rank)  # torch.linalg.svd(R).Vh[:rank], in a faster way (fast.py)
    B = R @ A.T  # with V_r = A^T: R V_r = U S V^T V_r = U_r S_r
    return A, B


class SVDLoRA(nn.Module):
    """What a diagonal m adds to one projection: (alpha/r) B diag(m) A x.

    Unlike in LoRA, A and B are frozen.
    x [B, T, in], m [r] or [B, T or 1, r] -> [B, T, out]
    """

    def __init__(self, A, B, alpha: float):
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.scale = alpha / A.shape[0]

    def forward(self, x, m):
        y = F.linear(x, self.A)  # A x, [B, T, r]
        y = y * (self.scale * m)  # (alpha/r) diag(m) A x
        return F.linear(y, self.B)  # [B, T, out]


# ---- m_t = Controller(pool(h), t) ------------------------------------------------------------------------


class StepCache(KVCache):
    """What generation keeps of one step of the loop: keys, values, and the sum and number of its inputs h."""

    def __init__(self):
        super().__init__()
        self.input_sum = 0.0  # [B, 1, d] in float32, once there are inputs
        self.input_count = 0


def prefix_mean(h, cache: StepCache | None = None):
    """pool(h): at every position, the mean of h over it and all positions before it.

    [B, T, d] -> [B, T, d]. cache: a StepCache of the positions before h; it is updated.
    """
    sums = promote(h).cumsum(dim=1)  # float32: a long sum in bfloat16 stops growing
    before = 0
    if cache is not None:
        before = cache.input_count
        sums = sums + cache.input_sum
        cache.input_sum = sums[:, -1:].clone()  # a copy, so that the other sums can be freed
        cache.input_count += h.shape[1]
    count = torch.arange(before + 1, before + h.shape[1] + 1, device=h.device)
    return (sums / count[:, None]).to(h.dtype)


class TrainedLinear(nn.Linear):
    """A linear layer with float32 weights that computes in the type of its input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Controller(nn.Module):
    """The hypernetwork: pooled state [B, T or 1, d] and step t -> the diagonals {k: [B, T or 1, r]}.

    The heads are zero at the start, so m = 0: the layer is not modulated.
    """

    def __init__(self, d: int, rank: int, s: int = 128):
        super().__init__()
        self.reduce = TrainedLinear(d, 2 * s)
        self.step_embedding = nn.Embedding(MAX_STEPS, s)
        self.join = TrainedLinear(3 * s, 2 * s)
        self.narrow = TrainedLinear(2 * s, s)
        # The seven heads s -> r, one for each projection, stacked in one matrix.
        self.heads = TrainedLinear(s, len(PROJECTIONS) * rank, bias=False)
        nn.init.zeros_(self.heads.weight)

    def forward(self, pooled, t: int):
        p = F.silu(self.reduce(pooled))  # [B, T, 2s]
        e = self.step_embedding.weight[t]  # [s]
        # join([p; e]), [B, T, 3s] -> [B, T, 2s], without a copy of e for each position (fast.py)
        z = F.silu(linear_of_joined(self.join, p, e))
        z = F.silu(self.narrow(z))  # [B, T, s]
        diagonals = self.heads(z).chunk(len(PROJECTIONS), dim=-1)  # 7 times [B, T, r]
        return dict(zip(PROJECTIONS, diagonals))


# ---- StepNorm and gate -----------------------------------------------------------------------------------


class StepNorm(nn.Module):
    """RMSNorm with a weight of its own for each step t, ones at the start. [B, T, d] -> [B, T, d]"""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(MAX_STEPS, d))
        self.eps = eps

    def forward(self, h_new, t: int):
        return F.rms_norm(h_new, h_new.shape[-1:], self.weight[t].to(h_new.dtype), self.eps)


class Gate(nn.Module):
    """g = sigmoid(W_g [h_new; h] + b_g), for each channel. h_new and h, [B, T, d] each -> [B, T, d]

    W_g = 0 and b_g = -2 at the start: g = 0.12, so 88% of the old state stays.
    """

    def __init__(self, d: int):
        super().__init__()
        self.linear = TrainedLinear(2 * d, d)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, -2.0)

    def forward(self, h_new, h):
        return torch.sigmoid(self.linear(torch.cat([h_new, h], dim=-1)))


# ---- The model -------------------------------------------------------------------------------------------


@dataclass
class LoopCache:
    """The caches of all layer calls of a forward pass. The entries are None where no cache is used."""

    prelude: list
    steps: list
    coda: list


class StepValues(NamedTuple):
    """The values of one step of the loop.

    m: the diagonals, {k: [B, T or 1, r]} or, of a static table, {k: [r]}; None without modulation. g: the
    opening of the gate, [B, T, d]; 1.0 without a gate, and [d] in patch.py. h: the state after the step,
    [B, T, d].
    """

    m: dict | None
    g: torch.Tensor | float
    h: torch.Tensor


class Ouroboros(LanguageModel):
    """The looped model on a pretrained Qwen, whose layers it shares and freezes.

    ids [B, T] -> logits [B, T, V]

    prelude, coda: the numbers of layers that are kept at the start and at the end. recurrent: the index of
    the looped layer, counted from 0. By default these three have the paper's proportions (default_cut).
    rank, alpha: those of the low-rank update. depth: the number of steps of the loop. modulation:
    "controller", or the baselines "static" and "none". pool: "prefix" (causal) or "sequence" (as
    published). gate, step_norm: False removes the part. bases: {k: (A_k, B_k)}, those stored with a saved
    model; by default they are computed from the removed layers.

    Raises UserError for values that are not possible.
    """

    def __init__(
        self,
        qwen: Qwen,
        prelude=None,
        recurrent=None,
        coda=None,
        rank=32,
        alpha=16.0,
        depth=8,
        modulation="controller",
        pool="prefix",
        gate=True,
        step_norm=True,
        bases=None,
    ):
        super().__init__()
        num_layers = qwen.config.num_hidden_layers
        prelude, recurrent, coda = checked_arguments(
            qwen.config, prelude, recurrent, coda, rank, depth, modulation, pool
        )

        self.config = qwen.config
        self.source = qwen.source
        self.fingerprint = qwen.fingerprint
        self.depth = depth
        self.settings = dict(
            prelude=prelude,
            recurrent=recurrent,
            coda=coda,
            rank=rank,
            alpha=alpha,
            depth=depth,
            modulation=modulation,
            pool=pool,
            gate=gate,
            step_norm=step_norm,
        )

        # Pretrained and frozen: the kept layers.
        self.embed_tokens = qwen.embed_tokens
        self.prelude = qwen.layers[:prelude]
        self.recurrent = qwen.layers[recurrent]
        self.coda = qwen.layers[num_layers - coda :]
        self.norm = qwen.norm
        self.lm_head = qwen.lm_head
        self.requires_grad_(False)  # so far, this model has no other parameters

        # Frozen: the bases A, B.
        self.lora = nn.ModuleDict()
        if modulation != "none":
            if bases is None:
                removed = [*qwen.layers[prelude:recurrent], *qwen.layers[recurrent + 1 : num_layers - coda]]
                bases = self.residual_bases(removed, rank)
            like = self.embed_tokens.weight  # all pretrained weights have this type and device
            for k, (A, B) in bases.items():
                self.lora[k] = SVDLoRA(A.to(like), B.to(like), alpha)

        # Trained: Controller, gate and StepNorm, or what takes their place.
        d = qwen.config.hidden_size
        self.pool = no_pool  # static and none do not look at h
        if modulation == "controller":
            self.pool = POOLS[pool]
            self.controller = Controller(d, rank)
        elif modulation == "static":
            self.controller = StaticModulation(rank)
        else:
            self.controller = NoModulation()
        self.gate = Gate(d) if gate else NoGate()
        self.step_norm = StepNorm(d, qwen.config.rms_norm_eps) if step_norm else NoStepNorm()
        self.to(self.embed_tokens.weight.device)

    @torch.no_grad()
    def residual_bases(self, removed, rank: int) -> dict:
        """{k: (A_k, B_k)} of R_k = (mean over the removed layers of W_k) - (W_k of the recurrent layer).

        Only matrices count: the biases and the norms of the removed layers are dropped. The removed
        layers must have been loaded.
        """
        if any(isinstance(layer, NotLoaded) for layer in removed):
            raise ValueError("the removed layers were not loaded, so their bases must be given")
        bases = {}
        for k, projection in self.recurrent.projections().items():
            W = projection.weight  # [out, in]
            mean = sum(promote(layer.projections()[k].weight) for layer in removed) / len(removed)
            A, B = svd_bases(mean - promote(W), rank)
            bases[k] = (A.to(W), B.to(W))
        return bases

    # -- The forward pass. Its parts are methods so that a subclass can override them, as patch.py does.

    def hidden(self, ids, cache: LoopCache | None = None, depth: int | None = None):
        """ids [B, T] -> normalised last hidden states [B, T, d].

        depth: the number of steps, by default the model's. A cache must have been made for the same depth.
        """
        depth = self.checked_depth(depth)
        first = 0 if cache is None else cache.prelude[0].length
        rotary = rotary_at(self.config, first, ids.shape[1], ids.device)
        if cache is None:
            cache = LoopCache([None] * len(self.prelude), [None] * depth, [None] * len(self.coda))
        assert len(cache.steps) == depth, "the cache was made for another depth"

        h = self.run_prelude(self.embed_tokens(ids), rotary, cache)
        for t in range(depth):
            h = self.loop_step(h, t, rotary, cache.steps[t])
        h = self.run_coda(h, rotary, cache)
        return self.norm(h)

    def run_prelude(self, h, rotary, cache: LoopCache):
        """[B, T, d] -> [B, T, d]. Nothing is trained up to here, so autograd records nothing."""
        for layer, layer_cache in zip(self.prelude, cache.prelude):
            h = layer(h, rotary, layer_cache)
        return h

    def loop_step(self, h, t: int, rotary, step_cache: StepCache | None = None):
        """One step of the loop. [B, T, d] -> [B, T, d]"""
        return self.step_values(h, t, rotary, step_cache).h

    def step_values(self, h, t: int, rotary, step_cache: StepCache | None = None) -> StepValues:
        """One step of the loop, with its values: the equations at the head of this file.

        h [B, T, d] is the state before step t, which counts from 0.
        """
        # Steps beyond self.depth use the step embedding and the StepNorm of the last step that was trained.
        t = min(t, self.depth - 1)

        m = self.controller(self.pool(h, step_cache), t)
        h_new = self.recurrent(h, rotary, step_cache, self.modulated_projection(m))
        h_new = self.step_norm(h_new, t)
        g = self.gate(h_new, h)
        return StepValues(m, g, torch.lerp(h, h_new, g))  # g * h_new + (1 - g) * h

    def modulated_projection(self, m: dict | None):
        """The recurrent layer's `project` under the diagonals m: W_k x + (alpha/r) B_k diag(m_k) A_k x."""
        if m is None:
            return apply_projection

        def project(projection, x, k):
            return projection(x) + self.lora[k](x, m[k])

        return project

    def run_coda(self, h, rotary, cache: LoopCache):
        """[B, T, d] -> [B, T, d]. The coda is frozen, and gradients pass through it."""
        for layer, layer_cache in zip(self.coda, cache.coda):
            h = layer(h, rotary, layer_cache)
        return h

    def checked_depth(self, depth: int | None) -> int:
        """`depth`, or the model's own if that is None. Raises UserError for a depth below 1."""
        if depth is None:
            return self.depth
        if depth < 1:
            raise UserError(f"depth {depth}: the loop takes at least one step")
        return depth

    def new_cache(self, depth: int | None = None) -> LoopCache | None:
        """An empty cache for generation with `depth` steps.

        None for a pool that sees the future: a new token then changes the states of all earlier ones.
        """
        if self.pool is sequence_mean:
            return None
        depth = self.checked_depth(depth)
        return LoopCache(
            prelude=[KVCache() for _ in self.prelude],
            steps=[StepCache() for _ in range(depth)],
            coda=[KVCache() for _ in self.coda],
        )

    # -- The cut baseline, and what is trained and saved

    @property
    def cut(self) -> Qwen:
        """The cut baseline: a plain decoder of prelude, recurrent layer and coda. It shares all weights."""
        layers = [*self.prelude, self.recurrent, *self.coda]
        with torch.device("meta"):  # without memory, since every part is replaced
            cut = Qwen(replace(self.config, num_hidden_layers=len(layers)))
        cut.embed_tokens = self.embed_tokens
        cut.layers = nn.ModuleList(layers)
        cut.norm = self.norm
        cut.lm_head = self.lm_head
        return cut

    PRETRAINED = ("embed_tokens.", "prelude.", "recurrent.", "coda.", "norm.", "lm_head.")

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """name -> tensor, of all that does not come from the pretrained model: trained weights and bases."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith(self.PRETRAINED)}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """name -> parameter, of all that is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save(self, folder, more_tensors: dict | None = None, **about):
        """Write the trained weights, the bases and the settings to folder/ouroboros.safetensors.

        more_tensors, about: further tensors and JSON values to store in the file.
        """
        save_model(self, folder, more_tensors, **about)

    @classmethod
    def load(cls, folder, base=None, dtype=torch.float32, device="cpu", checkpoint=None) -> "Ouroboros":
        """The model that save() wrote to a folder.

        base: where the pretrained model is now, if it was moved. checkpoint: the content of the file, if
        read_checkpoint has read it already. Raises UserError if the folder holds no such model, or if the
        pretrained model is not the one it was made from.
        """
        return load_model(cls, folder, base, dtype, device, checkpoint)


# ---- Baselines and ablations -----------------------------------------------------------------------------


def sequence_mean(h, cache=None):
    """The published pool(h): the mean over the whole sequence. [B, T, d] -> [B, 1, d]"""
    return promote(h).mean(dim=1, keepdim=True).to(h.dtype)


def no_pool(h, cache=None):
    """For modulations that do not look at h: returns h unchanged. StaticModulation uses only its dtype."""
    return h


POOLS = {"prefix": prefix_mean, "sequence": sequence_mean}


class StaticModulation(nn.Module):
    """Instead of the Controller: a trained table [MAX_STEPS, 7, r]. Step t -> the diagonals {k: [r]}.

    It is zero at the start.
    """

    def __init__(self, rank: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(MAX_STEPS, len(PROJECTIONS), rank))

    def forward(self, pooled, t: int):
        diagonals = self.table[t].to(pooled.dtype)
        return dict(zip(PROJECTIONS, diagonals))


class NoModulation(nn.Module):
    """Instead of the Controller: nothing. The weights of the recurrent layer stay as they are."""

    def forward(self, pooled, t: int):
        return None


class NoStepNorm(nn.Module):
    """h_new stays as the layer returns it."""

    def forward(self, h_new, t: int):
        return h_new


class NoGate(nn.Module):
    """g = 1: h_new replaces h."""

    def forward(self, h_new, h):
        return 1.0


# ---- Checks of the arguments -----------------------------------------------------------------------------


def default_cut(num_layers: int) -> tuple[int, int, int]:
    """(prelude, recurrent, coda) in the paper's proportions.

    Of 36 layers, the first 8 and the last 8 are kept, and layer 18, counted from 0, is looped.
    """
    ends = round(num_layers * 8 / 36)
    return ends, num_layers // 2, ends


def checked_arguments(config: Config, prelude, recurrent, coda, rank, depth, modulation, pool):
    """(prelude, recurrent, coda), with defaults instead of None.

    Raises UserError for arguments that do not fit a model of this Config. train.py calls it, too, before
    the weights are loaded.
    """
    check_choice("depth", depth, range(1, MAX_STEPS + 1))
    check_choice("modulation", modulation, ("controller", "static", "none"))
    check_choice("pool", pool, POOLS)
    if modulation != "none":
        check_rank(config, rank)
    return checked_cut(config.num_hidden_layers, prelude, recurrent, coda)


def checked_cut(num_layers: int, prelude, recurrent, coda) -> tuple[int, int, int]:
    """(prelude, recurrent, coda), with defaults instead of None.

    Raises UserError unless layers are kept at both ends, the recurrent one lies between, and one is
    removed.
    """
    default_prelude, default_recurrent, default_coda = default_cut(num_layers)
    prelude = default_prelude if prelude is None else prelude
    recurrent = default_recurrent if recurrent is None else recurrent
    coda = default_coda if coda is None else coda

    first_of_coda = num_layers - coda
    ends_are_kept = prelude >= 1 and coda >= 1
    recurrent_is_between = prelude <= recurrent < first_of_coda
    some_are_removed = first_of_coda - prelude > 1
    if not (ends_are_kept and recurrent_is_between and some_are_removed):
        raise UserError(
            f"prelude {prelude}, recurrent {recurrent} (counted from 0), coda {coda} is not a cut of "
            f"{num_layers} layers: keep at least one layer at each end, choose the recurrent one between "
            "them, and remove at least one"
        )
    return prelude, recurrent, coda


def check_rank(config: Config, rank: int):
    """Raise UserError unless 1 <= rank <= the smaller side of every projection of a layer."""
    with torch.device("meta"):  # shapes without memory
        layer = DecoderLayer(config)
    largest = min(min(projection.weight.shape) for projection in layer.projections().values())
    if not 1 <= rank <= largest:
        raise UserError(f"rank {rank} does not fit this model: its smallest projection allows 1 to {largest}")


def check_choice(name: str, value, choices):
    """Raise UserError unless the value is one of the choices."""
    if value not in choices:
        if isinstance(choices, range):
            raise UserError(f"{name} {value}: give a whole number from {choices[0]} to {choices[-1]}")
        raise UserError(f"{name} {value!r}: give one of {', '.join(choices)}")
