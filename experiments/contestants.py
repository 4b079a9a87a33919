"""What is timed beside each other by bench.py and gpu_check.py: models, and a training step of each.

The obvious way is the model of ouroboros.py as one would first write it, on the layers of transformers. It is
the structure of the released code: all logits at once, a module for each part, and everything in one type.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from experiments.sizes import SIZES
from fast import compile_blocks, recompute_activations
from ouroboros import Ouroboros
from patch import Patched, distillation_loss
from qwen import PROJECTIONS, Config, Qwen


@dataclass(frozen=True)
class Kind:
    """A way to take a training step, and its name in the tables."""

    name: str
    obvious: bool = False  # on the layers of transformers
    returns_memory: bool = False  # the C library gives freed memory back, as it does by itself
    compiled: bool = False
    recomputed: bool = False  # activation checkpointing
    modulation: str = "controller"
    patch: bool = False
    distill: float = 0.0


OBVIOUS = Kind("the obvious way", obvious=True)
OBVIOUS_RETURNS = Kind("the obvious way, memory returned", obvious=True, returns_memory=True)
OURS = Kind("this project")
STATIC = Kind("static modulation", modulation="static")
RECOMPUTED = Kind("activation checkpointing", recomputed=True)
COMPILED = Kind("torch.compile", compiled=True)
COMPILED_STATIC = Kind("torch.compile, static modulation", compiled=True, modulation="static")
COMPILED_RECOMPUTED = Kind("torch.compile, activation checkpointing", compiled=True, recomputed=True)
COMPILED_PATCH = Kind("torch.compile, --patch --distill 0", compiled=True, patch=True)
COMPILED_DISTILLED = Kind("torch.compile, --patch", compiled=True, patch=True, distill=0.5)

DEPTH = 8
RANK_OF_LORA = 32
TOKEN_LIMIT = 4096  # random tokens are below it, so that every vocabulary has them

# ---- The obvious way -------------------------------------------------------------------------------------


def transformers_model(qwen: Qwen):
    """transformers' Qwen2 with the very tensors of ours."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ours = qwen.config
    config = Qwen2Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.rms_norm_eps,
        tie_word_embeddings=ours.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.set_default_dtype(qwen.head_weight.dtype)
    with qwen.head_weight.device:
        model = Qwen2ForCausalLM(config).requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)

    tensors = {}
    for name, tensor in qwen.state_dict().items():
        if not name.startswith("lm_head"):
            name = f"model.{name}"
        tensors[name] = tensor
    missing = model.load_state_dict(tensors, strict=False, assign=True).missing_keys
    for name in missing:
        if name.endswith("bias"):  # SmolLM2 has no biases
            model.get_parameter(name).zero_()
    model.tie_weights()
    return model


class ObviousProjection(nn.Module):
    """A projection that holds its diagonal m, set before each call. x [B, T, in] -> [B, T, out]"""

    def __init__(self, projection: nn.Linear, lora):
        super().__init__()
        self.projection = projection
        self.A = lora.A
        self.B = lora.B
        self.scale = lora.scale
        self.m = None  # [B, T, r]

    def forward(self, x):
        return self.projection(x) + self.scale * ((x @ self.A.T * self.m) @ self.B.T)


class Obvious(nn.Module):
    """The model of ouroboros.py, with its weights, as one would first write it.

    It stands on the layers of transformers, has a module for each part, computes all logits at once and
    everything in one type.
    """

    def __init__(self, ours: Ouroboros, qwen: Qwen):
        super().__init__()
        self.hf = transformers_model(qwen)
        self.depth = ours.depth
        layers = self.hf.model.layers
        self.prelude = layers[: len(ours.prelude)]
        self.recurrent = layers[ours.settings["recurrent"]]
        self.coda = layers[-len(ours.coda) :]
        self.hf.model.layers = nn.ModuleList()  # without the layers that are cut out

        self.projections = nn.ModuleDict()
        for name in PROJECTIONS:
            parent = (
                self.recurrent.self_attn if hasattr(self.recurrent.self_attn, name) else self.recurrent.mlp
            )
            self.projections[name] = ObviousProjection(getattr(parent, name), ours.lora[name])
            setattr(parent, name, self.projections[name])

        self.reduce = copy_of_linear(ours.controller.reduce)
        self.step = nn.Embedding.from_pretrained(ours.controller.step_embedding.weight.detach(), freeze=False)
        self.join = copy_of_linear(ours.controller.join)
        self.narrow = copy_of_linear(ours.controller.narrow)
        self.heads = nn.ModuleDict()
        for name, weight in zip(PROJECTIONS, ours.controller.heads.weight.chunk(len(PROJECTIONS))):
            self.heads[name] = linear_of(weight)

        self.gate = copy_of_linear(ours.gate.linear)
        self.norms = nn.ModuleList()
        for weight in ours.step_norm.weight:
            norm = nn.RMSNorm(len(weight), ours.step_norm.eps)
            norm.weight.data.copy_(weight)
            self.norms.append(norm)
        self.to(qwen.head_weight)

    def loss(self, ids, targets):
        """The mean cross entropy of targets [B, T], aligned with ids [B, T]."""
        h = self.hf.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        rotary = self.hf.model.rotary_emb(h, positions[None])
        for layer in self.prelude:
            h = layer(h, position_embeddings=rotary, attention_mask=None)

        for t in range(self.depth):
            pooled = h.float().cumsum(1) / (positions[:, None] + 1)
            self.set_diagonals(pooled.to(h.dtype), t)
            h_new = self.recurrent(h, position_embeddings=rotary, attention_mask=None)
            h_new = self.norms[t](h_new)
            g = torch.sigmoid(self.gate(torch.cat([h_new, h], -1)))
            h = g * h_new + (1 - g) * h

        for layer in self.coda:
            h = layer(h, position_embeddings=rotary, attention_mask=None)
        logits = self.hf.lm_head(self.hf.model.norm(h))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def set_diagonals(self, pooled, t: int):
        """The Controller: pooled [B, T, d] -> m [B, T, r] of each projection."""
        p = F.silu(self.reduce(pooled))
        e = self.step(torch.tensor(t, device=p.device)).expand(*p.shape[:2], -1)
        z = F.silu(self.join(torch.cat([p, e], -1)))
        z = F.silu(self.narrow(z))
        for name, projection in self.projections.items():
            projection.m = self.heads[name](z)


def linear_of(weight, bias=None) -> nn.Linear:
    """A linear layer with a copy of this weight [out, in] and this bias [out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def copy_of_linear(linear: nn.Linear) -> nn.Linear:
    return linear_of(linear.weight, linear.bias)


# ---- The models and their steps --------------------------------------------------------------------------


def load_model(name: str, device, dtype) -> Qwen:
    """The frozen model of a folder or a Hub name. 0.5B, 3B and so on are random weights in its shapes."""
    if name not in SIZES:
        return Qwen.from_pretrained(name, dtype, device)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        qwen = Qwen(SIZES[name].config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    qwen.embed_tokens.weight.mul_(0.02)  # the head is the same matrix: a usual size for the logits
    return qwen


def config_of(name: str) -> Config:
    """The shape of the model that load_model returns."""
    return SIZES[name].config if name in SIZES else Config.from_pretrained(name)


def model_and_loss(kind: Kind, qwen: Qwen):
    """A looped model of a kind, and its loss, a function of (ids, targets), [B, T] each.

    All kinds have the same weights where they have the same parts.
    """
    torch.manual_seed(0)
    if kind.patch:
        model = Patched(qwen, depth=1, modulation="none")
    else:
        model = Ouroboros(qwen, depth=DEPTH, rank=RANK_OF_LORA, modulation=kind.modulation)
    for p in model.trained_parameters().values():
        p.data += 0.01 * torch.randn(p.shape).to(p)  # so that no part is without effect

    if kind.obvious:
        model = Obvious(model, qwen)
        return model, model.loss

    full = None
    loss_of = model.loss
    if kind.distill > 0:
        full = qwen
        loss_of = partial(distillation_loss, model, full, kind.distill)
    if kind.compiled:
        compile_blocks(model, full)
    if kind.recomputed:
        recompute_activations(model)
    return model, loss_of


def training(model, loss_of, batch_size: int, seq_len: int):
    """A function that takes one whole training step and returns its loss and the norm of its gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = None if isinstance(model, Obvious) else True
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused)
    ids, targets = random_tokens(2, batch_size, seq_len).to(parameters[0].device)

    def training_step() -> tuple[float, float]:
        loss = loss_of(ids, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return training_step


def generation(model, batch_size: int, new_tokens: int):
    """A function that generates so many tokens after as many of a prompt, for each sequence of a batch."""
    ids = random_tokens(batch_size, new_tokens).to(model.head_weight.device)
    model.config = replace(model.config, eos_token_id=())  # nothing ends a text early
    return partial(model.generate, ids, max_new_tokens=new_tokens)


def generation_of_transformers(qwen: Qwen, batch_size: int, new_tokens: int):
    """The same with transformers, for a full model."""
    ids = random_tokens(batch_size, new_tokens).to(qwen.head_weight.device)
    return partial(
        transformers_model(qwen).generate,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def random_tokens(*shape):
    """The same tokens each time, int64, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, TOKEN_LIMIT, shape, generator=generator)


# ---- Measuring -------------------------------------------------------------------------------------------


def seconds_of(work, device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(work, device) -> int:
    """The bytes that are held at the peak of the work beyond those that were held before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def matrix_rate(device, dtype) -> float:
    """The FLOP/s of a product of two large random matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)

    def product():
        a @ b

    times = [seconds_of(product, device) for _ in range(12)]
    return 2 * n**3 / median(times[2:])


def flops_per_token(config: Config) -> int:
    """A lower bound of the FLOP that a training step takes for each token.

    It counts the frozen matrices: in the forward pass and, from the recurrent layer on, in the backward pass
    to the activations.
    """
    with torch.device("meta"):
        model = Ouroboros(Qwen(config), depth=DEPTH, rank=RANK_OF_LORA)
    layer = 2 * sum(projection.weight.numel() for projection in model.recurrent.projections().values())
    head = 2 * model.head_weight.numel()
    return layer * (len(model.prelude) + 2 * DEPTH + 2 * len(model.coda)) + 2 * head
