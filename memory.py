"""How much memory a training step takes on a CUDA GPU, counted without computing anything.

The step runs on torch's meta device, where tensors have shapes and no content, and the bytes of all tensors
that are alive are counted: the weights, the gradients, the two moments of AdamW, and every tensor of the
forward and the backward pass. A stand-in takes the place of CUDA's fused attention. The step is the one
without torch.compile. Not counted is what torch's allocator and the kernels take beyond the tensors: their
share is MARGIN.
"""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qwen
from fast import recompute_activations
from ouroboros import Ouroboros
from patch import distillation_loss
from qwen import Qwen

# A step fits if this many times its counted bytes are free. The rest is for fragmentation and the workspaces
# of cuBLAS and of the attention kernels.
MARGIN = 1.1

# ---- The decision ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepMemory:
    """What a training step needs on a GPU, MARGIN included, and what there is, in bytes."""

    needed: float  # without activation checkpointing
    needed_recomputed: float  # with it
    free: int

    @property
    def fits(self) -> bool:
        """Whether the step fits as it is."""
        return self.needed <= self.free

    @property
    def fits_recomputed(self) -> bool:
        """Whether it fits with activation checkpointing."""
        return self.needed_recomputed <= self.free


def memory_of_step(model: Ouroboros, options, free: int) -> StepMemory:
    """What a training step of this model needs with options.batch_size, .seq_len and .distill.

    model: on any device. It is not changed. free: the bytes that this process can have on the GPU, those
    included that the model takes already.
    """
    twin, full = meta_twin(model)
    step = (twin, options.batch_size, options.seq_len, full, options.distill)
    needed = MARGIN * training_peak(*step)
    recompute_activations(twin)
    needed_recomputed = MARGIN * training_peak(*step)
    return StepMemory(needed, needed_recomputed, free)


def meta_twin(model: Ouroboros) -> tuple[Ouroboros, Qwen]:
    """A looped model with the shapes and types of this one, and the full model that it is cut from, both on
    the meta device.
    """
    dtype = model.embed_tokens.weight.dtype
    with torch.device("meta"):
        full = Qwen(model.config).to(dtype).requires_grad_(False)
        twin = type(model)(full, **model.settings)
    return twin, full


# ---- Counting bytes --------------------------------------------------------------------------------------


def training_peak(
    model: Ouroboros, batch_size: int, seq_len: int, full: Qwen | None = None, distill=0.0
) -> int:
    """The bytes that are alive at the peak of a training step.

    model: on the meta device; on another one, the step is really computed, with the stand-in for attention.
    full, distill: the full model and the weight of distillation_loss. At weight 0 the full model is not in
    memory.
    """
    optimizer = torch.optim.AdamW(model.trained_parameters().values())
    ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=model.embed_tokens.weight.device)

    def training_step():
        if distill > 0:
            loss = distillation_loss(model, full, distill, ids, ids)
        else:
            loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()

    with attention_as_on_cuda():
        training_step()  # makes the moments, and gradients that stay, as between the passes of one step
        tensors = [*model.parameters(), *model.buffers(), ids]
        tensors += [p.grad for p in model.trained_parameters().values()]
        if distill > 0:
            tensors += full.parameters()
        for state in optimizer.state.values():
            tensors += state.values()
        with PeakMemory(tensors) as memory:
            training_step()
    return memory.peak


class PeakMemory(TorchDispatchMode):
    """A context that counts the bytes of all tensors alive in it, and the most that there were.

    tensors: those that are alive already.
    """

    def __init__(self, tensors):
        super().__init__()
        self.alive = set()  # the storages that are counted
        self.bytes_now = 0
        self.peak = 0
        self.add(tensors)

    def add(self, tensors):
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self.add_storage(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes_now)

    def add_storage(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive.add(key)
            self.bytes_now += storage.nbytes()
            weakref.finalize(storage, self.remove, key, storage.nbytes())

    def remove(self, key, size: int):
        self.alive.discard(key)
        self.bytes_now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.add(tree_leaves(output))
        return output


# ---- A stand-in for CUDA's attention ---------------------------------------------------------------------


@contextmanager
def attention_as_on_cuda():
    """A context in which the layers attend by the stand-in. The real attention is put back at its end."""
    real = qwen.attend
    qwen.attend = attend_as_on_cuda
    try:
        yield
    finally:
        qwen.attend = real


def attend_as_on_cuda(q, k, v):
    """What qwen.attend does on CUDA with q [B, H, T, D], k and v [B, H_kv, T, D]: [B, H, T, D] with
    undefined content.

    No fused kernel takes groups in float32, so k and v are repeated for each query head (fast.py).
    """
    if q.dtype == torch.float32:
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    return FusedAttention.apply(q, k, v)


class FusedAttention(torch.autograd.Function):
    """It keeps for the backward pass what a fused kernel keeps: its inputs, its output, and one number for
    each query, but no scores.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        log_sum_exp = q.new_empty(q.shape[:-1], dtype=torch.float32)  # [B, H, T]
        ctx.save_for_backward(q, k, v, y, log_sum_exp)
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
