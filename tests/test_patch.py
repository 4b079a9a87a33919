"""patch.py: its equations, its start from the cut model, and runs of either class that come back."""

from copy import deepcopy

import pytest
import torch
from helpers import (
    SETTINGS,
    SMALL,
    folder_of,
    loss_and_gradients,
    move_trained_weights,
    relative,
    small_model,
    small_patched,
    small_qwen,
    tokens,
)
from torch import nn

from checkpoint import read_checkpoint, write_checkpoint
from files import UserError
from ouroboros import Ouroboros, checked_cut, default_cut
from patch import (
    RIDGE_STRENGTHS,
    Adapter,
    NoAdapter,
    Patched,
    Seam,
    distillation_loss,
    fitted_seam,
    full_model_of,
    load_run,
    mend_seams,
    patch_cut,
    ridge_regression,
)
from qwen import Qwen, rotary_at

TRAIN_CODA = ("none", "norms", "lora", "all")

# ---- The cut ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", range(4, 100))
def test_the_patch_keeps_as_many_layers_as_the_paper_fewer_of_them_at_the_start(num_layers):
    first, _, last = default_cut(num_layers)
    cut = patch_cut(num_layers)
    assert cut["prelude"] + cut["coda"] == first + last
    assert cut["prelude"] <= first
    assert checked_cut(num_layers, **cut) == tuple(cut.values())


def test_the_cut_of_the_patch_is_a_default():
    assert patch_cut(30) == {"prelude": 3, "recurrent": 12, "coda": 11}
    assert patch_cut(12, recurrent=7) == {"prelude": 1, "recurrent": 7, "coda": 5}
    qwen = small_qwen()
    assert len(Patched(qwen, rank=4).prelude) == 1
    assert len(Patched(qwen, rank=4, prelude=2).prelude) == 2
    settings = Patched(qwen, rank=4, seams=False).settings
    assert (settings["prelude"], settings["recurrent"], settings["coda"]) == default_cut(6)


# ---- The start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("train_coda", TRAIN_CODA)
def test_training_starts_exactly_from_the_cut_model(depth, train_coda):
    """P = 0, o_0 = 1, o_t = 0 for later steps, c = 0, B = 0"""
    model = small_patched(randomise=False, depth=depth, train_coda=train_coda)
    ids = tokens()
    assert torch.equal(model(ids), model.cut(ids))
    assert not torch.allclose(small_model(randomise=False, depth=depth)(ids), model.cut(ids), atol=1e-2)


@pytest.mark.parametrize("train_coda", TRAIN_CODA)
def test_without_seams_training_starts_exactly_from_the_papers_loop(train_coda):
    model = small_patched(randomise=False, seams=False, train_coda=train_coda)
    assert torch.equal(model(tokens()), small_model(randomise=False)(tokens()))


# ---- The equations ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_seam_is_h_plus_P_h():
    seam = Seam(32).double()
    nn.init.normal_(seam.P.weight)
    h = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(seam(h), h + h @ seam.P.weight.T, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 4])
def test_an_adapter_is_the_change_of_a_layers_own_weights(rank):
    """Each norm's weight times 1 + c, each W_k + B_k A_k."""
    layer = small_qwen(dtype=torch.float64).layers[4]
    torch.manual_seed(0)
    adapter = Adapter(layer, rank).double()
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.1)
    h = torch.randn(2, 5, 32, dtype=torch.float64)
    rotary = rotary_at(SMALL, 0, 5, "cpu")

    written_in = deepcopy(layer)
    write_into_weights(written_in, adapter)
    assert torch.allclose(layer(h, rotary, None, adapter), written_in(h, rotary), atol=1e-12)
    assert not torch.allclose(layer(h, rotary), written_in(h, rotary), atol=1e-2)


def write_into_weights(layer, adapter: Adapter):
    """Change a layer's own weights as the adapter says."""
    layer.input_layernorm.weight *= 1 + adapter.norm_change[0]
    layer.post_attention_layernorm.weight *= 1 + adapter.norm_change[1]
    if len(adapter.A) > 0:
        for k, projection in layer.projections().items():
            projection.weight += adapter.B[k].weight @ adapter.A[k].weight


@torch.no_grad()
@pytest.mark.parametrize("modulation", ["none", "static"])
@pytest.mark.parametrize("train_coda, adapted", [("norms", 2), ("lora", 2), ("all", 5)])
def test_the_patched_model_is_what_its_equations_say(train_coda, adapted, modulation):
    """h + P_in h; h + o_t (Layer(h) - h) for each step; h + P_out h; the adapters in the weights."""
    model = small_patched(torch.float64, modulation=modulation, depth=2, train_coda=train_coda)
    ids = tokens()
    rotary = rotary_at(SMALL, 0, ids.shape[1], "cpu")

    layers = small_qwen(dtype=torch.float64).layers
    kept = [layers[0], layers[1], layers[3], layers[4], layers[5]]
    adapters = [*model.prelude_adapters, model.recurrent_adapter, *model.coda_adapters]
    written = 0
    for layer, adapter in zip(kept, adapters, strict=True):
        if not isinstance(adapter, NoAdapter):
            write_into_weights(layer, adapter)
            written += 1
    assert written == adapted

    h = model.embed_tokens(ids)
    h = layers[0](h, rotary)
    h = layers[1](h, rotary)
    h = h + h @ model.seam_in.P.weight.T
    for t in range(2):
        looped = deepcopy(layers[3])
        if modulation == "static":
            for number, (k, projection) in enumerate(looped.projections().items()):
                m = model.controller.table[t, number]
                projection.weight += 16.0 / 4 * model.lora[k].B @ torch.diag(m) @ model.lora[k].A
        o = model.opening[t]
        h = (1 - o) * h + o * looped(h, rotary)
    h = h + h @ model.seam_out.P.weight.T
    h = layers[4](h, rotary)
    h = layers[5](h, rotary)
    assert torch.allclose(model(ids), model.norm(h) @ model.head_weight.T, atol=1e-10)


@torch.no_grad()
def test_a_patched_loop_under_a_controller_opens_for_the_modulated_layer():
    """h + o_t (Layer(h; W_k + (alpha/r) B_k diag(m_t,k) A_k) - h), where m_t is the Controller's."""
    model = small_patched(torch.float64, train_coda="none")
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 5, 32, dtype=torch.float64, generator=generator)
    rotary = rotary_at(SMALL, 0, 5, "cpu")
    for t in range(3):
        m = model.controller(model.pool(h), t)
        h_new = model.recurrent(h, rotary, None, Ouroboros.modulated_projection(model, m))
        expected = h + model.opening[t] * (h_new - h)
        assert torch.allclose(model.loop_step(h, t, rotary), expected, atol=1e-12)


def test_the_cut_baseline_has_nothing_of_the_patch():
    patched = small_patched(torch.float64)
    assert torch.equal(patched.cut(tokens()), small_model(torch.float64).cut(tokens()))


def test_the_future_does_not_change_the_past():
    model = small_patched()
    ids = tokens()
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % SMALL.vocab_size
    assert torch.equal(model(ids)[:, :8], model(other)[:, :8])
    assert not torch.equal(model(ids)[:, 8:], model(other)[:, 8:])


def test_steps_past_the_trained_depth_use_the_last_trained_steps_opening():
    model = small_patched(depth=3)
    before = model(tokens(), depth=5)
    with torch.no_grad():
        model.controller.step_embedding.weight[3:] += 1
        assert torch.equal(model(tokens(), depth=5), before)
        model.opening[2] += 0.1
        assert not torch.equal(model(tokens(), depth=5), before)


# ---- What is trained -------------------------------------------------------------------------------------

TRAINED_PARTS = (
    "controller",
    "gate",
    "step_norm",
    "opening",
    "seam_in",
    "seam_out",
    "prelude_adapters",
    "recurrent_adapter",
    "coda_adapters",
)


@pytest.mark.parametrize("name", ["patched", "coda norms"])
def test_gradients_reach_every_trained_tensor_and_no_other(name):
    model = small_model(torch.float64, **SETTINGS[name])
    model.loss(tokens(), tokens(seed=2)).backward()
    for part, p in model.named_parameters():
        assert p.requires_grad == part.startswith(TRAINED_PARTS), part
        has_gradient = p.grad is not None and p.grad.abs().sum() > 0
        assert has_gradient == p.requires_grad, part


@pytest.mark.parametrize("train_coda", TRAIN_CODA)
@pytest.mark.parametrize("seams", [True, False])
def test_what_is_trained_is_what_the_settings_name(seams, train_coda):
    model = small_patched(seams=seams, train_coda=train_coda, modulation="none")
    expected = set()
    if seams:
        expected.update(("opening", "seam_in", "seam_out"))
    else:
        expected.update(("gate", "step_norm"))
    if train_coda != "none":
        expected.add("coda_adapters")
    if train_coda == "all":
        expected.update(("prelude_adapters", "recurrent_adapter"))
    assert {name.split(".")[0] for name in model.trained_parameters()} == expected

    has_lora = any(".A." in name for name in model.trained_parameters())
    assert has_lora == (train_coda in ("lora", "all"))


def test_a_step_changes_what_is_trained_and_not_a_bit_of_what_is_frozen():
    model = small_patched()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=0.01)
    for _ in range(3):
        loss_and_gradients(model, tokens(), tokens(seed=2))
        optimizer.step()
    for name, tensor in model.state_dict().items():
        changed = not torch.equal(tensor, before[name])
        assert changed == (name in model.trained_parameters()), name


# ---- The seams in closed form ----------------------------------------------------------------------------


def states_and_targets(size=400):
    """h and y [size, 8] in float64: y is not linear in h, and the states are of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(size, 8, dtype=torch.float64, generator=generator)
    h = h * torch.logspace(-1, 2, size, dtype=torch.float64)[:, None]
    y = h.flip(1) + h.sin() + torch.randn(size, 8, dtype=torch.float64, generator=generator)
    return h, y


@pytest.mark.parametrize("strength", RIDGE_STRENGTHS)
def test_the_residual_of_a_seam_is_orthogonal_to_the_state_up_to_the_ridge(strength):
    """The sum over the tokens of w (y - h - P h) h^T is lambda P, with w = 1 / mean(y^2)."""
    h, y = states_and_targets()
    P = ridge_regression(h, y, strength)
    w = 1 / (y**2).mean(1)
    residual = y - h - h @ P.T
    gram = torch.einsum("n,ni,nj->ij", w, h, h)
    ridge = strength * gram.trace() / 8
    left = torch.einsum("n,ni,nj->ij", w, residual, h)
    assert torch.allclose(left, ridge * P, atol=1e-9 * gram.max().item())
    assert P.abs().max() > 0.01


def test_no_other_matrix_has_a_smaller_error_than_the_one_that_is_fitted():
    def objective(P):
        squares = (y - h - h @ P.T).square().sum(1) / y.square().mean(1)
        ridge = 0.01 * (h.square().sum(1) / y.square().mean(1)).sum() / 8
        return squares.sum() + ridge * P.square().sum()

    h, y = states_and_targets()
    P = ridge_regression(h, y, 0.01)
    for size in (1e-3, 1e-1):
        for _ in range(10):
            assert objective(P + size * torch.randn_like(P)) > objective(P)


def test_a_map_that_is_linear_is_recovered():
    h, _ = states_and_targets()
    M = torch.randn(8, 8, dtype=torch.float64)
    assert relative(ridge_regression(h, h @ M.T, 1e-12), M - torch.eye(8)) < 1e-8
    assert relative(fitted_seam(h, h @ M.T), M - torch.eye(8)) < 0.02


def test_the_strength_is_the_one_that_is_best_on_tokens_held_back():
    """Where y is h and noise, P = 0 is right: the strongest ridge comes closest to that."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(80, 32, dtype=torch.float64, generator=generator)
    y = h + torch.randn(80, 32, dtype=torch.float64, generator=generator)
    assert torch.equal(fitted_seam(h, y), ridge_regression(h, y, max(RIDGE_STRENGTHS)))
    assert torch.equal(fitted_seam(h, 2 * h), ridge_regression(h, 2 * h, min(RIDGE_STRENGTHS)))


@torch.no_grad()
@pytest.mark.parametrize("modulation", ["none", "controller"])
@pytest.mark.parametrize("depth", [1, 3])
def test_each_seam_is_fitted_to_the_state_of_the_full_model_the_second_one_given_the_first(depth, modulation):
    full = small_qwen(dtype=torch.float64)
    model = small_patched(torch.float64, randomise=False, depth=depth, modulation=modulation)
    ids = tokens(B=40)
    rotary = rotary_at(SMALL, 0, 12, "cpu")
    mend_seams(model, full, ids, batch_size=7)

    y = full.embed_tokens(ids)
    full_states = [y]
    for layer in full.layers:
        y = layer(y, rotary)
        full_states.append(y)

    before = full.layers[1](full.layers[0](full.embed_tokens(ids), rotary), rotary)
    P_in = fitted_seam(before[:, 1:].flatten(0, 1), full_states[3][:, 1:].flatten(0, 1))
    assert relative(model.seam_in.P.weight, P_in) < 1e-6

    behind = full.layers[3](before + before @ model.seam_in.P.weight.T, rotary)
    P_out = fitted_seam(behind[:, 1:].flatten(0, 1), full_states[4][:, 1:].flatten(0, 1))
    assert relative(model.seam_out.P.weight, P_out) < 1e-6


def test_mended_seams_bring_a_model_closer_to_the_full_one_and_change_nothing_else():
    full = small_qwen()
    model = small_patched(randomise=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mend_seams(model, full, tokens(B=40), batch_size=8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("seam_")), name

    unseen = tokens(B=20, seed=2)
    wanted = full(unseen)
    assert relative(model(unseen), wanted) < 0.9 * relative(model.cut(unseen), wanted)


def test_a_text_that_is_too_short_for_the_seams_is_one_clear_error():
    model = small_patched(randomise=False)
    for ids in (tokens(B=40, T=1), tokens(B=1, T=4)):
        with pytest.raises(UserError, match="too short to fit the seams; give more text, or --seam-tokens 0"):
            mend_seams(model, small_qwen(), ids, batch_size=8)


# ---- Distillation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_distillation_is_the_cross_entropy_with_the_full_models_prediction(weight):
    full = small_qwen(dtype=torch.float64)
    model = small_patched(torch.float64)
    ids = tokens()
    targets = tokens(seed=2)
    onehot = nn.functional.one_hot(targets, SMALL.vocab_size).double()
    mixed = (1 - weight) * onehot + weight * full(ids).softmax(-1)
    expected = -(mixed * model(ids).log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(distillation_loss(model, full, weight, ids, targets), expected, rtol=1e-12)


def test_the_full_model_of_a_looped_one_shares_its_layers_and_is_the_full_model(tmp_path):
    base = folder_of(small_qwen(), tmp_path / "base")
    Patched(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    model = load_run(tmp_path / "run")
    full = full_model_of(model)
    assert torch.equal(full(tokens()), Qwen.from_pretrained(base)(tokens()))
    assert full.embed_tokens is model.embed_tokens
    assert full.layers[0] is model.prelude[0]
    assert full.layers[model.settings["recurrent"]] is model.recurrent
    assert full.layers[5] is model.coda[-1]
    assert not any(p.requires_grad for p in full.parameters())


# ---- Runs of either class --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_run_comes_back_bit_for_bit_as_what_it_was(name, tmp_path):
    base = folder_of(small_qwen(), tmp_path / "base")
    model = small_model(**SETTINGS[name])
    model.source = str(base)
    model.save(tmp_path / "run")

    again = load_run(tmp_path / "run")
    assert type(again) is type(model)
    assert again.settings == model.settings
    assert again.trained_parameters().keys() == model.trained_parameters().keys()
    assert torch.equal(again(tokens()), model(tokens()))
    assert torch.equal(again.generate(tokens(), 5), model.generate(tokens(), 5))


def test_a_run_of_another_class_is_refused_by_load_and_opened_by_load_run(tmp_path):
    base = Qwen.from_pretrained(folder_of(small_qwen(), tmp_path / "base"))
    paper = Ouroboros(base, rank=4)
    patched = Patched(base, rank=4, depth=1)
    move_trained_weights(patched, 0.1)
    paper.save(tmp_path / "paper")
    patched.save(tmp_path / "patched")

    with pytest.raises(
        UserError, match="Ouroboros.load cannot open a run of the class Patched; load_run of patch.py"
    ):
        Ouroboros.load(tmp_path / "patched")
    with pytest.raises(
        UserError, match="Patched.load cannot open a run of the class Ouroboros; load_run of patch.py"
    ):
        Patched.load(tmp_path / "paper")
    assert type(load_run(tmp_path / "paper")) is Ouroboros
    assert type(load_run(tmp_path / "patched")) is Patched
    assert torch.equal(Patched.load(tmp_path / "patched")(tokens()), patched(tokens()))


def test_a_run_of_an_unknown_class_is_refused_in_one_line(tmp_path):
    base = Qwen.from_pretrained(folder_of(small_qwen(), tmp_path / "base"))
    Ouroboros(base, rank=4).save(tmp_path / "run")
    tensors, about = read_checkpoint(tmp_path / "run")
    about["model"]["class"] = "Elsewhere"
    write_checkpoint(tmp_path / "run", tensors, about)
    with pytest.raises(UserError, match="holds a Elsewhere, which this program does not know"):
        load_run(tmp_path / "run")
