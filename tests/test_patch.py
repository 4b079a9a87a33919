"""patch.py: the equations of the seams, the opening and the adapters, and distillation."""

import pytest
import torch
from helpers import SMALL, relative, small_model, small_patched, small_qwen, tokens

import patch
from ouroboros import Ouroboros
from qwen import rotary_at
from support.files import UserError

MODULATIONS = ["none", "static", "controller"]


@pytest.mark.parametrize("num_layers, cut", [(12, (1, 5, 5)), (24, (2, 10, 8)), (30, (3, 12, 11))])
def test_the_cut_keeps_as_many_layers_as_the_paper_and_fewer_of_the_first_ones(num_layers, cut):
    assert patch.patch_cut(num_layers) == cut


# ---- The forward pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_new_model_is_exactly_the_cut_model(modulation):
    model = small_patched(randomise=False, modulation=modulation, depth=4)
    assert torch.equal(model(tokens()), model.cut(tokens()))


def write_into_weights(layer, adapter: patch.Adapter):
    """Each norm's weight times 1 + c, and each W_k + B'_k A'_k."""
    layer.input_layernorm.weight *= 1 + adapter.norm_change[0]
    layer.post_attention_layernorm.weight *= 1 + adapter.norm_change[1]
    for k, projection in layer.projections().items():
        projection.weight += adapter.B[k].weight @ adapter.A[k].weight


@torch.no_grad()
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_the_patched_model_is_what_its_equations_say(modulation):
    """h + P_in h; h + o_t (Layer(h; W_k + (alpha/r) B_k diag(m_t,k) A_k) - h); h + P_out h; all adapted."""
    model = small_patched(torch.float64, modulation=modulation, depth=4)
    ids = tokens()
    rotary = rotary_at(SMALL, 0, ids.shape[1], "cpu")
    layers = small_qwen(dtype=torch.float64).layers
    kept = [layers[i] for i in (0, 1, 3, 4, 5)]
    adapters = [*model.prelude_adapters, model.recurrent_adapter, *model.coda_adapters]
    for layer, adapter in zip(kept, adapters, strict=True):
        write_into_weights(layer, adapter)

    def modulated(t, h):
        """W_k x + (alpha/r) B_k diag(m_t,k) A_k x', where x' is the input that the norm's change gives."""
        if modulation == "none":
            return {}
        m = model.controller(t) if modulation == "static" else model.controller(model.pool(h), t)

        def project(projection, x, k):
            return projection(x) + 16.0 / 4 * ((x @ model.lora[k].A.T) * m[k]) @ model.lora[k].B.T

        return {"project": project}

    h = layers[1](layers[0](model.embed_tokens(ids), rotary), rotary)
    h = h + h @ model.seam_in.P.weight.T
    for t in range(4):
        h_new = layers[3](h, rotary, **modulated(t, h))
        h = h + model.opening[t] * (h_new - h)
    h = h + h @ model.seam_out.P.weight.T
    h = layers[5](layers[4](h, rotary), rotary)
    assert torch.allclose(model(ids), model.norm(h) @ model.head_weight.T, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_the_cache_changes_no_logits(modulation):
    model = small_patched(modulation=modulation)
    cache = model.new_cache(depth=5)
    logits = [model(piece, cache=cache, depth=5) for piece in tokens().split([4, 1, 1, 6], dim=1)]
    assert torch.allclose(torch.cat(logits, dim=1), model(tokens(), depth=5), atol=1e-5)


# ---- The seams in closed form ----------------------------------------------------------------------------


def states_and_targets(size=400):
    """h and y [size, 8] in float64: y is not linear in h, and the states are of very different sizes."""
    h = torch.randn(size, 8, dtype=torch.float64) * torch.logspace(-1, 2, size, dtype=torch.float64)[:, None]
    y = h.flip(1) + h.sin() + torch.randn(size, 8, dtype=torch.float64)
    return h, y


@pytest.mark.parametrize("strength", patch.RIDGE_STRENGTHS)
def test_the_seam_is_the_minimum_of_its_objective(strength):
    """The sum over the tokens of w |y - (h + P h)|^2 + ridge |P|^2, with w = 1 / mean(y^2)."""
    h, y = states_and_targets()
    w = 1 / y.square().mean(1)
    ridge = strength * (w * h.square().sum(1)).sum() / 8
    P = patch.ridge_regression(h, y, strength).requires_grad_(True)

    def objective(P):
        return (w * (y - h - h @ P.T).square().sum(1)).sum() + ridge * P.square().sum()

    smallest = objective(P)
    (gradient,) = torch.autograd.grad(smallest, P)
    assert gradient.abs().max() < 1e-8 * ridge
    for _ in range(10):
        assert objective(P + 1e-3 * torch.randn_like(P)) > smallest


@torch.no_grad()
@pytest.mark.parametrize("modulation", ["none", "controller"])
def test_each_seam_is_fitted_to_the_full_models_state_and_the_loop_stays_one_step(modulation):
    full = small_qwen(dtype=torch.float64)
    model = small_patched(torch.float64, randomise=False, depth=3, modulation=modulation)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokens(B=40)
    patch.mend_seams(model, full, ids, batch_size=7)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("seam_")), name

    rotary = rotary_at(SMALL, 0, 12, "cpu")
    states = [full.embed_tokens(ids)]  # states[i] is the state before layer i
    for layer in full.layers:
        states.append(layer(states[-1], rotary))
    assert relative(model.seam_in.P.weight, patch.fitted_seam(states[2], states[3])) < 1e-6
    h = full.layers[3](model.seam_in(states[2]), rotary)
    assert relative(model.seam_out.P.weight, patch.fitted_seam(h, states[4])) < 1e-6
    assert torch.equal(model(ids), model(ids, depth=1))


def test_mended_seams_bring_a_model_closer_to_the_full_one_on_other_text():
    full = small_qwen()
    model = small_patched(randomise=False)
    patch.mend_seams(model, full, tokens(B=40), batch_size=8)
    unseen = tokens(B=20, seed=2)
    assert relative(model(unseen), full(unseen)) < 0.9 * relative(model.cut(unseen), full(unseen))


# ---- Files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_model, small_patched])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_saved_model_comes_back_bit_for_bit_and_without_an_svd(make, modulation, tmp_path, monkeypatch):
    model = make(modulation=modulation)
    model.norm.requires_grad_(True)  # of the pretrained model, and trained here
    model.norm.weight.data *= 2
    model.save(tmp_path)
    monkeypatch.setattr("ouroboros.svd_bases", lambda *_: pytest.fail("the bases were computed again"))
    base = small_qwen()
    again = type(model).load(tmp_path, base=base)
    assert again.settings == model.settings
    assert torch.equal(again(tokens()), model(tokens()))
    assert again.trained_parameters().keys() == model.trained_parameters().keys()
    assert torch.equal(base(tokens()), small_qwen()(tokens()))


def test_a_model_on_another_base_or_of_another_class_is_refused(tmp_path):
    small_patched().save(tmp_path)
    with pytest.raises(UserError, match="is not the model on which"):
        patch.Patched.load(tmp_path, base=small_qwen(seed=1))
    with pytest.raises(UserError, match="holds a Patched"):
        Ouroboros.load(tmp_path, base=small_qwen())
