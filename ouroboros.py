"""Ouroboros: a pretrained decoder with one layer looped, whose weights change with each input and each
step.

    ids [B,T] -> embed -> prelude -> h
    for t in 0 .. depth-1:
        m_t   = Controller(pool(h), t)                   7 diagonals of length r, one for each projection k
        h_new = StepNorm_t( Layer(h; W_k + (alpha/r) B_k diag(m_t,k) A_k) )
        g     = sigmoid(W_g [h_new; h] + b_g)
        h     = g * h_new + (1 - g) * h
    h -> coda -> final norm -> lm head -> logits [B,T,V]

Source: arXiv 2604.02051. The pretrained layers and the bases A, B are frozen. The Controller, the gate
and the step norm are trained. Their weights are float32 and are cast to the type of the state h where
they are used, so a bfloat16 model needs no autocast.

Letters in shapes: B sequences, T tokens, d hidden_size, r rank, s the width of the Controller, V
vocab_size.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import fingerprint, read_checkpoint, write_checkpoint
from device import promote
from fast import top_right_singular_vectors
from files import UserError
from qwen import PROJECTIONS, KVCache, LanguageModel, NotLoaded, Qwen, apply_projection, rotary_at

MAX_STEPS = 64  # rows of the step embedding, of the static table and of the step norm

# ---- The low-rank change of a projection: (alpha/r) B diag(m) A ------------------------------------------


def svd_bases(R, rank: int):
    """The bases A [r, in] and B [out, r] of a residual R [out, in], from its truncated SVD R = U S V^T.

    A holds the top r right singular vectors (rows of V^T), B the top r left ones times their singular
    values (U S). B @ A is the best approximation of R of rank r.
    """
    R = promote(R)
    A = top_right_singular_vectors(R, rank).to(R.device)  # torch.linalg.svd(R).Vh[:rank], sooner: see fast.py
    B = R @ A.T  # R V = U S V^T V = U S
    return A.contiguous(), B


class SVDLoRA(nn.Module):
    """The change that a diagonal m makes to one projection: (alpha/r) B diag(m) A x, with A and B frozen.

    x [B, T, in], m [r] or [B, T or 1, r] -> [B, T, out]
    """

    def __init__(self, A, B, alpha: float):
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.scale = alpha / len(A)

    def forward(self, x, m):
        return F.linear(F.linear(x, self.A) * (self.scale * m), self.B)


# ---- m_t = Controller(pool(h), t) ------------------------------------------------------------------------


class StepCache(KVCache):
    """What generation keeps of one step of the loop:

    keys and values, and the sum of the step's inputs h.
    """

    def __init__(self):
        super().__init__()
        self.input_sum = 0.0  # [B, 1, d], float32
        self.input_count = 0


def prefix_mean(h, cache: StepCache | None = None):
    """pool(h): for every position, the mean of h over this position and all before it. [B, T, d] -> [B,
    T, d]

    No position sees a later one, and generation needs only a running sum. The published pool is
    sequence_mean. Sums are float32: in bfloat16 a long sum stops growing.
    """
    sums = promote(h).cumsum(dim=1)
    before = 0
    if cache is not None:
        before = cache.input_count
        sums = sums + cache.input_sum
        cache.input_sum = sums[:, -1:]
        cache.input_count += h.shape[1]
    count = torch.arange(before + 1, before + h.shape[1] + 1, device=h.device)
    return (sums / count[:, None]).to(h.dtype)


def sequence_mean(h, cache=None):
    """The published pool(h):

    one mean for the whole sequence, so every position sees the future. -> [B, 1, d]
    """
    return promote(h).mean(dim=1, keepdim=True).to(h.dtype)


def no_pool(h, cache=None):
    """For a modulation that uses no pooled state."""
    return h


POOLS = {"prefix": prefix_mean, "sequence": sequence_mean}


class TrainedLinear(nn.Linear):
    """A linear layer with float32 weights that computes in the type of its input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Controller(nn.Module):
    """The hypernetwork: pooled state [B, T or 1, d] and step t -> the diagonals {k: [B, T or 1, r]}.

    p = silu(reduce(pooled)) [2s]; e = embedding of t [s]; z = silu(narrow(silu(join([p; e])))) [s]; then
    one head s -> r without bias for each projection. The heads are zero at the start, so m = 0: no
    modulation.
    """

    def __init__(self, d: int, rank: int, s: int = 128):
        super().__init__()
        self.reduce = TrainedLinear(d, 2 * s)
        self.step = nn.Embedding(MAX_STEPS, s)
        self.join = TrainedLinear(3 * s, 2 * s)
        self.narrow = TrainedLinear(2 * s, s)
        self.heads = TrainedLinear(s, len(PROJECTIONS) * rank, bias=False)  # the seven heads, stacked
        nn.init.zeros_(self.heads.weight)

    def forward(self, pooled, t: int):
        p = F.silu(self.reduce(pooled))
        z = F.silu(self.join_step(p, self.step.weight[t]))
        z = F.silu(self.narrow(z))
        diagonals = self.heads(z).chunk(len(PROJECTIONS), dim=-1)
        return dict(zip(PROJECTIONS, diagonals))

    def join_step(self, p, e):
        """join([p; e]) as W_p p + (W_e e + b): e is the same for every position, so its part is a bias."""
        W_p, W_e = self.join.weight.split([p.shape[-1], len(e)], dim=1)
        bias = self.join.bias + W_e @ e
        return F.linear(p, W_p.to(p.dtype), bias.to(p.dtype))


class StaticModulation(nn.Module):
    """The baseline without an input:

    a trained table [64, 7, r], zero at the start -> the diagonals {k: [r]}.
    """

    def __init__(self, rank: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(MAX_STEPS, len(PROJECTIONS), rank))

    def forward(self, pooled, t: int):
        diagonals = self.table[t].to(pooled.dtype)
        return dict(zip(PROJECTIONS, diagonals))


class NoModulation(nn.Module):
    """The baseline whose recurrent layer stays as it is: no diagonals."""

    def forward(self, pooled, t: int):
        return None


# ---- StepNorm and gate -----------------------------------------------------------------------------------


class StepNorm(nn.Module):
    """RMSNorm with a weight of its own for each step t, ones at the start. [B, T, d] -> [B, T, d]"""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(MAX_STEPS, d))
        self.eps = eps

    def forward(self, h_new, t: int):
        return F.rms_norm(h_new, h_new.shape[-1:], self.weight[t].to(h_new.dtype), self.eps)


class NoStepNorm(nn.Module):
    """The ablation of the step norm."""

    def forward(self, h_new, t: int):
        return h_new


class Gate(nn.Module):
    """g = sigmoid(W_g [h_new; h] + b_g), for each channel. [B, T, d] twice -> [B, T, d]

    W_g = 0 and b_g = -2 at the start: g = 0.12, so 88% of the old state stays.
    """

    def __init__(self, d: int):
        super().__init__()
        self.linear = TrainedLinear(2 * d, d)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, -2.0)

    def forward(self, h_new, h):
        return torch.sigmoid(self.linear(torch.cat([h_new, h], dim=-1)))


class NoGate(nn.Module):
    """The ablation of the gate: g = 1, so h_new replaces h."""

    def forward(self, h_new, h):
        return 1.0


# ---- The model -------------------------------------------------------------------------------------------


def default_cut(num_layers: int) -> tuple[int, int, int]:
    """(prelude, recurrent, coda) for so many layers, in the proportions of the paper's 8/18/8 of 36."""
    ends = round(num_layers * 8 / 36)
    return ends, num_layers // 2, ends


@dataclass
class LoopCache:
    """What generation keeps of each layer call:

    a KVCache or StepCache each, or None in a forward without one.
    """

    prelude: list
    steps: list
    coda: list


class Ouroboros(LanguageModel):
    """The looped model on a pretrained Qwen, whose layers it shares and freezes.

    prelude, coda: how many first and last layers stay. recurrent: the number of the looped layer, from 0.
    By default all three are in the paper's proportions. rank, alpha: of the SVD LoRA. depth: steps of the
    loop. modulation: "controller", or the baselines "static" and "none". pool: "prefix" (causal) or
    "sequence" (as published). gate, step_norm: False removes that part.

    Raises UserError for a cut, a rank, a depth or a choice that is not possible.
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
    ):
        super().__init__()
        num_layers = qwen.config.num_hidden_layers
        default_prelude, default_recurrent, default_coda = default_cut(num_layers)
        if prelude is None:
            prelude = default_prelude
        if recurrent is None:
            recurrent = default_recurrent
        if coda is None:
            coda = default_coda
        check_cut(num_layers, prelude, recurrent, coda)
        check_choice("depth", depth, range(1, MAX_STEPS + 1))
        check_choice("modulation", modulation, ("controller", "static", "none"))
        check_choice("pool", pool, POOLS)

        self.config = qwen.config
        self.source = qwen.source
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

        # Frozen: the kept layers.
        self.embed_tokens = qwen.embed_tokens
        self.norm = qwen.norm
        self.lm_head = qwen.lm_head
        self.prelude = qwen.layers[:prelude]
        self.recurrent = qwen.layers[recurrent]
        self.coda = qwen.layers[num_layers - coda :]
        self.requires_grad_(False)

        # Frozen: the bases of what was cut out.
        self.lora = nn.ModuleDict()
        if modulation != "none":
            removed = [*qwen.layers[prelude:recurrent], *qwen.layers[recurrent + 1 : num_layers - coda]]
            for k, (A, B) in self.residual_bases(removed, rank).items():
                self.lora[k] = SVDLoRA(A, B, alpha)

        # Trained.
        d = qwen.config.hidden_size
        self.pool = no_pool
        if modulation == "controller":
            self.controller = Controller(d, rank)
            self.pool = POOLS[pool]
        elif modulation == "static":
            self.controller = StaticModulation(rank)
        else:
            self.controller = NoModulation()
        self.gate = Gate(d) if gate else NoGate()
        self.step_norm = StepNorm(d, qwen.config.rms_norm_eps) if step_norm else NoStepNorm()
        self.to(self.embed_tokens.weight.device)

    @torch.no_grad()
    def residual_bases(self, removed, rank: int) -> dict:
        """{k: (A_k, B_k)} of R_k = mean of the removed layers' W_k - W_k of the recurrent layer.

        Where the removed layers were not loaded, the bases are zero: load() replaces them by the saved
        ones.
        """
        check_rank(self.recurrent, rank)
        bases = {}
        for k, projection in self.recurrent.projections().items():
            W = projection.weight  # [out, in]
            if isinstance(removed[0], NotLoaded):
                A, B = W.new_zeros(rank, W.shape[1]), W.new_zeros(W.shape[0], rank)
            else:
                mean = sum(promote(layer.projections()[k].weight) for layer in removed) / len(removed)
                A, B = svd_bases(mean - promote(W), rank)
            bases[k] = (A.to(W), B.to(W))
        return bases

    # -- the forward pass

    def hidden(self, ids, depth: int | None = None, cache: LoopCache | None = None):
        """ids [B, T] -> normalised last hidden states [B, T, d].

        depth: steps of the loop, by default the model's.
        """
        depth = self.checked_depth(depth)
        first = 0 if cache is None else cache.prelude[0].length
        rotary = rotary_at(self.config, first, ids.shape[1], ids.device)
        if cache is None:
            cache = LoopCache([None] * len(self.prelude), [None] * depth, [None] * len(self.coda))

        h = self.run_prelude(self.embed_tokens(ids), rotary, cache)
        for t in range(depth):
            h = self.loop_step(h, t, rotary, cache.steps[t])
        h = self.run_coda(h, rotary, cache)
        return self.norm(h)

    def run_prelude(self, h, rotary, cache: LoopCache):
        """[B, T, d] -> [B, T, d]. All of it is frozen, so autograd records nothing here."""
        for layer, kv in zip(self.prelude, cache.prelude):
            h = layer(h, rotary, kv)
        return h

    def loop_step(self, h, t: int, rotary, cache: StepCache | None = None):
        """One step of the loop: the equations at the head of this file. [B, T, d] -> [B, T, d]"""
        t = min(
            t, self.depth - 1
        )  # steps past the trained depth use the last trained step's embedding and norm
        m = self.controller(self.pool(h, cache), t)
        h_new = self.step_norm(self.recurrent(h, rotary, cache, self.modulated(m)), t)
        g = self.gate(h_new, h)
        return torch.lerp(h, h_new, g)  # g * h_new + (1 - g) * h

    def modulated(self, m: dict | None):
        """The `project` of the recurrent layer under the diagonals m:

        W_k x + (alpha/r) B_k diag(m_k) A_k x.
        """
        if m is None:
            return apply_projection

        def project(projection, x, k):
            return projection(x) + self.lora[k](x, m[k])

        return project

    def run_coda(self, h, rotary, cache: LoopCache):
        """[B, T, d] -> [B, T, d]"""
        for layer, kv in zip(self.coda, cache.coda):
            h = layer(h, rotary, kv)
        return h

    def checked_depth(self, depth: int | None) -> int:
        if depth is None:
            return self.depth
        if depth < 1:
            raise UserError(f"depth {depth}: the loop takes at least one step")
        return depth

    def new_cache(self, depth: int | None = None) -> LoopCache | None:
        """An empty cache for generation with so many steps of the loop.

        None for a pool that sees the future: there, a new token changes the states of all earlier ones.
        """
        if self.pool is sequence_mean:
            return None
        return LoopCache(
            prelude=[KVCache() for _ in self.prelude],
            steps=[StepCache() for _ in range(self.checked_depth(depth))],
            coda=[KVCache() for _ in self.coda],
        )

    # -- the cut baseline, and what is trained

    @property
    def cut(self) -> Qwen:
        """The cut baseline: a plain decoder of prelude, recurrent layer and coda. It shares all weights."""
        layers = [*self.prelude, self.recurrent, *self.coda]
        with torch.device("meta"):  # no memory: every part is replaced
            cut = Qwen(replace(self.config, num_hidden_layers=len(layers)))
        cut.embed_tokens = self.embed_tokens
        cut.layers = nn.ModuleList(layers)
        cut.norm = self.norm
        cut.lm_head = self.lm_head
        return cut

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """name -> parameter, of all that is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    # -- saving and loading

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """name -> tensor, of all that is not the base's: the trained weights and the bases."""
        trained = self.trained_parameters()
        saved = {}
        for name, tensor in self.state_dict().items():
            if name in trained or name.startswith("lora."):
                saved[name] = tensor
        return saved

    def base_fingerprint(self) -> str:
        """A hash that tells whether a base is the one that this model was made from."""
        return fingerprint({name: p for name, p in self.named_parameters() if not p.requires_grad})

    def save(self, folder, more_tensors: dict | None = None, **about):
        """Write trained weights, bases and settings to folder/ouroboros.safetensors, whole or not at all.

        more_tensors and about (JSON values): what else goes into the file.
        """
        tensors = {**self.saved_tensors(), **(more_tensors or {})}
        about["model"] = {
            "class": type(self).__name__,
            "base": self.source,
            "fingerprint": self.base_fingerprint(),
            "num_layers": self.config.num_hidden_layers,
            "settings": self.settings,
        }
        write_checkpoint(folder, tensors, about)

    @classmethod
    def load(cls, folder, base=None, dtype=torch.float32, device="cpu", checkpoint=None) -> "Ouroboros":
        """The model that save() wrote to a folder. Only the kept layers of its base are read, and no SVD
        is made.

        base: where the base is now, if it was moved. checkpoint: what read_checkpoint(folder) returned,
        if it was read already. Raises UserError if the folder is damaged, the base is another model, or
        the run is of another class than this one (patch.load_run opens any run).
        """
        tensors, about = checkpoint or read_checkpoint(folder)
        saved = about["model"]
        if saved["class"] != cls.__name__:
            raise UserError(
                f"{folder} holds a {saved['class']}, not a {cls.__name__}; patch.load_run opens any run"
            )

        settings = saved["settings"]
        first_of_coda = saved["num_layers"] - settings["coda"]
        kept = {
            *range(settings["prelude"]),
            settings["recurrent"],
            *range(first_of_coda, saved["num_layers"]),
        }
        model = cls(Qwen.from_pretrained(base or saved["base"], dtype, device, layers=kept), **settings)
        if model.base_fingerprint() != saved["fingerprint"]:
            raise UserError(
                f"{base or saved['base']} is not the model on which {folder} was trained ({saved['base']})"
            )

        own = {}
        for name, tensor in model.saved_tensors().items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise UserError(
                    f"{folder}: was saved by other code; it has no {name} of shape {list(tensor.shape)}"
                )
            own[name] = tensors[name]
        model.load_state_dict(own, strict=False)
        return model


# ---- What is refused -------------------------------------------------------------------------------------


def check_cut(num_layers: int, prelude: int, recurrent: int, coda: int):
    """Raise UserError unless layers stay at both ends, the recurrent one lies between, and some layers go."""
    first_of_coda = num_layers - coda
    ends_stay = prelude >= 1 and coda >= 1
    between = prelude <= recurrent < first_of_coda
    some_go = first_of_coda - prelude > 1
    if not (ends_stay and between and some_go):
        raise UserError(
            f"prelude {prelude}, recurrent {recurrent} (counted from 0), coda {coda} is no cut of "
            f"{num_layers} layers: keep one before, one after, the recurrent one between, and let some go"
        )


def check_rank(layer, rank: int):
    """Raise UserError unless every projection of the layer has a rank that high."""
    largest = min(min(projection.weight.shape) for projection in layer.projections().values())
    if not 1 <= rank <= largest:
        raise UserError(f"rank {rank} does not fit this model: its smallest projection allows 1 to {largest}")


def check_choice(name: str, value, choices):
    """Raise UserError unless the value is one of the choices."""
    if value not in choices:
        if isinstance(choices, range):
            raise UserError(f"{name} {value}: give a whole number from {choices[0]} to {choices[-1]}")
        raise UserError(f"{name} {value!r}: give one of {', '.join(choices)}")
