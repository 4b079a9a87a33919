"""The equations of ouroboros.py as tests, in its order. Everything else that is tested is in tests/.

The models here are small and random (tests/helpers.py): 6 layers of width 32, cut to 2 + 1 + 2, rank 4,
depth 3.
"""

import math

import pytest
import torch
from helpers import SMALL, small_model, small_qwen, tokens
from torch import nn

from ouroboros import (
    Controller,
    Gate,
    Ouroboros,
    StepNorm,
    SVDLoRA,
    default_cut,
    prefix_mean,
    sequence_mean,
    svd_bases,
)
from qwen import PROJECTIONS, Config, Qwen

# ---- The whole model, written out ------------------------------------------------------------------------
#
# A second implementation, from the equations alone: one vector for each position, one head at a time, and a
# weight matrix of its own for each position. It takes weights from the model and calls none of its code.


def silu(x):
    return x / (1 + torch.exp(-x))


def rms_norm(x, weight):
    return x / torch.sqrt(x.square().mean() + SMALL.rms_norm_eps) * weight


def rotated(x, position):
    """Channels (c, c + D/2) of a head, rotated by position * theta^(-2c/D)."""
    D = len(x)
    y = x.clone()
    for c in range(D // 2):
        angle = position * SMALL.rope_theta ** (-2 * c / D)
        a, b = x[c], x[c + D // 2]
        y[c] = a * math.cos(angle) - b * math.sin(angle)
        y[c + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return y


def controller_by_hand(controller, pooled, t):
    """p = silu(W x + b); z = silu(W [p; e_t] + b); z = silu(W z + b); m_k = head_k z.

    pooled [d] -> m [7, r]
    """
    p = silu(controller.reduce.weight @ pooled + controller.reduce.bias)
    joined = torch.cat([p, controller.step_embedding.weight[t]])
    z = silu(controller.join.weight @ joined + controller.join.bias)
    z = silu(controller.narrow.weight @ z + controller.narrow.bias)
    return (controller.heads.weight @ z).view(len(PROJECTIONS), -1)


def layer_by_hand(layer, weights, h):
    """x + attention(norm(x)), then x + down(silu(gate(norm(x))) * up(norm(x))), for each position.

    weights: for each position, {k: the matrix of projection k}. h: for each position, its state [d].
    """
    D, H, H_kv = SMALL.head_dim, SMALL.num_attention_heads, SMALL.num_key_value_heads
    attention = layer.self_attn
    queries, keys, values = [], [], []  # [H or H_kv, D] for each position
    for W, x in zip(weights, h):
        x = rms_norm(x, layer.input_layernorm.weight)
        queries.append((W["q_proj"] @ x + attention.q_proj.bias).view(H, D))
        keys.append((W["k_proj"] @ x + attention.k_proj.bias).view(H_kv, D))
        values.append((W["v_proj"] @ x + attention.v_proj.bias).view(H_kv, D))

    out = []
    for i, (W, x) in enumerate(zip(weights, h)):
        heads = []
        for head in range(H):
            group = head // (H // H_kv)  # the key-value head that this query head shares
            q = rotated(queries[i][head], i)
            scores = [q @ rotated(keys[j][group], j) / math.sqrt(D) for j in range(i + 1)]
            shares = torch.stack(scores).softmax(0)
            heads.append(sum(shares[j] * values[j][group] for j in range(i + 1)))
        x = x + W["o_proj"] @ torch.cat(heads)

        y = rms_norm(x, layer.post_attention_layernorm.weight)
        inner = silu(W["gate_proj"] @ y) * (W["up_proj"] @ y)
        out.append(x + W["down_proj"] @ inner)
    return out


def plain_weights(layer):
    return {k: projection.weight for k, projection in layer.projections().items()}


def written_out(model, ids):
    """The logits [T, V] of one sequence ids [T], from the equations at the head of ouroboros.py."""
    settings = model.settings
    layers = small_qwen(dtype=torch.float64).layers
    recurrent = layers[settings["recurrent"]]
    h = list(model.embed_tokens.weight[ids])  # a state [d] for each position

    for layer in layers[: settings["prelude"]]:
        h = layer_by_hand(layer, [plain_weights(layer)] * len(ids), h)

    for t in range(settings["depth"]):
        weights = []
        for i in range(len(ids)):
            pooled = sum(h[: i + 1]) / (i + 1)
            m = controller_by_hand(model.controller, pooled, t)
            W = plain_weights(recurrent)
            for k, diagonal in zip(PROJECTIONS, m):
                A, B = model.lora[k].A, model.lora[k].B
                W[k] = W[k] + settings["alpha"] / settings["rank"] * B @ torch.diag(diagonal) @ A
            weights.append(W)

        for i, h_new in enumerate(layer_by_hand(recurrent, weights, h)):
            h_new = rms_norm(h_new, model.step_norm.weight[t])
            z = model.gate.linear.weight @ torch.cat([h_new, h[i]]) + model.gate.linear.bias
            g = 1 / (1 + torch.exp(-z))
            h[i] = g * h_new + (1 - g) * h[i]

    for layer in layers[len(layers) - settings["coda"] :]:
        h = layer_by_hand(layer, [plain_weights(layer)] * len(ids), h)
    return torch.stack([model.head_weight @ rms_norm(x, model.norm.weight) for x in h])


@torch.no_grad()
def test_the_model_is_what_its_equations_say():
    model = small_model(torch.float64)
    ids = tokens(B=1, T=6)
    assert torch.allclose(model(ids)[0], written_out(model, ids[0]), atol=1e-6)


# ---- R = U S V^T: A = V_r^T, B = U_r S_r -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (8, 40)])
def test_svd_bases_are_the_truncated_svd(shape):
    """R ~ U_r S_r V_r^T: B = U_r S_r, A = V_r^T, and B A is the best approximation of rank r."""
    R = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    A, B = svd_bases(R, 8)
    assert torch.allclose(B.norm(dim=0), S[:8], rtol=1e-3)
    assert torch.allclose(A @ A.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(B @ A, (U[:, :8] * S[:8]) @ Vh[:8], atol=1e-4)
    lost_energy = (R - B @ A).square().sum()
    assert torch.allclose(lost_energy, S[8:].square().sum(), rtol=1e-3, atol=1e-4)


def test_svd_bases_of_a_residual_without_full_rank_are_finite():
    generator = torch.Generator().manual_seed(0)
    R = torch.randn(24, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    A, B = svd_bases(R, 8)
    assert torch.allclose(A @ A.T, torch.eye(8), atol=1e-4)
    assert torch.allclose(B @ A, R, atol=1e-3)


def test_the_residual_is_the_mean_of_the_removed_layers_minus_the_recurrent_one():
    """R_k = mean over the removed layers of W_k - W_k of the recurrent layer."""
    layers = small_qwen().layers
    model = small_model(prelude=1, recurrent=3, coda=2, rank=16)  # layers 1 and 2 are removed
    for k in ("k_proj", "v_proj"):  # 16 x 32: rank 16 loses nothing
        W = [layer.projections()[k].weight for layer in layers]
        R = (W[1] + W[2]) / 2 - W[3]
        assert torch.allclose(model.lora[k].B @ model.lora[k].A, R, atol=1e-4)


def test_the_low_rank_change_is_alpha_over_r_B_diag_m_A_x():
    generator = torch.Generator().manual_seed(0)
    A, B, m, x = (torch.randn(shape, generator=generator) for shape in ((4, 10), (6, 4), (4,), (10,)))
    expected = 16.0 / 4 * B @ torch.diag(m) @ A @ x
    assert torch.allclose(SVDLoRA(A, B, alpha=16.0)(x, m), expected, atol=1e-5)


# ---- m_t = Controller(pool(h), t) ------------------------------------------------------------------------


def test_the_controller_is_what_its_equations_say():
    """m_k = head_k silu(W_3 silu(W_2 [silu(W_1 x + b_1); e_t] + b_2) + b_3), for each position and step."""
    torch.manual_seed(0)
    controller = Controller(32, rank=4, s=8).double()
    nn.init.normal_(controller.heads.weight)
    pooled = torch.randn(2, 5, 32, dtype=torch.float64)
    for t in (0, 1, 63):
        m = controller(pooled, t)
        for b in range(2):
            for i in range(5):
                expected = controller_by_hand(controller, pooled[b, i], t)
                ours = torch.stack([m[k][b, i] for k in PROJECTIONS])
                assert torch.allclose(ours, expected, atol=1e-12)


def test_the_heads_start_at_zero_so_nothing_is_modulated():
    """m_t = 0 at the start: the layer's weights are W_k."""
    without = small_model(randomise=False, modulation="none")
    model = small_model(randomise=False)
    assert torch.equal(model(tokens()), without(tokens()))
    nn.init.normal_(model.controller.heads.weight)
    assert not torch.allclose(model(tokens()), without(tokens()), atol=1e-3)


def test_static_modulation_is_the_same_for_every_input():
    """m_t,k = table[t, k]"""
    model = small_model(modulation="static")
    m = model.controller(torch.randn(2, 5, 32), 1)
    for number, k in enumerate(PROJECTIONS):
        assert torch.equal(m[k], model.controller.table[1, number])


def test_the_pool_is_the_mean_over_a_position_and_all_before_it():
    """pool(h)_i = (h_0 + ... + h_i) / (i + 1); the published pool is the mean of the whole sequence."""
    h = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    for i in range(7):
        assert torch.allclose(prefix_mean(h)[:, i], h[:, : i + 1].mean(dim=1), atol=1e-6)
    assert torch.allclose(sequence_mean(h), h.mean(dim=1, keepdim=True), atol=1e-6)


def test_the_pool_is_summed_in_float32():
    h = torch.full((1, 5000, 1), 1.01, dtype=torch.bfloat16)
    assert prefix_mean(h)[0, -1, 0] == h[0, 0, 0]


@pytest.mark.parametrize("pool, leaks", [("prefix", False), ("sequence", True)])
def test_the_future_does_not_change_the_past_unless_the_pool_sees_it(pool, leaks):
    model = small_model(pool=pool)
    ids = tokens()
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % SMALL.vocab_size
    change = (model(ids)[:, :8] - model(other)[:, :8]).abs().max()
    if leaks:
        assert change > 1e-3
    else:
        assert change == 0


# ---- h_new = StepNorm_t(...), g = sigmoid(W_g [h_new; h] + b_g), h = g * h_new + (1 - g) * h -------------


def test_the_step_norm_is_an_rms_norm_with_a_weight_for_each_step():
    """StepNorm_t(h) = h / sqrt(mean(h^2) + eps) * w_t"""
    torch.manual_seed(0)
    norm = StepNorm(32, SMALL.rms_norm_eps)
    h = torch.randn(32)
    assert torch.allclose(norm(h, 5), rms_norm(h, torch.ones(32)), atol=1e-6)
    nn.init.normal_(norm.weight)
    assert torch.allclose(norm(h, 5), rms_norm(h, norm.weight[5]), atol=1e-6)


def test_the_gate_is_a_sigmoid_of_both_states_for_each_channel():
    """g = sigmoid(W_g [h_new; h] + b_g)"""
    torch.manual_seed(0)
    gate = Gate(32)
    nn.init.normal_(gate.linear.weight)
    h_new, h = torch.randn(32), torch.randn(32)
    z = gate.linear.weight[:, :32] @ h_new + gate.linear.weight[:, 32:] @ h + gate.linear.bias
    assert torch.allclose(gate(h_new, h), 1 / (1 + torch.exp(-z)), atol=1e-5)


def test_at_the_start_the_gate_keeps_88_percent_of_the_old_state():
    """W_g = 0, b_g = -2: g = sigmoid(-2) = 0.1192"""
    g = Gate(32)(torch.randn(2, 3, 32), torch.randn(2, 3, 32))
    assert torch.allclose(g, torch.full_like(g, 0.1192), atol=1e-4)


@torch.no_grad()
def test_a_loop_step_mixes_the_new_and_the_old_state():
    """h = g * h_new + (1 - g) * h, with g = 1 where the gate is removed and no norm where that is removed."""
    h = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotary = (torch.ones(5, 8), torch.zeros(5, 8))  # no rotation
    for gate in (True, False):
        for step_norm in (True, False):
            model = small_model(torch.float64, modulation="none", gate=gate, step_norm=step_norm)
            h_new = model.recurrent(h, rotary)
            if step_norm:
                h_new = model.step_norm(h_new, 1)
            g = model.gate(h_new, h) if gate else 1.0
            assert torch.allclose(model.loop_step(h, 1, rotary), g * h_new + (1 - g) * h, atol=1e-12)


def test_steps_past_the_trained_depth_use_the_last_trained_steps_embedding_and_norm():
    model = small_model()  # depth 3
    ids = tokens()
    before = model(ids, depth=5)
    with torch.no_grad():
        model.controller.step_embedding.weight[3:] += 1
        model.step_norm.weight[3:] += 1
        assert torch.equal(model(ids, depth=5), before)
        model.step_norm.weight[2] += 1
        assert not torch.equal(model(ids, depth=5), before)


# ---- The cut ---------------------------------------------------------------------------------------------


def test_the_cut_keeps_the_papers_proportions():
    """prelude = coda = round(8/36 L), recurrent = L/2"""
    assert default_cut(12) == (3, 6, 3)
    assert default_cut(24) == (5, 12, 5)
    assert default_cut(28) == (6, 14, 6)
    assert default_cut(30) == (7, 15, 7)
    assert default_cut(36) == (8, 18, 8)


def test_the_cut_baseline_is_the_kept_layers_one_after_the_other():
    qwen = small_qwen()
    model = small_model(prelude=2, recurrent=3, coda=2)
    ids = tokens()
    qwen.layers[2].forward = lambda x, *_: x  # the only layer that is neither kept nor looped
    assert torch.equal(model.cut(ids), qwen(ids))


# ---- Sizes, shapes and gradients -------------------------------------------------------------------------


def test_qwen2_5_3b_at_rank_32_trains_9214592_parameters():
    config = Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        qwen = Qwen(config)
        model = Ouroboros(qwen, rank=32)
    for part, expected in (("controller", 692_864), ("gate", 8_390_656), ("step_norm", 131_072)):
        assert sum(p.numel() for p in getattr(model, part).parameters()) == expected
    assert sum(p.numel() for p in model.trained_parameters().values()) == 9_214_592
    assert len(model.prelude) == len(model.coda) == 8
    assert model.recurrent is qwen.layers[18]


def test_shapes():
    """ids [B, T] -> logits [B, T, V]; A [r, in], B [out, r]; m_k [B, T, r]"""
    model = small_model()
    ids = tokens(B=2, T=12)
    assert model(ids).shape == model(ids, depth=7).shape == model.cut(ids).shape == (2, 12, 97)
    assert model.hidden(ids).shape == (2, 12, 32)
    assert model.loss(ids, ids).shape == ()
    assert model.generate(ids, max_new_tokens=5).shape == (2, 17)
    assert prefix_mean(torch.randn(2, 12, 32)).shape == (2, 12, 32)
    assert sequence_mean(torch.randn(2, 12, 32)).shape == (2, 1, 32)

    m = Controller(32, rank=4)(torch.randn(2, 12, 32), 0)
    assert tuple(m) == PROJECTIONS
    for k, projection in model.recurrent.projections().items():
        out_features, in_features = projection.weight.shape
        assert m[k].shape == (2, 12, 4)
        assert model.lora[k].A.shape == (4, in_features)
        assert model.lora[k].B.shape == (out_features, 4)


def test_the_loss_is_the_mean_over_the_targets_that_count():
    """loss = mean of -log p(target) over the targets that are not -100"""
    model = small_model()
    ids = tokens()
    targets = tokens(seed=2)
    targets[0, :5] = -100
    log_p = model(ids).log_softmax(-1)
    log_p_target = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(model.loss(ids, targets), -log_p_target[targets >= 0].mean())


ABLATIONS = [
    {},
    {"pool": "sequence"},
    {"modulation": "static"},
    {"modulation": "none"},
    {"gate": False},
    {"step_norm": False},
]


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_gradients_reach_every_trained_tensor_and_no_other(settings):
    model = small_model(torch.float64, **settings)
    model.loss(tokens(), tokens(seed=2)).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == name.startswith(("controller", "gate", "step_norm")), name
        has_gradient = p.grad is not None and p.grad.abs().sum() > 0
        assert has_gradient == p.requires_grad, name


def test_the_prelude_builds_no_graph_and_the_loop_does():
    model = small_model()
    graphs = []
    for layer in [*model.prelude, model.recurrent]:
        layer.register_forward_hook(lambda module, inputs, out: graphs.append(out.grad_fn is not None))
    model.loss(tokens(), tokens())
    assert graphs == [False] * 2 + [True] * 3


@pytest.mark.parametrize("part", ["projection", "gate", "step norm", "controller", "whole model"])
def test_gradients_match_finite_differences(part):
    model = small_model(torch.float64)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    if part == "projection":
        m = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(model.lora["q_proj"], (x, m))
    elif part == "gate":
        weight = model.gate.linear.weight
        assert torch.autograd.gradcheck(lambda *_: model.gate(x, y), (x, y, weight), fast_mode=True)
    elif part == "step norm":
        weight = model.step_norm.weight
        assert torch.autograd.gradcheck(lambda *_: model.step_norm(x, 1), (x, weight), fast_mode=True)
    elif part == "controller":
        # the heads are not zero here: at zero the rest of the Controller has no gradient
        inputs = (x, *model.controller.parameters())
        assert torch.autograd.gradcheck(
            lambda *_: tuple(model.controller(x, 1).values()), inputs, fast_mode=True
        )
    else:
        ids = tokens(B=1, T=5)
        weight = model.controller.heads.weight
        assert torch.autograd.gradcheck(lambda _: model.loss(ids, ids), weight, fast_mode=True)


def test_a_step_changes_what_is_trained_and_not_a_bit_of_what_is_frozen():
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=0.01)
    for _ in range(3):
        model.loss(tokens(), tokens(seed=2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        changed = not torch.equal(tensor, before[name])
        assert changed == (name in model.trained_parameters()), name


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = Ouroboros(Qwen.from_pretrained("tiny"), rank=32, depth=2)
    ids = tokens(1, 12, vocabulary=4096)
    targets = tokens(1, 12, seed=2, vocabulary=4096)
    optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=0.01)
    losses = []
    for _ in range(300):
        loss = model.loss(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses) < 0.05 * losses[0]
