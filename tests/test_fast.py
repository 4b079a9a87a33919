"""support/fast.py: what is faster or smaller computes the same as the plain form."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, loss_and_gradients, relative, small_model, small_patched, small_qwen, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from patch import distillation_loss
from qwen import Qwen, attend
from support import fast

# ---- The head and its loss -------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.02}


def head_inputs(dtype=torch.float64):
    """h, head, targets of which some do not count, and the full model's h; 700 positions are three chunks."""
    h = torch.randn(700, 32, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 997, (700,))
    targets[::7] = -100
    return h, torch.randn(997, 32, dtype=dtype), targets, torch.randn_like(h)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_loss_in_chunks_is_the_cross_entropy_of_all_logits_with_mixed_targets(dtype, weight):
    h, head, targets, full_h = head_inputs(dtype)
    loss = fast.head_cross_entropy(h, head, targets, full_h, weight)
    counts = targets != -100
    p_full = (full_h.double() @ head.double().T).softmax(-1)[counts]
    mixed = (1 - weight) * F.one_hot(targets[counts], 997) + weight * p_full
    expected = F.cross_entropy((h.double() @ head.double().T)[counts], mixed)
    assert relative(loss, expected) < TOLERANCE[dtype]
    (gradient,) = torch.autograd.grad(3 * loss, h)
    (expected_gradient,) = torch.autograd.grad(3 * expected, h)
    assert relative(gradient, expected_gradient) < TOLERANCE[dtype]


def test_a_trained_head_gets_its_gradient_too():
    qwen = Qwen(SMALL)  # the embedding is trained, and it is the head
    loss = qwen.loss(tokens(), tokens(seed=2))
    expected = F.cross_entropy(qwen(tokens()).flatten(0, 1), tokens(seed=2).flatten())
    assert torch.allclose(loss, expected)
    head = qwen.embed_tokens.weight
    assert relative(*torch.autograd.grad(loss, head), *torch.autograd.grad(expected, head)) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation inside the context returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_holds_all_logits_in_training_or_evaluation():
    qwen = small_qwen(config=replace(SMALL, vocab_size=5000))
    model = small_model(qwen=qwen)
    ids = tokens(2, 512)
    with LargestTensor() as largest:
        model.loss(ids, ids).backward()
        distillation_loss(model, qwen, 0.5, ids, ids).backward()
        with torch.no_grad():
            model.cut.loss(ids, ids)
    assert largest.elements < ids.numel() * 5000 / 2
    with LargestTensor() as largest:
        model(ids)  # what is looked for would be seen
    assert largest.elements == ids.numel() * 5000


@pytest.mark.parametrize("wrong", [-1, -99, 97, 10**6])
def test_a_target_that_is_no_token_is_an_index_error(wrong):
    targets = tokens()
    targets[1, 3] = wrong
    with pytest.raises(IndexError, match="neither -100 nor a token from 0 to 96"):
        small_model().loss(tokens(), targets)


# a mask, and numbers that are no tokens
@pytest.mark.parametrize("targets", [tokens(2, 11), tokens(12, 2), tokens().bool(), tokens().float()])
def test_targets_of_another_shape_or_type_are_a_value_error(targets):
    with pytest.raises(ValueError, match=f"targets have shape .* type {targets.dtype}"):
        small_model().loss(tokens(), targets)


# ---- Attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, S", [(12, 12), (1, 12), (5, 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [attend, fast.attend_with_products])
def test_each_form_of_attention_is_a_softmax_over_the_past(form, dtype, T, S):
    """Three query heads share a key-value head. The T queries are the newest of the S positions."""
    q, k, v = torch.randn(2, 6, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
    out = form(q.to(dtype), k.to(dtype), v.to(dtype))
    scores = q.double() @ k.double().repeat_interleave(3, 1).transpose(2, 3) / 8**0.5
    past = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    expected = scores.masked_fill(~past, -torch.inf).softmax(-1) @ v.double().repeat_interleave(3, 1)
    assert relative(out, expected) < TOLERANCE[dtype]


# ---- Checkpointing and torch.compile ---------------------------------------------------------------------


def bytes_kept_for_backward(model) -> int:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes), lambda x: x):
        model.loss(tokens(), tokens())
    return sum(sizes)


def assert_same_loss_and_gradients(model, plain, tolerance: float):
    loss, gradients = loss_and_gradients(model, tokens(), tokens(seed=2))
    expected_loss, expected_gradients = loss_and_gradients(plain, tokens(), tokens(seed=2))
    assert relative(loss, expected_loss) <= tolerance
    for name, gradient in expected_gradients.items():
        assert relative(gradients[name], gradient) <= tolerance, name


@pytest.mark.parametrize("make", [small_model, small_patched])
def test_recomputed_activations_take_less_memory_and_change_no_bit(make):
    plain, model = make(), make()
    fast.recompute_activations(model)
    assert bytes_kept_for_backward(model) < 0.1 * bytes_kept_for_backward(plain)
    assert_same_loss_and_gradients(model, plain, tolerance=0)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces each block whole and runs its graph without C++. Returns the graphs that ran."""
    calls = []

    def backend(graph, example_inputs):
        def call(*inputs):
            calls.append(graph)
            return graph.forward(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    yield calls
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.mark.parametrize("make", [small_model, small_patched])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_give_the_same_under_the_same_names(make, recompute, traced):
    plain, model = make(), make()
    fast.compile_blocks(model)
    if recompute:
        fast.recompute_activations(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert_same_loss_and_gradients(model, plain, tolerance=1e-4)


@torch.no_grad()
def test_every_block_runs_compiled_and_the_full_models_own_layers_too(traced):
    full = small_qwen()
    model = small_model(qwen=full)
    fast.compile_blocks(model, full)
    model(tokens())
    assert len(traced) == 2 + 3 + 2  # prelude, steps, coda
    full(tokens())
    assert len(traced) == 2 + 3 + 2 + 5  # the recurrent layer itself is in the compiled loop step


def test_a_compiler_that_fails_is_one_line_and_training_continues_without_it(traced, monkeypatch, capsys):
    def broken(graph, example_inputs):
        raise RuntimeError("there is no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    model = small_model()
    fast.compile_blocks(model)
    fast.run_compiler(model, model.loss, (tokens(), tokens()))
    assert "training continues without it: " in capsys.readouterr().out.splitlines()[-1]
    assert_same_loss_and_gradients(model, small_model(), tolerance=0)


@pytest.mark.parametrize("transform", [fast.recompute_activations, fast.compile_blocks])
def test_a_copy_has_weights_of_its_own(transform, traced):
    model = small_model()
    transform(model)
    copy = deepcopy(model)
    for p in copy.parameters():
        p.data *= 1.1
    for one in (model, copy):
        plain = small_model()
        plain.load_state_dict(one.state_dict())
        assert_same_loss_and_gradients(one, plain, tolerance=1e-4)


PARTS = [dict(), dict(gate=False), dict(step_norm=False, modulation="static"), dict(modulation="none")]


@pytest.mark.parametrize(
    "make", [small_patched, *(partial(small_model, **parts) for parts in PARTS)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_around_the_loss_changes_only_the_rounding(make, dtype):
    model = make(dtype)
    plain = model.loss(tokens(), tokens(seed=2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens(), tokens(seed=2))
        assert model.generate(tokens(), 2).shape == (2, 14)
    loss.backward()
    assert relative(loss, plain) < 5e-3
    assert all(p.grad.isfinite().all() for p in model.trained_parameters().values())
