"""The equations of ouroboros.py as tests, in its order. This file needs only qwen.py and ouroboros.py.

The models here are small and random: 6 layers of width 32, of which 2 + 1 + 2 are kept, rank 4, depth 3.
"""

import math

import pytest
import torch
from torch import nn

from ouroboros import (
    Controller,
    Gate,
    Ouroboros,
    StaticModulation,
    StepNorm,
    SVDLoRA,
    default_cut,
    prefix_mean,
    sequence_mean,
    svd_bases,
)
from qwen import PROJECTIONS, Config, Qwen, UserError, rotary_at

torch.set_num_threads(1)  # models so small gain nothing from a second thread

SMALL = Config(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)
CACHED = [{}, {"modulation": "static"}, {"modulation": "none"}, {"gate": False}, {"step_norm": False}]
ABLATIONS = [*CACHED, {"pool": "sequence"}]  # this one generates without a cache


def small_qwen(dtype=torch.float32, seed=0, config=SMALL) -> Qwen:
    """A decoder whose random weights are large enough that attention and every bias matter."""
    torch.manual_seed(seed)
    qwen = Qwen(config)
    for p in qwen.parameters():
        mean = 0.0 if p.ndim == 2 else 0.5
        nn.init.normal_(p, mean=mean, std=0.15)
    return qwen.to(dtype).requires_grad_(False)


def small_model(dtype=torch.float32, randomise=True, kind=Ouroboros, qwen=None, **settings) -> Ouroboros:
    """A looped model of 2 + 1 + 2 of the 6 layers of small_qwen, with rank 4 and depth 3.

    randomise: move what is trained away from its start.
    """
    settings = {"prelude": 2, "recurrent": 3, "coda": 2, "rank": 4, "depth": 3, **settings}
    model = kind(qwen or small_qwen(dtype), **settings)
    if randomise:
        for p in model.trained_parameters().values():
            p.data += 0.05 * torch.randn_like(p)
    return model.to(dtype)


def tokens(B=2, T=12, seed=1, vocabulary=97):
    """Random token ids [B, T]."""
    return torch.randint(0, vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test draws the same numbers, whichever tests run before it."""
    torch.manual_seed(0)


# ---- The whole model, written out ------------------------------------------------------------------------
#
# A second implementation, from the equations alone: one vector for each position, one head at a time, and a
# weight matrix of its own for each position. It takes weights from the model and calls no forward pass of it.


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
    layers = small_qwen(torch.float64).layers
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
    # the tolerance is that of the rotary angles, which are float32
    assert torch.allclose(model(ids)[0], written_out(model, ids[0]), atol=1e-6)


# ---- R = U S V^T: A = V_r^T, B = U_r S_r -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (8, 40)])
def test_svd_bases_are_the_truncated_svd(shape):
    """R ~ U_r S_r V_r^T: B = U_r S_r, A = V_r^T, and B A is the best approximation of rank r."""
    R = torch.randn(shape)
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    A, B = svd_bases(R, 8)
    assert torch.allclose(B.norm(dim=0), S[:8], rtol=1e-3)  # in the order of the SVD
    assert torch.allclose(A @ A.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(B @ A, (U[:, :8] * S[:8]) @ Vh[:8], atol=1e-4)


def test_svd_bases_of_a_residual_without_full_rank_are_orthonormal_and_lose_nothing():
    R = torch.randn(24, 3) @ torch.randn(3, 40)
    A, B = svd_bases(R, 8)
    assert torch.allclose(A @ A.T, torch.eye(8), atol=1e-4)
    assert torch.allclose(B @ A, R, atol=1e-3)


@pytest.mark.parametrize("k", ["k_proj", "v_proj"])  # 16 x 32, so that rank 16 loses nothing
def test_the_residual_is_the_mean_of_the_removed_layers_minus_the_recurrent_one(k):
    """R_k = mean over the removed layers of W_k - W_k of the recurrent layer."""
    W = [layer.projections()[k].weight for layer in small_qwen().layers]
    lora = small_model(prelude=1, recurrent=3, coda=2, rank=16).lora[k]  # layers 1 and 2 are removed
    assert torch.allclose(lora.B @ lora.A, (W[1] + W[2]) / 2 - W[3], atol=1e-4)


def test_the_low_rank_update_is_alpha_over_r_B_diag_m_A_x():
    A, B, m, x = torch.randn(4, 10), torch.randn(6, 4), torch.randn(4), torch.randn(10)
    expected = 16.0 / 4 * B @ torch.diag(m) @ A @ x
    assert torch.allclose(SVDLoRA(A, B, alpha=16.0)(x, m), expected, atol=1e-5)


# ---- m_t = Controller(pool(h), t) ------------------------------------------------------------------------


def test_the_pool_is_the_mean_over_a_position_and_all_before_it():
    """pool(h)_i = (h_0 + ... + h_i) / (i + 1); the published pool is the mean over the whole sequence."""
    h = torch.randn(2, 7, 32)
    for i in range(7):
        assert torch.allclose(prefix_mean(h)[:, i], h[:, : i + 1].mean(dim=1), atol=1e-6)
    assert torch.allclose(sequence_mean(h), h.mean(dim=1, keepdim=True), atol=1e-6)


def test_the_pool_is_summed_in_float32():
    h = torch.full((1, 5000, 1), 1.01, dtype=torch.bfloat16)
    assert prefix_mean(h)[0, -1, 0] == h[0, 0, 0]


@pytest.mark.parametrize("t", [0, 1, 63])
def test_the_controller_is_what_its_equations_say(t):
    """m_k = head_k silu(W_3 silu(W_2 [silu(W_1 x + b_1); e_t] + b_2) + b_3), for each position and step."""
    controller = Controller(32, rank=4, s=8).double()
    nn.init.normal_(controller.heads.weight)
    pooled = torch.randn(2, 5, 32, dtype=torch.float64)
    m = torch.stack(list(controller(pooled, t).values()))  # [7, B, T, r]
    for b in range(2):
        for i in range(5):
            assert torch.allclose(m[:, b, i], controller_by_hand(controller, pooled[b, i], t), atol=1e-12)


def test_static_modulation_is_a_table_with_a_row_for_each_step():
    """m_t,k = table[t, k]"""
    static = StaticModulation(rank=4)
    nn.init.normal_(static.table)
    for number, k in enumerate(PROJECTIONS):
        assert torch.equal(static(1)[k], static.table[1, number])


def test_the_heads_start_at_zero_so_nothing_is_modulated():
    """m_t = 0 at the start: the layer's weights are W_k."""
    without = small_model(randomise=False, modulation="none")
    model = small_model(randomise=False)
    assert torch.equal(model(tokens()), without(tokens()))
    nn.init.normal_(model.controller.heads.weight)
    assert not torch.allclose(model(tokens()), without(tokens()), atol=1e-3)


def change_of_the_past(**settings):
    """The largest change of the first 8 logits, if all later tokens are replaced."""
    model = small_model(**settings)
    ids = tokens()
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % SMALL.vocab_size
    return (model(ids)[:, :8] - model(other)[:, :8]).abs().max()


def test_the_future_does_not_change_the_past():
    assert change_of_the_past(pool="prefix") == 0


def test_with_the_published_pool_the_future_changes_the_past():
    assert change_of_the_past(pool="sequence") > 1e-3


# ---- h_new = StepNorm_t(...), g = sigmoid(W_g [h_new; h] + b_g), h = g * h_new + (1 - g) * h -------------


def test_the_step_norm_is_an_rms_norm_with_a_weight_for_each_step():
    """StepNorm_t(h) = h / sqrt(mean(h^2) + eps) * w_t, with w_t = 1 at the start"""
    norm = StepNorm(32, SMALL.rms_norm_eps)
    h = torch.randn(32)
    assert torch.allclose(norm(h, 5), rms_norm(h, torch.ones(32)), atol=1e-6)
    nn.init.normal_(norm.weight)
    assert torch.allclose(norm(h, 5), rms_norm(h, norm.weight[5]), atol=1e-6)


def test_the_gate_is_a_sigmoid_of_both_states_for_each_channel():
    """g = sigmoid(W_g [h_new; h] + b_g)"""
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
@pytest.mark.parametrize("step_norm", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_a_loop_step_mixes_the_new_and_the_old_state(gate, step_norm):
    """h = g * h_new + (1 - g) * h, with g = 1 where the gate is removed and no norm where that is removed."""
    model = small_model(torch.float64, modulation="none", gate=gate, step_norm=step_norm)
    h = torch.randn(2, 5, 32, dtype=torch.float64)
    rotary = rotary_at(SMALL, 0, 5, "cpu")
    h_new = model.recurrent(h, rotary)
    h_new = model.step_norm(h_new, 1) if step_norm else h_new
    g = model.gate(h_new, h) if gate else 1.0
    assert torch.allclose(model.loop_step(h, 1, rotary), g * h_new + (1 - g) * h, atol=1e-12)


@torch.no_grad()
def test_steps_past_the_trained_depth_use_the_last_trained_steps_embedding_and_norm():
    model = small_model()  # depth 3
    before = model(tokens(), depth=5)
    model.controller.step_embedding.weight[3:] += 1
    model.step_norm.weight[3:] += 1
    assert torch.equal(model(tokens(), depth=5), before)
    model.step_norm.weight[2] += 1
    assert not torch.equal(model(tokens(), depth=5), before)


# ---- The cut ---------------------------------------------------------------------------------------------


CUTS = [(12, (3, 6, 3)), (24, (5, 12, 5)), (28, (6, 14, 6)), (30, (7, 15, 7)), (36, (8, 18, 8))]


@pytest.mark.parametrize("num_layers, cut", CUTS)
def test_the_cut_keeps_the_papers_proportions(num_layers, cut):
    """prelude = coda = round(8/36 L), recurrent = L/2"""
    assert default_cut(num_layers) == cut


def test_the_cut_baseline_is_the_kept_layers_one_after_the_other():
    qwen = small_qwen()
    qwen.layers[2].forward = lambda x, *_: x  # the only layer that is neither kept nor looped
    assert torch.equal(small_model().cut(tokens()), qwen(tokens()))


IMPOSSIBLE = [("depth", 65), ("rank", 17), ("rank", 4.0), ("alpha", "16"), ("coda", 3), ("pool", "mean")]


@pytest.mark.parametrize("name, value", IMPOSSIBLE)
def test_a_setting_that_is_not_possible_is_one_line_that_names_it(name, value):
    with pytest.raises(UserError, match=f"{name} .*{value}") as caught:
        small_model(**{name: value})
    assert "\n" not in str(caught.value)


# ---- Sizes, gradients and generation ---------------------------------------------------------------------


def test_qwen2_5_3b_at_rank_32_trains_9214592_parameters():
    config = Config(151936, 2048, 11008, 36, 16, 2, 128, tie_word_embeddings=True)
    with torch.device("meta"):
        model = Ouroboros(Qwen(config), rank=32)
    for part, expected in (("controller", 692_864), ("gate", 8_390_656), ("step_norm", 131_072)):
        assert sum(p.numel() for p in getattr(model, part).parameters()) == expected
    assert sum(p.numel() for p in model.trained_parameters().values()) == 9_214_592
    assert len(model.prelude) == len(model.coda) == 8


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_gradients_reach_every_trained_tensor_and_no_other(settings):
    model = small_model(torch.float64, **settings)
    model.loss(tokens(), tokens(seed=2)).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == name.startswith(("controller", "gate", "step_norm")), name
        has_gradient = p.grad is not None and p.grad.abs().sum() > 0
        assert has_gradient == p.requires_grad, name


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_gradients_match_finite_differences(settings):
    model = small_model(torch.float64, **settings)
    ids = tokens(B=1, T=5)
    parameters = tuple(model.trained_parameters().values())  # gradcheck changes them in place
    assert torch.autograd.gradcheck(lambda *_: model.loss(ids, ids), parameters, fast_mode=True)


def test_one_batch_can_be_learned_by_heart_and_not_a_bit_of_what_is_frozen_changes():
    model = Ouroboros(Qwen.from_pretrained("tiny"), rank=4, depth=2)
    trained = model.trained_parameters()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    for _ in range(50):
        loss = model.loss(tokens(1, 8), tokens(1, 8, seed=2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2  # a guess among 4096 tokens has 8.3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("settings", CACHED, ids=str)
def test_the_cache_changes_no_logits(settings, depth):
    model = small_model(**settings)
    cache = model.new_cache(depth=depth)
    pieces = tokens().split([5, 1, 1, 5], dim=1)
    logits = torch.cat([model(piece, depth=depth, cache=cache) for piece in pieces], dim=1)
    assert torch.allclose(logits, model(tokens(), depth=depth), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_each_generated_token_is_the_likeliest_after_all_before_it(settings):
    model = small_model(**settings)
    ids = model.generate(tokens(), 8, depth=5)
    for i in range(12, 20):
        assert torch.equal(ids[:, i], model(ids[:, :i], depth=5)[:, -1].argmax(-1))
