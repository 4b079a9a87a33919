"""The same results sooner, or in less memory.

Nothing here is needed to understand the model. For each function, tests/test_fast.py holds that it gives
what the plain form gives.
"""

import ctypes
import sys

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from device import promote

# ---- The head and its loss -------------------------------------------------------------------------------


def head_cross_entropy(h, head, targets):
    """F.cross_entropy(h @ head.T, targets) without ever holding all logits.

    h [..., d] hidden states, head [V, d], targets [...] int64; a target of -100 does not count. Returns
    the mean over the targets that count, in nats, in float32. The logits of 2 x 2048 tokens over
    Qwen2.5's vocabulary would take 2.5 GB in float32, and their gradient as much again. Raises ValueError
    for targets of another shape, and IndexError for a target that is no token.
    """
    check_targets(h, head, targets)
    h = h.flatten(0, -2)  # [N, d]
    targets = targets.flatten()  # [N]
    if head.requires_grad:  # HeadLoss computes no gradient of the head
        return F.cross_entropy(promote(F.linear(h, head)), targets)
    return HeadLoss.apply(h, head, targets, None, 0.0)


def head_distillation(h, head, targets, full_h, weight: float):
    """The cross entropy with mixed targets: 1 - weight of the token that follows, weight of what the full
    model predicts.

    The prediction is softmax(full_h @ head.T), where full_h has the shape of h. The head must be frozen. All
    else is as in head_cross_entropy, and so is the result at weight 0, bit for bit.
    """
    check_targets(h, head, targets)
    return HeadLoss.apply(h.flatten(0, -2), head, targets.flatten(), full_h.flatten(0, -2), weight)


def check_targets(h, head, targets):
    """Raise what F.cross_entropy raises for targets that do not fit. HeadLoss itself would not notice."""
    if targets.shape != h.shape[:-1]:
        raise ValueError(f"targets have shape {list(targets.shape)}, and ids have {list(h.shape[:-1])}")
    is_token = (targets >= 0) & (targets < len(head))
    fits = (is_token | (targets == -100)).all()
    message = f"a target is neither -100 nor a token from 0 to {len(head) - 1}"
    if targets.is_cuda:
        torch._assert_async(fits, message)  # the program need not wait for the device
    elif not targets.is_meta and not fits:
        raise IndexError(message)


class HeadLoss(torch.autograd.Function):
    """Cross entropy through a frozen head, for a chunk of positions at a time.

    With logits z = W h and p = softmax(z), the loss of one position with target y is -log p_y. Its
    gradient is dz = p - onehot(y), hence dh = W^T (p - onehot(y)). Both need the chunk's logits, so the
    forward pass computes dh while the logits are there and keeps only that: [N, d] instead of [N, V].

    In distillation the target is q = (1 - a) onehot(y) + a p_full, with the full model's p_full and the
    weight a. The loss is -sum q log p, and its gradient is
    dz = p - q = (p - onehot(y)) - a (p_full - onehot(y)).
    """

    CHUNK = 256  # positions

    @staticmethod
    def forward(ctx, h, head, targets, full_h, a: float):
        counts = targets != -100
        loss = promote(h.new_zeros(()))
        weight = counts.to(loss.dtype) / counts.sum()  # of each position in the mean
        grad = torch.empty_like(h)

        for start in range(0, len(h), HeadLoss.CHUNK):
            chunk = slice(start, start + HeadLoss.CHUNK)
            log_p = promote(F.linear(h[chunk], head)).log_softmax(-1)  # [chunk, V]
            target = targets[chunk, None].clamp(min=0)  # [chunk, 1]
            log_p_target = log_p.gather(1, target)  # [chunk, 1]
            loss -= weight[chunk] @ log_p_target.squeeze(1) * (1 - a)
            p_full = None
            if a > 0:
                p_full = promote(F.linear(full_h[chunk], head)).softmax(-1)  # [chunk, V]
                loss -= weight[chunk] @ (p_full * log_p).sum(-1) * a

            if ctx.needs_input_grad[0]:
                dz = log_p.exp_()  # in place: p, in the memory of log p
                dz.scatter_(1, target, log_p_target.expm1())  # p_y - 1, precise even where p_y is nearly 1
                if a > 0:
                    dz.sub_(p_full, alpha=a)
                    dz.scatter_add_(1, target, torch.full_like(log_p_target, a))
                torch.mm(dz.to(h.dtype), head, out=grad[chunk])
                del dz
            del log_p, p_full  # before the next chunk needs the memory

        ctx.save_for_backward(grad, weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad, weight = ctx.saved_tensors
        return (grad * (weight * grad_loss)[:, None]).to(grad.dtype), None, None, None, None


# ---- Attention -------------------------------------------------------------------------------------------


def fused_attention_fits(q, keys: int) -> bool:
    """Whether F.scaled_dot_product_attention with grouped heads is the best form for these queries.

    It is not on MPS, where it aborts or gives wrong results; not for short bfloat16 attention on a CPU,
    where matrix products are three times as fast; and not on CUDA in float32 or with a mask, where no fused
    kernel takes groups.
    """
    if q.is_mps:
        return False
    if q.is_cpu:
        return not (q.dtype == torch.bfloat16 and keys <= 512)
    if q.is_cuda:
        needs_mask = 1 < q.shape[2] < keys  # see attend in qwen.py
        return q.dtype != torch.float32 and not needs_mask
    return True


def attend_without_groups(q, k, v):
    """The attention of qwen.attend in the form that suits the device better than the grouped kernel.

    q [B, H, T, D], k and v [B, H_kv, S, D] -> [B, H, T, D]
    """
    if not q.is_cuda:
        return attend_with_products(q, k, v)
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    T, S = q.shape[2], k.shape[2]
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


# ---- The Controller --------------------------------------------------------------------------------------


def linear_of_joined(linear, p, e):
    """linear([p; e]) for an e that is the same at every position. p [B, T, n], e [m] -> [B, T, out]

    W [p; e] + b = W_p p + (W_e e + b): the second term is computed once and serves as a bias.
    """
    W_p, W_e = linear.weight.split([p.shape[-1], e.shape[0]], dim=1)
    bias = linear.bias + W_e @ e
    return F.linear(p, W_p.to(p.dtype), bias.to(p.dtype))


# ---- Singular vectors ------------------------------------------------------------------------------------


def top_right_singular_vectors(R, rank: int):
    """The first `rank` rows of V^T in R = U S V^T, [rank, in], for R [out, in].

    The eigenvectors of R^T R are the right singular vectors of R, those of R R^T the left ones u, and
    R^T u = s v. The smaller of the two matrices is decomposed: for the seven projections of a 3B model that
    takes seconds, where full SVDs take minutes.
    """
    device = R.device
    if R.is_mps:
        R = R.cpu()  # most versions of torch have no eigh for MPS
    out_features, in_features = R.shape
    tall = out_features >= in_features
    gram = R.T @ R if tall else R @ R.T
    _, vectors = torch.linalg.eigh(gram)  # in ascending order of the eigenvalues
    top = vectors[:, -rank:].flip(1)  # [in or out, rank]
    if tall:
        A = top.T
    else:
        A = torch.linalg.qr(R.T @ top).Q.T  # the columns s v are orthogonal and in order: QR normalises them
    return A.contiguous().to(device)


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
    """Activation checkpointing: keep only each block's input for the backward pass, and run the block
    again there.

    A training step of Ouroboros then takes about a third more time and far less memory.
    """

    def recomputed(block):
        def call(*inputs):
            if not torch.is_grad_enabled():
                return block(*inputs)
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

        return call

    replace_blocks(model, recomputed)


# ---- torch.compile ---------------------------------------------------------------------------------------


def compile_blocks(model, full=None, **options):
    """torch.compile each layer of prelude and coda, and the loop step. No name in a checkpoint changes.

    full: a full model that is used beside this one; the layers that it has alone are compiled too.
    """

    def compiled(block):
        return torch.compile(block, **options)

    replace_blocks(model, compiled)
    if full is not None:
        shared = set(model.modules())
        for layer in full.layers:
            if layer not in shared:
                layer.forward = compiled(layer.forward)
    # the shapes of generation change with each token: run it as it is written
    model.generate = torch.compiler.set_stance("force_eager")(model.generate)


def run_compiler(model, loss_of, batch):
    """Let the compiler work in a first pass over a batch (ids, targets), or say in a line why it cannot.

    loss_of(ids, targets): the loss that will be minimised.
    """
    print("\ncompiling, which takes a minute or two", flush=True)
    try:
        loss_of(*batch).backward()
    except torch._dynamo.exc.TorchDynamoException as error:  # also what the compiler behind it raises
        torch.compiler.set_stance("force_eager")
        reason = (str(error) or repr(error)).splitlines()[0]
        print(f"torch.compile does not work here, training continues without it: {reason}")
    model.zero_grad()


def replace_blocks(model, transform):
    """Put transform(f) in the place of each function f that runs one block of a forward pass."""
    for layer in [*model.prelude, *model.coda]:
        layer.forward = transform(layer.forward)
    model.loop_step = transform(model.loop_step)
