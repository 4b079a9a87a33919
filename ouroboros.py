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

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from qwen import FLOAT_TYPES, PROJECTIONS, KVCache, LanguageModel, Qwen, apply_projection, rotary_at
from support.fast import promote  # to float32, or float64 if it is that already
from support.files import UserError, check_choice, check_number, one_line, read_checkpoint, write_checkpoint

# Rows of the per-step tables (step embedding, StepNorm, static table). A model's own depth is at most this. A
# forward pass may take more steps.
MAX_STEPS = 64

# ---- A_k, B_k, and the low-rank update (alpha/r) B_k diag(m) A_k -----------------------------------------


def svd_bases(R, rank: int):
    """The bases A [r, in] and B [out, r] of a difference R [out, in] of weights, from its SVD R = U S V^T.

    A is the top r right singular vectors (rows of V^T), B the top r left ones times their singular values
    (U S). B A is the best rank-r approximation of R. With every entry of m equal to r/alpha the scale
    cancels and the update is B A: the recurrent layer then has about the mean weights of the removed ones.

    The columns of V are the eigenvectors of R^T R, and those of U are the eigenvectors of R R^T. The smaller
    of the two matrices takes seconds for all projections of a 3B model, where torch.linalg.svd takes minutes.
    """
    R = promote(R)
    out_features, in_features = R.shape
    if out_features >= in_features:
        _, V = torch.linalg.eigh(R.T @ R)  # in ascending order of the eigenvalues
        A = V[:, -rank:].flip(1).T
    else:
        _, U = torch.linalg.eigh(R @ R.T)
        U = U[:, -rank:].flip(1)
        # R^T u = s v: the columns are orthogonal and in order, and QR makes them unit vectors, even at s = 0
        A = torch.linalg.qr(R.T @ U).Q.T
    B = R @ A.T  # with V_r = A^T: R V_r = U S V^T V_r = U_r S_r
    return A.contiguous(), B


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
        y = y * (self.scale * m.to(y.dtype))  # (alpha/r) diag(m) A x
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


def sequence_mean(h, cache=None):
    """The published pool(h): the mean over the whole sequence. [B, T, d] -> [B, 1, d]"""
    return promote(h).mean(dim=1, keepdim=True).to(h.dtype)


POOLS = {"prefix": prefix_mean, "sequence": sequence_mean}


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
        e = self.step_embedding.weight[t]  # [s], the same at every position
        # z = silu(W [p; e] + b) with W = [W_p W_e], so that W [p; e] + b = W_p p + (W_e e + b)
        W_p, W_e = self.join.weight.split([p.shape[-1], e.shape[-1]], dim=1)
        b = W_e @ e + self.join.bias
        z = F.silu(F.linear(p, W_p.to(p.dtype), b.to(p.dtype)))  # [B, T, 2s]
        z = F.silu(self.narrow(z))  # [B, T, s]
        diagonals = self.heads(z).chunk(len(PROJECTIONS), dim=-1)  # 7 times [B, T, r]
        return dict(zip(PROJECTIONS, diagonals))


class StaticModulation(nn.Module):
    """The baseline in the Controller's place: a trained table. Step t -> the diagonals {k: [r]}, for any
    input.

    The table is zero at the start.
    """

    def __init__(self, rank: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(MAX_STEPS, len(PROJECTIONS), rank))

    def forward(self, t: int):
        return dict(zip(PROJECTIONS, self.table[t]))


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


def default_cut(num_layers: int) -> tuple[int, int, int]:
    """(prelude, recurrent, coda) in the paper's proportions.

    Of 36 layers, the first 8 and the last 8 are kept, and layer 18, counted from 0, is looped.
    """
    ends = round(num_layers * 8 / 36)
    return ends, num_layers // 2, ends


@dataclass
class LoopCache:
    """The caches of all layer calls of a forward pass. The entries are None where no cache is used."""

    prelude: list
    steps: list
    coda: list


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

    default_cut = staticmethod(default_cut)

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
        config = qwen.config
        first, middle, last = self.default_cut(config.num_hidden_layers)
        prelude = first if prelude is None else prelude
        recurrent = middle if recurrent is None else recurrent
        coda = last if coda is None else coda
        self.settings = dict(prelude=prelude, recurrent=recurrent, coda=coda, rank=rank, alpha=alpha)
        self.settings |= dict(depth=depth, modulation=modulation, pool=pool, gate=gate, step_norm=step_norm)
        self.check_settings(qwen)
        self.config = config
        self.source = qwen.source
        self.base_fingerprint = None if qwen.norm.weight.is_meta else qwen.fingerprint()
        self.depth = depth

        # Pretrained and frozen: the kept layers.
        first_of_coda = config.num_hidden_layers - coda
        self.embed_tokens = qwen.embed_tokens
        self.prelude = qwen.layers[:prelude]
        self.recurrent = qwen.layers[recurrent]
        self.coda = qwen.layers[first_of_coda:]
        self.norm = qwen.norm
        self.lm_head = qwen.lm_head
        self.requires_grad_(False)  # so far, this model has no other parameters

        # Frozen: the bases A, B.
        self.lora = nn.ModuleDict()
        if modulation != "none":
            if bases is None:
                removed = [*qwen.layers[prelude:recurrent], *qwen.layers[recurrent + 1 : first_of_coda]]
                bases = self.residual_bases(removed, rank)
            for k, (A, B) in bases.items():
                self.lora[k] = SVDLoRA(A, B, alpha)

        # Trained: the Controller or the static table, gate and StepNorm.
        d = config.hidden_size
        self.pool = POOLS[pool]
        self.controller = None
        if modulation == "controller":
            self.controller = Controller(d, rank)
        if modulation == "static":
            self.controller = StaticModulation(rank)
        self.gate = Gate(d) if gate else None
        self.step_norm = StepNorm(d, config.rms_norm_eps) if step_norm else None
        self.to(self.norm.weight.device)

    def check_settings(self, qwen: Qwen):
        """Raise UserError for settings that are not possible on this pretrained model."""
        check_choice("modulation", self.settings["modulation"], ("controller", "static", "none"))
        check_choice("pool", self.settings["pool"], POOLS)
        num_layers = qwen.config.num_hidden_layers
        sizes = [min(projection.weight.shape) for projection in qwen.layers[0].projections().values()]
        check_number("depth", self.settings["depth"], 1, MAX_STEPS)
        check_number("alpha", self.settings["alpha"], 0.0, 1e6)
        if self.settings["modulation"] != "none":
            check_number("rank", self.settings["rank"], 1, min(sizes))
        for name in ("prelude", "recurrent", "coda"):
            check_number(name, self.settings[name], 1, num_layers)

        prelude = self.settings["prelude"]
        recurrent = self.settings["recurrent"]
        coda = self.settings["coda"]
        if not prelude <= recurrent < num_layers - coda or num_layers - coda - prelude < 2:
            raise UserError(
                f"prelude {prelude}, recurrent {recurrent} (counted from 0), coda {coda} do not fit "
                f"{num_layers} layers: loop one between the two ends, and remove at least one (--cut)"
            )

    @torch.no_grad()
    def residual_bases(self, removed, rank: int) -> dict:
        """{k: (A_k, B_k)} of R_k = (mean over the removed layers of W_k) - (W_k of the recurrent layer).

        Only matrices count: the biases and the norms of the removed layers are dropped.
        """
        bases = {}
        for k, projection in self.recurrent.projections().items():
            W = projection.weight  # [out, in]
            mean = sum(promote(layer.projections()[k].weight) for layer in removed) / len(removed)
            A, B = svd_bases(mean - promote(W), rank)
            bases[k] = (A.to(W), B.to(W))
        return bases

    # -- The forward pass. patch.py overrides run_prelude, loop_step, modulated_by and run_coda.

    def hidden(self, ids, cache: LoopCache | None = None, depth: int | None = None):
        """ids [B, T] -> normalised last hidden states [B, T, d].

        depth: the number of steps, by default the model's. A cache must have been made for the same depth.
        """
        depth = self.checked_depth(depth)
        first = 0 if cache is None else cache.prelude[0].length
        rotary = rotary_at(self.config, first, ids.shape[1], ids.device)
        if cache is None:
            cache = self.no_cache(depth)
        assert len(cache.steps) == depth, "the cache was made for another depth"

        h = self.run_prelude(self.embed_tokens(ids), rotary, cache)
        for t in range(depth):
            # Steps past self.depth use the step embedding and the StepNorm of the last step that was trained.
            h = self.loop_step(h, min(t, self.depth - 1), rotary, cache.steps[t])
        h = self.run_coda(h, rotary, cache)
        return self.norm(h)

    def run_prelude(self, h, rotary, cache: LoopCache):
        """[B, T, d] -> [B, T, d]. Nothing is trained up to here, so autograd records nothing."""
        for layer, layer_cache in zip(self.prelude, cache.prelude):
            h = layer(h, rotary, layer_cache)
        return h

    def loop_step(self, h, t: int, rotary, step_cache: StepCache | None = None):
        """One step of the loop, the equations at the head of this file. h [B, T, d] -> [B, T, d]"""
        m = self.diagonals(h, t, step_cache)
        h_new = self.recurrent(h, rotary, step_cache, self.modulated_by(m))
        if self.step_norm is not None:
            h_new = self.step_norm(h_new, t)
        if self.gate is None:
            return h_new
        g = self.gate(h_new, h)
        return torch.lerp(h, h_new, g.to(h.dtype))  # g * h_new + (1 - g) * h, which bfloat16 rounds only once

    def diagonals(self, h, t: int, step_cache: StepCache | None = None) -> dict | None:
        """m_t = Controller(pool(h), t): {k: [B, T or 1, r]}. A static table gives {k: [r]}."""
        if self.controller is None:
            return None
        if isinstance(self.controller, StaticModulation):
            return self.controller(t)
        return self.controller(self.pool(h, step_cache), t)

    def modulated_by(self, m: dict | None):
        """The recurrent layer's `project` under the diagonals m: W_k x + (alpha/r) B_k diag(m_k) A_k x."""
        if m is None:
            return apply_projection

        def project(projection, x, name):
            return projection(x) + self.lora[name](x, m[name])

        return project

    def run_coda(self, h, rotary, cache: LoopCache):
        """[B, T, d] -> [B, T, d]. The coda is frozen, and gradients pass through it."""
        for layer, layer_cache in zip(self.coda, cache.coda):
            h = layer(h, rotary, layer_cache)
        return h

    def checked_depth(self, depth: int | None) -> int:
        """`depth`, or the model's own if that is None. Raises UserError for a depth that is not possible."""
        if depth is None:
            return self.depth
        check_number("depth", depth, 1, 1000)
        return depth

    def new_cache(self, depth: int | None = None) -> LoopCache | None:
        """An empty cache for generation with `depth` steps.

        None for a pool that sees the future: a new token then changes the states of all earlier ones.
        """
        if self.pool is sequence_mean and self.settings["modulation"] == "controller":
            return None
        return LoopCache(
            prelude=[KVCache() for _ in self.prelude],
            steps=[StepCache() for _ in range(self.checked_depth(depth))],
            coda=[KVCache() for _ in self.coda],
        )

    def no_cache(self, depth: int) -> LoopCache:
        """What stands for a cache in a pass of `depth` steps over whole sequences."""
        return LoopCache([None] * len(self.prelude), [None] * depth, [None] * len(self.coda))

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

    # -- What is trained and saved

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """name -> parameter, of all that is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """name -> tensor, of all that is trained, and of the bases: all but the frozen pretrained weights."""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def restore(self, tensors: dict):
        """Take what saved_tensors() gave. Raises UserError if it does not fit this model."""
        own = {name: tensor for name, tensor in tensors.items() if "/" not in name}  # the others are AdamW's
        missing = sorted(self.saved_tensors().keys() - own.keys())
        try:
            unknown = self.load_state_dict(own, strict=False).unexpected_keys
        except RuntimeError as error:  # a shape differs
            raise UserError(f"the checkpoint does not fit this model: {one_line(error)}") from error
        for name, p in self.named_parameters():
            if name in own:  # trained, though it may be a part of the pretrained model
                p.requires_grad_(True)
        if missing or unknown:
            raise UserError(f"the checkpoint does not fit this model: it lacks {missing} and has {unknown}")

    def save(self, folder, more_tensors: dict | None = None, **about):
        """Write what is trained, the bases and the settings to folder/ouroboros.safetensors.

        The pretrained weights are not copied: the file has their name and their fingerprint. more_tensors,
        about: further tensors and JSON values to store in the file.
        """
        about["model"] = {
            "class": type(self).__name__,
            "base": self.source,
            "fingerprint": self.base_fingerprint,
            "settings": self.settings,
        }
        write_checkpoint(folder, {**self.saved_tensors(), **(more_tensors or {})}, about)

    @classmethod
    def load(cls, folder, base=None, dtype=torch.float32, device="cpu", checkpoint=None) -> "Ouroboros":
        """The model that save() wrote to a folder, or that a Hub repository holds. No SVD is computed.

        base: where the pretrained model is now, if it was moved, or a Qwen, which then shares its layers and
        whose dtype and device count. checkpoint: what read_checkpoint(folder) has returned. Raises UserError
        if the folder holds no such model, or if the pretrained model is not the one it was made from.
        """
        check_choice("dtype", dtype, FLOAT_TYPES)
        tensors, about = checkpoint or read_checkpoint(folder)
        saved = about["model"]
        if saved["class"] != cls.__name__:
            raise UserError(f"{folder}: holds a {saved['class']}; open it with open_run of evaluate.py")
        base = saved["base"] if base is None else base
        if base is None:
            raise UserError(f"{folder}: its pretrained model was not loaded from files; give it as base=")
        if isinstance(base, Qwen):
            qwen = base
            dtype, device = qwen.norm.weight.dtype, qwen.norm.weight.device
        else:
            qwen = Qwen.from_pretrained(base, dtype=None)  # a layer that is not used is not read
        if qwen.fingerprint() != saved["fingerprint"]:
            raise UserError(
                f"{qwen.source}: is not the model on which {folder} was trained (another config or "
                "other weights); name the right one with --model (in Python: base=...)"
            )

        bases = {}
        for k in PROJECTIONS:
            if f"lora.{k}.A" in tensors:
                bases[k] = (tensors[f"lora.{k}.A"], tensors[f"lora.{k}.B"])
        model = cls(qwen, bases=bases, **saved["settings"])
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        if not frozen.isdisjoint(tensors):
            # a variant has trained layers of the pretrained model, which itself stays as it is
            model = copy.deepcopy(model)
        model.restore(tensors)
        for part in (model.embed_tokens, model.prelude, model.recurrent, model.coda, model.norm, model.lora):
            part.to(device, dtype)
        if model.lm_head is not None:
            model.lm_head.to(device, dtype)
        return model.to(device)
