"""The same results sooner, or in less memory. Nothing here is needed to understand the model.

tests/test_fast.py checks that each function gives what the plain form gives.
"""

import ctypes
import sys
from contextlib import nullcontext
from types import MethodType

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def promote(x):
    """x in float32, or unchanged if it is float64 already. bfloat16 is too coarse for long sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- The head and its loss -------------------------------------------------------------------------------


def head_cross_entropy(h, head, targets, full_h=None, weight=0.0):
    """F.cross_entropy(h @ head.T, targets) without ever holding all logits.

    h [..., d] hidden states, head [V, d], targets [...] int64; a target of -100 does not count. Returns the
    mean over the targets that count, in nats, in float32. The logits of 2 x 2048 tokens over Qwen2.5's
    vocabulary would take 2.5 GB in float32, and their gradient as much again.

    full_h, weight: with distillation, the targets are mixed: 1 - weight of the token that follows, and weight
    of what the full model predicts, softmax(full_h @ head.T).

    Raises ValueError for targets of another shape or type, and IndexError for a target that is no token.
    """
    if targets.shape != h.shape[:-1] or targets.dtype != torch.int64:
        given = f"shape {list(targets.shape)} and type {targets.dtype}"
        raise ValueError(f"targets have {given}; they need {list(h.shape[:-1])}, as ids have, and int64")
    is_token = (targets >= 0) & (targets < len(head))
    fits = (is_token | (targets == -100)).all()
    message = f"a target is neither -100 nor a token from 0 to {len(head) - 1}"
    if targets.is_cuda:
        torch._assert_async(fits, message)  # the program need not wait for the device
    elif not fits:
        raise IndexError(message)

    h = h.flatten(0, -2)  # [N, d]
    targets = targets.flatten()  # [N]
    if head.requires_grad:  # HeadLoss computes no gradient of the head
        assert full_h is None, "distillation needs a frozen head"
        return F.cross_entropy(promote(F.linear(h, head)), targets)
    if full_h is not None:
        full_h = full_h.flatten(0, -2)
    return HeadLoss.apply(h, head, targets, full_h, weight)


HEAD_CHUNK = {"cpu": 256, "cuda": 1024}  # positions; a large GPU needs large products


class HeadLoss(torch.autograd.Function):
    """Cross entropy through a frozen head, for a chunk of positions at a time.

    With logits z = W h and p = softmax(z), the loss of one position with target y is -log p_y. Its gradient
    is dz = p - onehot(y), hence dh = W^T (p - onehot(y)). Both need the chunk's logits, so the forward pass
    computes dh while the logits are there and keeps only that: [N, d] instead of [N, V].

    In distillation the target is q = (1 - a) onehot(y) + a p_full, with the full model's p_full and the
    weight a. The loss is -sum q log p, and its gradient is dz = p - q = (p - onehot(y)) - a (p_full -
    onehot(y)).
    """

    @staticmethod
    def forward(ctx, h, head, targets, full_h, a: float):
        size = HEAD_CHUNK.get(h.device.type, 256)
        counted = targets != -100
        loss = promote(h.new_zeros(()))
        share = counted.to(loss.dtype) / counted.sum()  # of each position in the mean
        grad = torch.empty_like(h)

        for start in range(0, len(h), size):
            chunk = slice(start, start + size)
            log_p = precise(F.linear(h[chunk], head)).log_softmax(-1, dtype=loss.dtype)  # [chunk, V]
            target = targets[chunk, None].clamp(min=0)  # [chunk, 1]
            log_p_target = log_p.gather(1, target)  # [chunk, 1]
            loss -= (share[chunk] * log_p_target.squeeze(1)).sum() * (1 - a)
            if a > 0:
                p_full = precise(F.linear(full_h[chunk], head)).softmax(-1, dtype=loss.dtype)  # [chunk, V]
                loss -= (share[chunk] * (p_full * log_p).sum(-1)).sum() * a

            if ctx.needs_input_grad[0]:
                dz = log_p.exp_()  # in place: p, in the memory of log p
                dz.scatter_(1, target, log_p_target.expm1())  # p_y - 1, precise even where p_y is nearly 1
                if a > 0:
                    dz.sub_(p_full, alpha=a)
                    dz.scatter_add_(1, target, torch.full_like(log_p_target, a))
                torch.mm(dz.to(h.dtype), head, out=grad[chunk])
                del dz
            log_p = p_full = None  # before the next chunk needs the memory

        ctx.save_for_backward(grad, share)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad, share = ctx.saved_tensors
        return (grad * (share * grad_loss)[:, None]).to(grad.dtype), None, None, None, None


def precise(logits):
    """Logits for a softmax in float32. CUDA's kernels convert what they read, so there is no copy."""
    return logits if logits.is_cuda else promote(logits)


# ---- Attention -------------------------------------------------------------------------------------------

# Some versions of cuDNN's attention give wrong values where there are few key-value heads (pytorch issue
# 193893), and each new length costs it time.
torch.backends.cuda.enable_cudnn_sdp(False)


def grouped_attention_fits(q, keys: int) -> bool:
    """Whether F.scaled_dot_product_attention with grouped heads is the best form for these queries.

    It is not on MPS, where it aborts or gives wrong results; not for short bfloat16 attention on a CPU, where
    matrix products are three times as fast; and not on CUDA in float32 or with a mask, where no fused kernel
    takes groups.
    """
    if q.is_mps:
        return False
    if q.is_cpu:
        return not (q.dtype == torch.bfloat16 and keys <= 512)
    if q.is_cuda:
        needs_mask = 1 < q.shape[2] < keys
        return q.dtype != torch.float32 and not needs_mask
    return True


def attend_without_groups(q, k, v):
    """qwen.attend in another form. q [B, H, T, D], k and v [B, H_kv, S, D] -> [B, H, T, D]"""
    T, S = q.shape[2], k.shape[2]
    if not q.is_cuda:
        return attend_with_products(q, k, v)
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask)


def attend_with_products(q, k, v):
    """Attention as two matrix products, the query heads of a group side by side in one product."""
    B, H, T, D = q.shape
    groups, S = k.shape[1:3]
    scores = (q * D**-0.5).reshape(B, groups, -1, D) @ k.transpose(2, 3)  # [B, H_kv, H / H_kv * T, S]

    scores = scores.view(B, H, T, S)
    if T > 1:
        future = torch.full((T, S), -torch.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
        scores = scores + future
    weights = scores.softmax(-1)

    return (weights.view(B, groups, -1, S) @ v).view(B, H, T, D)


# ---- Memory ----------------------------------------------------------------------------------------------


def keep_freed_memory():
    """Let the process keep the memory of freed tensors, where the C library is glibc.

    Otherwise glibc gives large blocks back to the kernel, which must clear them again for the next tensor.
    That takes up to half of the time of a training step on a CPU.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks get no mapping of their own
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # the end of the heap is never given back


def recompute_activations(model):
    """Activation checkpointing: keep only each block's input for the backward pass, and run the block again
    there.

    A training step of Ouroboros then takes about a third more time and far less memory.
    """

    def recomputed(block):
        def call(module, *inputs):
            if not torch.is_grad_enabled():
                return block(module, *inputs)
            return checkpoint(block, module, *inputs, use_reentrant=False, preserve_rng_state=False)

        return call

    replace_blocks(model, recomputed)


# ---- torch.compile ---------------------------------------------------------------------------------------


def compile_blocks(model, full=None):
    """torch.compile each layer of prelude and coda, and the loop step. No name in a checkpoint changes.

    full: a full model that is used beside this one; the layers that it has alone are compiled too.
    """
    replace_blocks(model, torch.compile)
    if full is not None:
        shared = set(model.modules())
        for layer in full.layers:
            if layer not in shared:
                layer.forward = MethodType(torch.compile(layer.forward.__func__), layer)


def eager():
    """A context in which compiled functions run as they are written. It imports no compiler by itself."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def run_compiler(model, loss_of, batch):
    """Let the compiler work in a first pass over a batch (ids, targets), or say in a line why it cannot.

    loss_of(ids, targets): the loss that will be minimised.
    """
    print("compiling, which takes a minute or two", flush=True)
    try:
        loss_of(*batch).backward()
    except torch._dynamo.exc.TorchDynamoException as error:  # also what the compiler behind it raises
        torch.compiler.set_stance("force_eager")
        reason = " ".join(str(error).split())[:300] or repr(error)
        print(f"torch.compile does not work here, training continues without it: {reason}")
    model.zero_grad()


def replace_blocks(model, transform):
    """Put transform(f) in the place of each function f that runs one block of a forward pass.

    They stay methods, of this object and, after copy.deepcopy, of the copy.
    """
    for layer in [*model.prelude, *model.coda]:
        layer.forward = MethodType(transform(layer.forward.__func__), layer)
    model.loop_step = MethodType(transform(model.loop_step.__func__), model)
