"""Ouroboros: a pretrained decoder with one layer looped, whose weights a Controller changes for every input and step.

    ids [B,T] -> embed -> prelude -> h
    for t in 0 .. depth-1:
        m_t   = Controller(pool(h), t)                                      # 7 diagonals of length r
        h_new = StepNorm_t( Layer(h; W_k + (alpha/r) B_k diag(m_t,k) A_k) )    # k: one of the 7 projections
        g     = sigmoid(W_g [h_new; h] + b_g)
        h     = g * h_new + (1 - g) * h
    h -> coda -> final norm -> lm head -> logits [B,T,V]

The pretrained layers and the bases A, B are frozen; Controller, gate and step norm are trained (arXiv 2604.02051), in
float32. They are cast to the type of the state where they are used, so bf16 needs no autocast.

Past the paper (patch, train_coda): a matrix P at each seam, h + P h before and after the loop (after LinearPatch, arXiv
2505.24680); in the loop h + o_t (h_new - h) instead of gate and step norm, o_0 = 1 and o_t = 0 at the start; a LoRA on
the coda or on all kept layers. As P = 0 too, training with patch starts exactly from the cut model.

A trained run continues a prompt: python ouroboros.py runs/NAME --prompt "..."
"""

import hashlib
import json
import sys
from argparse import SUPPRESS, ArgumentParser
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwen import (DOWN, GATE, PROJECTIONS, LanguageModel, O, Q, Qwen, UserError, exit_on_user_error, handling,
                  keep_freed_memory, load_tokenizer, pick_device, plain, promote, replace_file)

MAX_STEPS = 64  # rows of the step embedding, of the static table and of the step norm
STEPS = "step-" + 7 * "[0-9]"  # the folders of a run's checkpoints

# ---- The parts -------------------------------------------------------------------------------------------------------
def svd_bases(residual, rank: int):
    """The best rank-r factors of a residual R [out, in]: A [r, in], its top right singular vectors, and B [out, r],
    the left ones times their singular values. The eigenvectors of the smaller Gram matrix are the singular vectors of
    that side, in a fraction of a full SVD's time. B = R A^T from the same A makes the free signs harmless."""
    R = promote(residual.cpu() if residual.is_mps else residual)  # eigh has no MPS kernel in most versions of torch
    tall = R.shape[0] >= R.shape[1]
    _, vectors = torch.linalg.eigh(R.T @ R if tall else R @ R.T)  # eigenvalues ascend
    top = vectors[:, -rank:].flip(1)
    A = top.T if tall else torch.linalg.qr(R.T @ top).Q.T  # R^T u = sigma v: normalised, in order, orthogonal
    return A.contiguous(), R @ A.T

class SVDLoRA(nn.Module):
    """The modulated part of one projection: (alpha/r) B diag(m) A x. x [B, T, in], m [.., r] -> [B, T, out]"""
    def __init__(self, A, B, alpha: float):
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.scale = alpha / len(A)
    def forward(self, x, m):
        return F.linear(F.linear(x, self.A) * (self.scale * m), self.B)

class Linear(nn.Linear):
    """A linear layer of float32 weights, zero at the start if so asked, that computes in the type of its input."""
    def __init__(self, into: int, out: int, bias=True, zero=False):
        super().__init__(into, out, bias)
        if zero:
            nn.init.zeros_(self.weight)
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

class Controller(nn.Module):
    """The hypernetwork: pooled state [B, T or 1, d] and step t -> 7 diagonals, each [B, T or 1, r].
    pooled -> 2s, joined with the embedding of t (s), -> 2s -> s with SiLU after each, -> one head s -> r a projection.
    The heads are zero at the start: no modulation."""
    def __init__(self, d: int, rank: int, s: int = 128):
        super().__init__()
        self.reduce, self.step = Linear(d, 2 * s), nn.Embedding(MAX_STEPS, s)
        self.join, self.narrow = Linear(3 * s, 2 * s), Linear(2 * s, s)
        self.heads = Linear(s, len(PROJECTIONS) * rank, bias=False, zero=True)  # the seven, side by side
    def forward(self, pooled, t: int):
        p = F.silu(self.reduce(pooled))
        W_p, W_e = self.join.weight.split([p.shape[-1], self.step.embedding_dim], dim=1)  # W [p; e] = W_p p + W_e e,
        bias = self.join.bias + W_e @ self.step.weight[t]  # and the second is the same for every position
        z = F.silu(self.narrow(F.silu(F.linear(p, W_p.to(p.dtype), bias.to(p.dtype)))))
        return self.heads(z).unflatten(-1, (len(PROJECTIONS), -1)).unbind(-2)

class StaticModulation(nn.Module):
    """The baseline without an input: a learned table [64, 7, r], zero at the start -> 7 diagonals, each [r]."""
    def __init__(self, rank: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(MAX_STEPS, len(PROJECTIONS), rank))
    def forward(self, h, t: int):
        return self.table[t].to(h.dtype).unbind()

class Gate(nn.Module):
    """g = sigmoid(W_g [h_new; h] + b_g); g * h_new + (1 - g) * h, per channel. [B, T, d] twice -> [B, T, d]
    W_g = 0 and b_g = -2 at the start: sigmoid(-2) = 0.12, so 88% of the old state stays."""
    def __init__(self, d: int):
        super().__init__()
        self.linear = Linear(2 * d, d, zero=True)
        nn.init.constant_(self.linear.bias, -2.0)
    def forward(self, h_new, h):
        return torch.lerp(h, h_new, torch.sigmoid(self.linear(torch.cat([h_new, h], dim=-1))))

class StepNorm(nn.Module):
    """RMSNorm with a weight of its own for each step t, ones at the start. [B, T, d] -> [B, T, d]"""
    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(MAX_STEPS, d)), eps
    def forward(self, h, t: int):
        return F.rms_norm(h, h.shape[-1:], self.weight[t].to(h.dtype), self.eps)

class Adapter(nn.Module):
    """A `project` (see qwen.py) for a kept layer whose two norms and a plain LoRA (arXiv 2106.09685) are trained:
    W x' + B A x', where x' = (1 + c) x behind a norm, and c = B = 0 at the start. rank 0: the norms alone.
    [B, T, in] -> [B, T, out]"""
    def __init__(self, layer, rank: int):
        super().__init__()
        projections = [layer.get_submodule(name) for name in PROJECTIONS]
        self.change = nn.Parameter(torch.zeros(2, projections[Q].in_features))
        self.A = nn.ModuleList(Linear(p.in_features, rank, bias=False) for p in projections if rank)
        self.B = nn.ModuleList(Linear(rank, p.out_features, bias=False, zero=True) for p in projections if rank)
    def forward(self, projection, x, k: int):
        x = x if k in (O, DOWN) else x + x * self.change[k // GATE].to(x.dtype)
        return projection(x) + self.B[k](self.A[k](x)) if self.A else projection(x)

def prefix_mean(h, cache=None):
    """pool(h): for every position, the mean over it and all before it. [B, T, d] -> [B, T, d]
    Causal, and generation keeps only a running sum; in float32, since in bf16 such a sum stops growing."""
    seen, sums = cache.length if cache else 0, promote(h).cumsum(dim=1)
    if cache:
        sums = sums + cache.input_sum
        cache.input_sum = sums[:, -1:]
    return (sums / torch.arange(seen + 1, seen + h.shape[1] + 1, device=h.device)[:, None]).to(h.dtype)

def sequence_mean(h, cache=None):
    """The published pool(h): one mean for all, so that every position sees the future. [B, T, d] -> [B, 1, d]"""
    return promote(h).mean(dim=1, keepdim=True).to(h.dtype)

POOLS = {"prefix": prefix_mean, "sequence": sequence_mean}
MODULATIONS = ("controller", "static", "none")
CODAS = {"none": None, "norms": 0, "lora": 4, "all": 2}  # train_coda -> rank of the adapters; all: on every kept layer

# ---- The model -------------------------------------------------------------------------------------------------------
def default_cut(layers: int) -> tuple[int, int, int]:
    """(prelude, recurrent, coda) for a model of so many layers, in the proportions of the paper's 8/18/8 of 36."""
    return round(layers * 8 / 36), layers // 2, round(layers * 8 / 36)

class Ouroboros(LanguageModel):
    """The looped model on a pretrained Qwen, whose layers it shares and freezes.
    prelude, coda: how many first and last layers stay; recurrent: index of the looped one (paper: 8, 18, 8 of 36; by
    default in that proportion). rank, alpha: of the SVD LoRA. depth: steps of the loop. modulation: controller,
    static or none; pool: prefix (causal) or sequence (as published); gate, step_norm: the ablation switches. patch: as
    above; train_coda: none, norms, lora (and norms), all (both, of every kept layer). checkpointing: in training, a
    third more time for far less memory. Raises UserError for a cut, a rank, a depth or a switch that makes no sense."""
    checkpointing = False
    def __init__(self, qwen: Qwen, prelude=None, recurrent=None, coda=None, rank=32, alpha=16.0, depth=8,
                 modulation="controller", pool="prefix", gate=True, step_norm=True, patch=False, train_coda="none"):
        super().__init__()
        L, d, eps = len(qwen.layers), qwen.config.hidden_size, qwen.config.rms_norm_eps
        prelude, recurrent, coda = (c if x is None else x for x, c in zip((prelude, recurrent, coda), default_cut(L)))
        if not (prelude >= 1 and coda >= 1 and prelude <= recurrent < L - coda and L - coda - prelude > 1):
            raise UserError(f"prelude {prelude}, recurrent {recurrent} (counted from 0), coda {coda} is no cut of {L} "
                            "layers: keep one before, one after, the recurrent one between, and let some go")
        if not (1 <= depth <= MAX_STEPS and modulation in MODULATIONS and pool in POOLS and train_coda in CODAS):
            raise UserError(f"depth {depth}, modulation {modulation!r}, pool {pool!r}, train_coda {train_coda!r}: "
                            f"depth is 1 to {MAX_STEPS}, the others are one of {MODULATIONS}, {(*POOLS,)}, {(*CODAS,)}")
        self.settings = dict(prelude=prelude, recurrent=recurrent, coda=coda, rank=rank, alpha=alpha, depth=depth,
                             modulation=modulation, pool=pool, gate=gate, step_norm=step_norm, patch=patch,
                             train_coda=train_coda)
        self.config, self.source, self.layers, self.depth = qwen.config, qwen.source, L, depth
        # Frozen: the kept layers and the bases of what was removed.
        self.embed_tokens, self.norm, self.lm_head = qwen.embed_tokens, qwen.norm, qwen.lm_head
        self.prelude, self.recurrent, self.coda = qwen.layers[:prelude], qwen.layers[recurrent], qwen.layers[L - coda :]
        self.requires_grad_(False)
        if modulation != "none":
            removed = [layer for i, layer in enumerate(qwen.layers) if prelude <= i < L - coda and i != recurrent]
            self.lora = nn.ModuleList(SVDLoRA(A, B, alpha) for A, B in self.residual_bases(removed, rank))
        # Trained, in float32.
        self.controller, self.pool = None, lambda h, cache: h
        if modulation == "controller":
            self.controller, self.pool = Controller(d, rank), POOLS[pool]
        elif modulation == "static":
            self.controller = StaticModulation(rank)
        # A pool that sees the future leaves nothing to keep: a new token changes what all earlier ones gave.
        self.cacheable = modulation != "controller" or pool == "prefix"
        self.opening = nn.Parameter(torch.eye(depth, 1).repeat(1, d)) if patch else None
        self.gate = Gate(d) if gate and not patch else None
        self.step_norm = StepNorm(d, eps) if step_norm and not patch else None
        self.patches = nn.ModuleList(Linear(d, d, bias=False, zero=True) for _ in range(2 * patch))
        adapted = {"none": [], "all": [*self.prelude, self.recurrent, *self.coda]}.get(train_coda, self.coda)
        self.adapters = nn.ModuleList(Adapter(layer, CODAS[train_coda]) for layer in adapted)
        self.to(self.embed_tokens.weight.device)
    @torch.no_grad()
    def residual_bases(self, removed, rank: int):
        """(A_k, B_k) of R_k = mean over the removed layers of W_k, minus the recurrent layer's W_k; k = 1..7. Where the
        removed layers were not loaded, zeros: a saved run brings its own."""
        bases = []
        for name in PROJECTIONS:
            W = self.recurrent.get_submodule(name).weight
            if not 1 <= rank <= min(W.shape):
                raise UserError(f"rank {rank} does not fit {name}, whose smaller side is {min(W.shape)}: at most that")
            factors = W.new_zeros(rank, W.shape[1]), W.new_zeros(W.shape[0], rank)
            if not isinstance(removed[0], nn.Identity):
                mean = sum(promote(layer.get_submodule(name).weight) for layer in removed) / len(removed)
                factors = svd_bases(mean - promote(W), rank)
            bases.append([factor.to(W) for factor in factors])
        return bases
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
    def hidden(self, ids, depth=None, cache=None, cut=False):
        """ids [B, T] -> normalised last hidden state [B, T, d]. depth: steps of the loop; default: the model's own.
        cut: the baseline instead, which passes through the recurrent layer once, as it is."""
        if (depth := self.depth if depth is None else depth) < 1:
            raise UserError(f"depth {depth}: the loop takes at least one step")
        rotary, caches = self.start(ids, cache)
        n, patched, adapters = len(self.prelude), self.patches and not cut, [] if cut else [*self.adapters]
        ways = [plain] * (n + 1 + len(self.coda) - len(adapters)) + adapters  # to apply each kept layer's projections
        keep_inputs_only = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        call = keep_inputs_only if self.checkpointing and torch.is_grad_enabled() else lambda block, *x: block(*x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and ways[0] is not plain):  # a graph only for adapters
            h = self.embed_tokens(ids)
            for layer, project in zip([*self.prelude, self.recurrent] if cut else self.prelude, ways):
                h = call(layer, h, rotary, next(caches), project)
        h = h + self.patches[0](h) if patched else h
        for t in range(0 if cut else depth):
            h = call(self.loop_step, h, t, rotary, next(caches), ways[n])
        h = h + self.patches[1](h) if patched else h
        for layer, project in zip(self.coda, ways[n + 1 :]):
            h = call(layer, h, rotary, next(caches), project)
        return self.norm(h)
    def compile_blocks(self, **how):
        """torch.compile the turn of the loop and every prelude and coda layer. No name in a checkpoint changes."""
        for layer in (*self.prelude, *self.coda):
            layer.compile(**how)
        self.loop_step = torch.compile(self.loop_step, **how)
        self.generate = torch.compiler.set_stance("force_eager")(self.generate)  # its shapes change with each token
    def loop_step(self, h, t: int, rotary, cache=None, project=plain):
        """One turn of the loop, the equations at the head of this file. [B, T, d] -> [B, T, d]"""
        s = min(t, self.depth - 1)  # past the trained depth, the last trained step's embedding and norm go on
        modulated = project
        if self.controller is not None:
            m = self.controller(self.pool(h, cache), s)
            def modulated(projection, x, k):
                return project(lambda y: projection(y) + self.lora[k](y, m[k]), x, k)
        h_new = self.recurrent(h, rotary, cache, modulated)
        if self.opening is not None:
            return torch.lerp(h, h_new, self.opening[s].to(h.dtype))
        h_new = h_new if self.step_norm is None else self.step_norm(h_new, s)
        return self.gate(h_new, h) if self.gate is not None else h_new
    def cut(self, ids):  # [B, T] -> logits [B, T, V] of the cut baseline
        return self(ids, cut=True)
    def own(self) -> dict[str, torch.Tensor]:
        """What is not the base's: the trained weights and the bases."""
        trained = self.trained_parameters()
        return {name: t for name, t in self.state_dict().items() if name in trained or name.startswith("lora.")}
    def save(self, folder, more=None, **about):
        """Write the trained weights, the bases and every switch, whole or not at all, to folder/ouroboros.safetensors.
        more: other tensors, and about: other JSON values, that go with them."""
        config = {"base": self.source, "fingerprint": self.fingerprint(), "layers": self.layers, **self.settings}
        tensors, about = self.own() | (more or {}), json.dumps({"model": config, **about})
        metadata = {"about": about, "sha256": checksum(tensors, about)}
        replace_file(Path(folder) / "ouroboros.safetensors", lambda part: save_file(tensors, part, metadata))
    @classmethod
    def load(cls, folder, base=None, dtype=torch.float32, device="cpu", checkpoint=None) -> "Ouroboros":
        """The model that save wrote. Only the kept layers of its base are read. base: where that lies now, if it moved;
        checkpoint: what read_checkpoint(folder) gave. UserError if the folder is damaged or the base another model."""
        tensors, about = checkpoint or read_checkpoint(folder)
        with handling(folder, "read as a whole run on this base"):
            config = dict(about["model"])
            saved_base, fingerprint, L = (config.pop(key) for key in ("base", "fingerprint", "layers"))
            kept = [*range(config["prelude"]), config["recurrent"], *range(L - config["coda"], L)]
            model = cls(Qwen.from_pretrained(base or saved_base, dtype, device, layers=kept), **config)
            if absent := {*model.load_state_dict(tensors, strict=False).missing_keys} & model.own().keys():
                raise KeyError(min(absent))
        if model.fingerprint() != fingerprint:
            raise UserError(f"{base or saved_base} is not that model, {saved_base}, on which {folder} was trained")
        return model
    def fingerprint(self) -> str:
        """A hash of values from every frozen tensor of the base, the same for each type and device it is loaded in."""
        frozen = {name: p.flatten() for name, p in self.named_parameters() if not p.requires_grad}
        return checksum({name: p[:: max(1, len(p) // 1024)].bfloat16() for name, p in frozen.items()}, "")[:16]

def checksum(tensors: dict, about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {[*t.shape]}".encode())
        digest.update(t.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

def read_checkpoint(folder) -> tuple[dict, dict]:
    """(tensors, about) that save wrote: to this folder or, if it is a run's, as its newest checkpoint that is whole.
    What is damaged is named on stderr. Raises UserError if nothing whole is left."""
    places = sorted(Path(folder).glob(STEPS), reverse=True) or [Path(folder)]
    for place in places:
        try:
            path = place / "ouroboros.safetensors"
            with handling(path, "read as a whole checkpoint", "bring back a copy"), safe_open(path, "pt") as file:
                tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()
                if checksum(tensors, metadata["about"]) != metadata["sha256"]:
                    raise ValueError("its checksum does not fit")
                return tensors, json.loads(metadata["about"])
        except UserError as error:
            if place == places[-1]:
                raise
            print(f"{error}; now the checkpoint before it is taken", file=sys.stderr)

def main():
    parser = ArgumentParser(description="Continue a prompt with a trained run.", usage=SUPPRESS)
    option = parser.add_argument
    option("run", help="folder that train.py wrote, such as runs/NAME")
    option("--prompt", required=True, help="text to continue")
    option("--max-new-tokens", type=int, default=100)
    option("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default)")
    option("--depth", type=int, help="steps of the loop (default: as trained)")
    option("--base", help="where the base model lies, if it moved")
    option("--device", default="auto", help="cuda, mps or cpu (default: the first of these there is)")
    args = parser.parse_args()
    keep_freed_memory()
    device, dtype = pick_device(args.device)
    model = Ouroboros.load(args.run, args.base, dtype, device)
    tokenizer = load_tokenizer(args.base or model.source, model.config.vocab_size)
    ids = tokenizer.encode(args.prompt.encode("utf-8", "replace").decode(), add_special_tokens=False).ids
    if not ids:
        raise UserError("--prompt is empty; give at least one character")
    out = model.generate(torch.tensor([ids], device=device), args.max_new_tokens, args.temperature, depth=args.depth)
    print(tokenizer.decode(out[0].tolist()))

if __name__ == "__main__":
    exit_on_user_error(main)
