"""fast.py: what is faster or smaller computes the same as the plain form."""

import mmap
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, SETTINGS, SMALL, loss_and_gradients, relative, small_model, small_qwen, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast import (
    HeadLoss,
    attend_with_products,
    attend_without_groups,
    compile_blocks,
    head_cross_entropy,
    head_distillation,
    linear_of_joined,
    recompute_activations,
    top_right_singular_vectors,
)
from ouroboros import Controller, Ouroboros
from patch import distillation_loss
from qwen import Qwen, attend

# ---- The head and its loss -------------------------------------------------------------------------------


def head_inputs():
    """h [N, d] with gradient, head [V, d], targets [N] of which every seventh does not count."""
    torch.manual_seed(0)
    positions = 2 * HeadLoss.CHUNK + 188
    h = torch.randn(positions, 32, requires_grad=True)
    head = torch.randn(997, 32)
    targets = torch.randint(0, 997, (positions,))
    targets[::7] = -100
    return h, head, targets


def test_the_loss_in_chunks_is_the_cross_entropy_of_all_logits():
    h, head, targets = head_inputs()
    expected = F.cross_entropy(h @ head.T, targets)
    loss = head_cross_entropy(h, head, targets)
    assert loss.grad_fn.name() == "HeadLossBackward"  # and not the plain form itself
    assert abs(loss - expected) < 1e-6 * expected

    (expected_gradient,) = torch.autograd.grad(3 * expected, h)
    (gradient,) = torch.autograd.grad(3 * loss, h)
    assert relative(gradient, expected_gradient) < 1e-6


def test_the_loss_in_chunks_of_a_bfloat16_model_is_close_to_that_in_float32():
    h, head, targets = head_inputs()
    expected = F.cross_entropy(h @ head.T, targets)
    (expected_gradient,) = torch.autograd.grad(expected, h)

    rounded = h.detach().bfloat16().requires_grad_(True)
    loss = head_cross_entropy(rounded, head.bfloat16(), targets)
    (gradient,) = torch.autograd.grad(loss, rounded)
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert abs(loss - expected) < 0.01 * expected
    assert relative(gradient.float(), expected_gradient) < 0.02


def test_the_loss_of_a_trained_head_gives_the_head_its_gradient_too():
    h, head, targets = head_inputs()
    head.requires_grad_(True)
    loss = head_cross_entropy(h, head, targets)
    expected = F.cross_entropy(h @ head.T, targets)
    assert torch.allclose(loss, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(loss, (h, head)), torch.autograd.grad(expected, (h, head))
    ):
        assert relative(gradient, wanted) < 1e-6

    qwen = Qwen(SMALL)  # every weight is trained
    qwen.loss(tokens(), tokens(seed=2)).backward()
    for name, p in qwen.named_parameters():
        assert p.grad.abs().sum() > 0, name


def distillation_inputs():
    """What head_inputs gives in float64, and the full model's hidden states [N, d]."""
    h, head, targets = head_inputs()
    full_h = torch.randn_like(h, dtype=torch.float64)
    return h.detach().double().requires_grad_(True), head.double(), targets, full_h


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_distillation_in_chunks_is_the_cross_entropy_with_mixed_targets(weight):
    h, head, targets, full_h = distillation_inputs()
    counts = targets != -100
    log_p = (h @ head.T).log_softmax(-1)[counts]
    p_full = (full_h @ head.T).softmax(-1)[counts]
    onehot = F.one_hot(targets[counts], len(head))
    expected = -((1 - weight) * onehot * log_p + weight * p_full * log_p).sum(-1).mean()
    loss = head_distillation(h, head, targets, full_h, weight)
    assert torch.allclose(loss, expected, rtol=1e-12)

    (expected_gradient,) = torch.autograd.grad(3 * expected, h, retain_graph=True)
    (gradient,) = torch.autograd.grad(3 * loss, h)
    assert relative(gradient, expected_gradient) < 1e-10
    if weight == 1.0:  # only then is the gradient that of the Kullback-Leibler divergence
        divergence = F.kl_div(log_p, p_full, reduction="batchmean")
        (expected_gradient,) = torch.autograd.grad(3 * divergence, h)
        assert relative(gradient, expected_gradient) < 1e-10


def test_distillation_at_weight_0_is_the_loss_of_the_text_bit_for_bit():
    h, head, targets = head_inputs()
    for dtype in (torch.float32, torch.bfloat16):
        x = h.detach().to(dtype).requires_grad_(True)
        loss = head_cross_entropy(x, head.to(dtype), targets)
        distilled = head_distillation(x, head.to(dtype), targets, torch.randn_like(x), 0.0)
        assert torch.equal(distilled, loss)
        assert torch.equal(torch.autograd.grad(distilled, x)[0], torch.autograd.grad(loss, x)[0])


def test_a_model_that_predicts_what_the_full_one_predicts_has_nothing_to_learn_from_it():
    h, head, targets = head_inputs()
    loss = head_distillation(h, head, targets, h.detach(), 1.0)
    (gradient,) = torch.autograd.grad(loss, h)
    assert gradient.abs().max() < 1e-8


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation inside the context returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_no_tensor_holds_all_logits_in_training_or_evaluation():
    qwen = small_qwen(config=replace(SMALL, vocab_size=5000))
    model = Ouroboros(qwen, prelude=2, recurrent=3, coda=2, rank=4, depth=2)
    ids = tokens(2, 512)
    cut = model.cut
    with LargestTensor() as largest:
        model.loss(ids, ids).backward()
        with torch.no_grad():
            model.loss(ids, ids)
            cut.loss(ids, ids)
            qwen.loss(ids, ids)
        distillation_loss(model, qwen, 0.5, ids, ids).backward()
    assert largest.elements < ids.numel() * 5000 / 2

    with LargestTensor() as largest:
        model(ids)  # what is looked for would be seen
    assert largest.elements == ids.numel() * 5000


@torch.no_grad()
def test_the_loss_refuses_the_targets_that_cross_entropy_refuses():
    model = small_model()
    ids = tokens()
    for wrong in (-1, -99, 97, 10**6):
        targets = ids.clone()
        targets[1, 3] = wrong
        with pytest.raises(IndexError, match="neither -100 nor a token from 0 to 96"):
            model.loss(ids, targets)
    for targets in (ids[:, 1:], ids.flatten(), ids.T, ids[:1]):
        with pytest.raises(ValueError, match="targets have shape"):
            model.loss(ids, targets)


# ---- Attention -------------------------------------------------------------------------------------------


def heads(T: int, S: int, dtype=torch.float64):
    """q [2, 6, T, 8], k and v [2, 2, S, 8]: three query heads share a key-value head."""
    torch.manual_seed(0)
    q = torch.randn(2, 6, T, 8, dtype=dtype)
    k = torch.randn(2, 2, S, 8, dtype=dtype)
    v = torch.randn(2, 2, S, 8, dtype=dtype)
    return q, k, v


def fused(q, k, v):
    """F.scaled_dot_product_attention, where the T queries are the newest of the S positions."""
    T, S = q.shape[2], k.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@pytest.mark.parametrize("T, S", [(12, 12), (1, 12), (5, 12)])
@pytest.mark.parametrize("form", [attend, attend_with_products, attend_without_groups])
def test_each_form_of_attention_is_the_fused_one(form, T, S):
    q, k, v = heads(T, S)
    assert torch.allclose(form(q, k, v), fused(q, k, v), atol=1e-12)


@pytest.mark.parametrize("T, S", [(12, 12), (1, 12), (5, 12)])
def test_short_attention_in_bfloat16_on_a_cpu_is_close_to_that_in_float32(T, S):
    q, k, v = heads(T, S, torch.float32)
    rounded = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded.float(), fused(q, k, v)) < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, S", [(12, 12), (1, 12), (5, 12)])
def test_attention_on_cuda_is_that_of_the_cpu(T, S, dtype):
    q, k, v = heads(T, S, torch.float32)
    expected = fused(q, k, v)
    for form in (attend, attend_without_groups):
        out = form(q.to("cuda", dtype), k.to("cuda", dtype), v.to("cuda", dtype))
        assert relative(out.float().cpu(), expected) < 0.01


# ---- Singular vectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (8, 40), (32, 32)], ids=str)
def test_the_top_right_singular_vectors_are_those_of_the_svd(shape):
    generator = torch.Generator().manual_seed(0)
    R = torch.randn(shape, generator=generator, dtype=torch.float64)
    _, S, Vh = torch.linalg.svd(R, full_matrices=False)
    A = top_right_singular_vectors(R, 8)
    assert A.shape == (8, shape[1])
    assert torch.allclose(A @ A.T, torch.eye(8, dtype=torch.float64), atol=1e-10)
    # R a_i has the length of the i-th singular value: the order is the SVD's
    assert torch.allclose((R @ A.T).norm(dim=0), S[:8], rtol=1e-8)
    # the space is the SVD's, and with it the captured energy
    assert torch.allclose(A.T @ A, Vh[:8].T @ Vh[:8], atol=1e-8)
    assert torch.allclose((R @ A.T).square().sum(), S[:8].square().sum())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_a_matrix_of_lower_rank_keeps_all_its_energy(shape):
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = shape
    R = torch.randn(out_features, 3, generator=generator) @ torch.randn(3, in_features, generator=generator)
    _, S, Vh = torch.linalg.svd(R, full_matrices=False)
    A = top_right_singular_vectors(R, 8)
    assert torch.allclose(A @ A.T, torch.eye(8), atol=1e-4)
    assert torch.allclose((R @ A.T).norm(dim=0)[:3], S[:3], rtol=1e-4)
    assert torch.allclose(A[:3].T @ A[:3], Vh[:3].T @ Vh[:3], atol=1e-4)
    assert torch.allclose(R @ A.T @ A, R, atol=1e-3)


# ---- The Controller's join -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5, 64), (2, 1, 64)], ids=str)
def test_the_controllers_join_is_that_of_the_concatenation(shape):
    torch.manual_seed(0)
    controller = Controller(d=48, rank=4, s=32).double()
    p = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    e = controller.step_embedding.weight[5]
    assert p.shape[-1] == 2 * len(e)

    expected = controller.join(torch.cat([p, e.expand(*shape[:-1], -1)], dim=-1))
    joined = linear_of_joined(controller.join, p, e)
    assert torch.allclose(joined, expected, atol=1e-12)

    inputs = (p, controller.step_embedding.weight, controller.join.weight, controller.join.bias)
    weighting = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weighting).sum(), inputs)
    gradients = torch.autograd.grad((joined * weighting).sum(), inputs)
    for gradient, wanted in zip(gradients, expected_gradients):
        assert torch.allclose(gradient, wanted, atol=1e-12)


# ---- Memory ----------------------------------------------------------------------------------------------


def bytes_kept_for_backward(model, ids) -> int:
    """The size of all tensors that autograd keeps in a forward pass."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    def give_back(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        model.loss(ids, ids)
    return sum(sizes)


@pytest.mark.parametrize("name", ["whole", "patched"])
def test_recomputed_activations_take_less_memory_and_change_no_bit(name):
    model = small_model(**SETTINGS[name])
    ids = tokens()
    logits = model(ids)
    all_kept = bytes_kept_for_backward(model, ids)
    loss, gradients = loss_and_gradients(model, ids, ids)

    recompute_activations(model)
    assert bytes_kept_for_backward(model, ids) < 0.1 * all_kept
    loss_again, gradients_again = loss_and_gradients(model, ids, ids)
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    for part, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[part]), part
    with torch.no_grad():
        assert torch.equal(model(ids), logits)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_program_keeps_freed_memory_instead_of_clearing_it_again():
    code = """if True:
        import resource, torch
        from fast import keep_freed_memory
        keep_freed_memory()
        faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
        for _ in range(10):  # the heap finds its shape within a few
            for size in (2**20, 2**22, 2**24):
                torch.ones(size)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(min(after - before for before, after in zip(faults, faults[1:])))"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    pages = 64 * 2**20 / mmap.PAGESIZE
    assert int(result.stdout) < pages / 100


# ---- torch.compile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["whole", "patched"])
def test_compiled_blocks_are_traced_whole_give_the_same_and_keep_their_names(name, recompute):
    model = small_model(**SETTINGS[name])
    ids = tokens()
    targets = tokens(seed=2)
    names = model.state_dict().keys()
    loss, gradients = loss_and_gradients(model, ids, targets)
    generated = model.generate(ids, 5)

    compile_blocks(model, backend="aot_eager", fullgraph=True)
    if recompute:
        recompute_activations(model)
    assert model.state_dict().keys() == names
    loss_compiled, gradients_compiled = loss_and_gradients(model, ids, targets)
    assert abs(loss_compiled - loss) < 1e-5 * loss
    for part, gradient in gradients.items():
        assert relative(gradients_compiled[part], gradient) < 1e-4, part
    assert torch.equal(model.generate(ids, 5), generated)


def test_every_block_of_a_forward_pass_runs_compiled():
    model = small_model(depth=3)
    calls = []

    def backend(graph, example_inputs):
        def call(*inputs):
            calls.append(graph)
            return graph.forward(*inputs)

        return call

    compile_blocks(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        model(tokens())
    assert len(calls) == len(model.prelude) + 3 + len(model.coda)


class Block(nn.Module):
    """A block that cannot be traced whole."""

    def forward(self, h, *_):
        print("a graph break")
        return h


def test_a_block_that_cannot_be_traced_whole_is_an_error_with_fullgraph():
    """So that the tests above would see a graph break."""
    model = small_model()
    model.coda[0] = Block()
    compile_blocks(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(tokens())
