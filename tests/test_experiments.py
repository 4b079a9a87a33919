"""The models of experiments/ are what they say."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    SMALL,
    FixedBatches,
    folder_of,
    greedy_without_cache,
    move_trained_weights,
    small_model,
    small_qwen,
    tokens,
    training_options,
)

from experiments.alternatives import AdaptedFull, Alternative, LowRank, PaperCut, Seams, StepAdapters
from experiments.optimizers import optimizer_of
from experiments.smollm2 import LAYER_NAMES, prose, write_model, write_text
from experiments.variants import (
    DrawnDepth,
    GateStart,
    MeanInput,
    OwnBases,
    RandomBases,
    Released,
    Rounded,
    SizedStepNorm,
    TokenInput,
    WindowInput,
    ZeroInput,
    states_before_loop,
    window_mean,
)
from hub import load_tokenizer
from ouroboros import Ouroboros, default_cut
from qwen import PROJECTIONS, Qwen, rotary_at
from train import train

CUT = dict(prelude=2, recurrent=3, coda=2, rank=4)
KINDS = ("matrix", "lora", "lora one")

# ---- Alternatives to the paper's system ------------------------------------------------------------------


def alternative(kind: str) -> Alternative:
    return Alternative(small_qwen(), kind, depth=1, **CUT)


@pytest.mark.parametrize("kind", KINDS)
def test_an_alternative_starts_as_the_cut_model(kind):
    model = alternative(kind)
    assert torch.allclose(model(tokens()), model.cut(tokens()), atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "lora one"])
def test_the_loras_are_of_the_size_of_the_papers_system(kind):
    def size(model) -> int:
        return sum(p.numel() for p in model.trained_parameters().values())

    budget = size(small_model())
    assert abs(size(alternative(kind)) - budget) < 0.1 * budget


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_alternative_is_what_it_says(kind):
    model = alternative(kind)
    ids = tokens()
    start = model.cut(ids)
    move_trained_weights(model, 0.1)

    layers = small_qwen().layers  # the kept ones are 0, 1, 3, 4 and 5
    adapters = {
        0: model.prelude_adapters[0],
        1: model.prelude_adapters[1],
        3: model.recurrent_adapter,
        4: model.coda_adapters[0],
        5: model.coda_adapters[1],
    }
    adapted = {"lora": (0, 1, 3, 4, 5), "lora one": (3,)}.get(kind, ())
    for i in adapted:
        for k, projection in layers[i].projections().items():
            lora = adapters[i].lora[k]
            projection.weight += lora.B @ lora.A

    rotary = rotary_at(SMALL, 0, ids.shape[1], "cpu")
    h = model.embed_tokens(ids)
    for i in (0, 1, 3, 4, 5):
        h = layers[i](h, rotary)
        if i == 3 and kind == "matrix":
            h = h @ model.behind_recurrent.weight.T
    assert torch.allclose(model(ids), model.norm(h) @ model.head_weight.T, atol=1e-4)
    assert not torch.allclose(model(ids), start, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_alternative_trains_nothing_else(kind):
    trained = alternative(kind).trained_parameters()
    prefixes = {
        "matrix": ("behind_recurrent.",),
        "lora": ("prelude_adapters.", "recurrent_adapter.", "coda_adapters."),
        "lora one": ("recurrent_adapter.",),
    }
    found = {name.split(".")[0] + "." for name in trained}
    assert found == set(prefixes[kind])


# ---- Variants of the paper's system and of the patch -----------------------------------------------------


def test_random_bases_are_orthogonal_and_have_the_singular_values_of_the_true_ones():
    true = small_model().lora
    random = RandomBases(small_qwen(), **CUT).lora
    assert tuple(random) == tuple(true) == PROJECTIONS
    for k in PROJECTIONS:
        A, B = random[k].A, random[k].B
        assert torch.allclose(A @ A.T, torch.eye(4), atol=1e-5)
        singular_values = true[k].B.norm(dim=0)
        assert torch.allclose(B.T @ B, torch.diag(singular_values**2), atol=1e-5)
        assert not torch.allclose(B @ A, true[k].B @ true[k].A, atol=1e-2)


def test_own_bases_are_those_of_the_recurrent_layer_alone():
    projections = small_qwen().layers[3].projections()
    for k, lora in OwnBases(small_qwen(), **CUT).lora.items():
        U, S, V = torch.linalg.svd(projections[k].weight)
        best = U[:, :4] * S[:4] @ V[:4]  # the best approximation of rank 4
        assert torch.allclose(lora.B @ lora.A, best, atol=1e-4)


@pytest.mark.parametrize("one_seam", ["in", "out"])
def test_only_the_seam_that_is_named_is_trained(one_seam):
    model = Seams(small_qwen(), one_seam, train_coda="none", **CUT)
    assert model.seam_in.P.weight.requires_grad == (one_seam == "in")
    assert model.seam_out.P.weight.requires_grad == (one_seam == "out")
    assert model.opening.requires_grad


def test_rounded_trains_in_bfloat16():
    for name, p in Rounded(small_qwen(), **CUT).trained_parameters().items():
        assert p.dtype == torch.bfloat16, name


def test_low_rank_seams_have_two_factors_and_start_at_zero():
    model = LowRank(small_qwen(), train_coda="all", **CUT)
    for seam in (model.seam_in, model.seam_out):
        down, up = seam.P
        assert down.weight.shape == (32 // 8, 32)
        assert up.weight.shape == (32, 32 // 8)
    assert torch.equal(model(tokens()), model.cut(tokens()))


def test_the_paper_cut_has_the_layers_of_the_paper_and_the_parts_of_the_patch():
    model = PaperCut(small_qwen(), prelude=2, recurrent=2, coda=1, rank=4)
    settings = model.settings
    assert (settings["prelude"], settings["recurrent"], settings["coda"]) == default_cut(6)
    assert settings["seams"] and settings["train_coda"] == "all"


def test_each_step_has_an_adapter_of_its_own():
    """A change of one adapter counts from its own step on. Steps past the last use the last one."""
    model = StepAdapters(small_qwen(), train_coda="all", depth=3, **{**CUT, "modulation": "none"})
    assert torch.equal(model(tokens()), model.cut(tokens()))
    move_trained_weights(model, 0.1)
    before = [model(tokens(), depth=depth) for depth in (1, 2, 3, 4)]
    with torch.no_grad():
        model.later_adapters[1].B["q_proj"].weight.add_(1.0)
    after = [model(tokens(), depth=depth) for depth in (1, 2, 3, 4)]
    same = [torch.equal(x, y) for x, y in zip(before, after)]
    assert same == [True, True, False, False]


def test_the_depth_is_drawn_by_the_batch_alone_and_every_depth_occurs():
    model = DrawnDepth(small_qwen(), **CUT)
    move_trained_weights(model, 0.1)
    drawn = set()
    for seed in range(20):
        ids = tokens(seed=seed)
        loss = model.loss(ids, ids)
        assert torch.equal(model.loss(ids, ids), loss)
        for depth in (1, 2, 4, 8):
            if torch.equal(Ouroboros.loss(model, ids, ids, depth=depth), loss):
                drawn.add(depth)
                break
        else:
            raise AssertionError("none of the depths gives this loss")
    assert drawn == {1, 2, 4, 8}


def test_an_evaluation_decides_the_depth_itself():
    model = DrawnDepth(small_qwen(), **CUT)
    with torch.no_grad():
        for depth in (1, 3):
            expected = Ouroboros.loss(model, tokens(), tokens(), depth=depth)
            assert torch.equal(model.loss(tokens(), tokens(), depth=depth), expected)


# ---- The Controller's input ------------------------------------------------------------------------------


def diagonals(model: Ouroboros, ids):
    """The diagonals of the first step of the loop, [B, T or 1, r] for q_proj."""
    h = states_before_loop(model, ids)
    return model.controller(model.pool(h), 0)["q_proj"]


def moved(model: Ouroboros) -> Ouroboros:
    move_trained_weights(model, 0.5)
    return model


@torch.no_grad()
def test_zero_input_gives_the_same_modulation_for_every_text():
    model = moved(ZeroInput(small_qwen(), **CUT))
    assert torch.equal(diagonals(model, tokens(seed=1)), diagonals(model, tokens(seed=2)))
    assert diagonals(model, tokens()).abs().max() > 0


@torch.no_grad()
def test_mean_input_is_the_mean_over_the_text_it_was_measured_on_whatever_the_input():
    model = moved(MeanInput(small_qwen(), **CUT))
    model.measure(tokens(B=3))
    h = states_before_loop(model, tokens(B=3))
    prefix_means = torch.stack([h[:, : t + 1].mean(1) for t in range(h.shape[1])], dim=1)
    assert torch.allclose(model.mean_input, prefix_means.mean((0, 1)), atol=1e-5)
    assert torch.equal(diagonals(model, tokens(seed=1)), diagonals(model, tokens(seed=2)))
    other = ZeroInput(small_qwen(), **CUT)
    other.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(diagonals(model, tokens()), diagonals(other, tokens()))


@torch.no_grad()
def test_token_input_depends_on_the_token_alone():
    model = moved(TokenInput(small_qwen(), **CUT))
    h = states_before_loop(model, tokens())
    assert torch.equal(model.pool(h), h)


def test_the_window_is_the_mean_over_the_last_16_positions():
    h = torch.randn(2, 40, 8)
    pooled = window_mean(h)
    assert torch.allclose(pooled[:, 30], h[:, 15:31].mean(1), atol=1e-6)
    assert torch.allclose(pooled[:, 15], h[:, :16].mean(1), atol=1e-6)
    assert torch.allclose(pooled[:, 4], h[:, :5].mean(1), atol=1e-6)
    assert torch.equal(pooled[:, 0], h[:, 0])


@pytest.mark.parametrize("model_class", [TokenInput, WindowInput, ZeroInput])
def test_generation_with_another_input_is_that_without_a_cache(model_class):
    model = moved(model_class(small_qwen(), **CUT))
    ids = tokens(T=20)
    assert torch.equal(model.generate(ids, 5), greedy_without_cache(model, ids, 5))


# ---- Other starts, and the system as released ------------------------------------------------------------


@torch.no_grad()
def test_a_sized_step_norm_starts_at_the_size_of_the_state():
    ids = tokens(B=3)
    h = states_before_loop(small_model(), ids)[:, 1:]
    model = SizedStepNorm(small_qwen(), **CUT)
    model.measure(ids)
    assert torch.allclose(model.step_norm.weight, h.square().mean().sqrt().expand(64, 32))
    by_channel = SizedStepNorm(small_qwen(), size="channel", **CUT)
    by_channel.measure(ids)
    assert torch.allclose(by_channel.step_norm.weight, h.square().mean((0, 1)).sqrt().expand(64, 32))


def test_a_gate_starts_at_the_bias_that_is_given():
    model = GateStart(small_qwen(), gate_bias=-4.0, **CUT)
    h = torch.randn(1, 3, 32)
    assert torch.allclose(model.gate(h, h), torch.tensor(-4.0).sigmoid())


def test_released_keeps_bfloat16_weights_after_steps_at_a_rate_that_stays(tmp_path):
    model = Released(small_qwen(), depth=16, **CUT)
    options = training_options(tmp_path, steps=4, warmup=2)
    optimizer = optimizer_of(model, options, torch.device("cpu"), constant_rate=True)
    rates = []
    optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    train(model, FixedBatches(), FixedBatches(), options, torch.device("cpu"), optimizer=optimizer)
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01])
    for name, p in model.trained_parameters().items():
        assert p.dtype == torch.bfloat16, name
    assert model.DEPTHS == (4, 8, 16)


def test_only_the_table_of_diagonals_is_trained_at_a_multiple_of_the_rate(tmp_path):
    model = small_model(modulation="static")
    options = training_options(tmp_path, norm_lr_scale=50.0)
    usual = optimizer_of(model, options, torch.device("cpu"))
    faster = optimizer_of(model, options, torch.device("cpu"), table_rate=30.0)
    for group, other in zip(usual.param_groups, faster.param_groups):
        is_table = group["params"][0] is model.controller.table
        assert other["scale"] == group["scale"] * (30 if is_table else 1)


# ---- The adapted full model ------------------------------------------------------------------------------


def test_the_adapted_full_model_starts_as_the_full_model_and_trains_adapters_on_every_layer():
    model = AdaptedFull(small_qwen())
    assert torch.allclose(model(tokens()), small_qwen()(tokens()), atol=1e-5)
    trained = model.trained_parameters()
    assert {name.split(".")[0] for name in trained} == {"adapters"}
    assert {name.split(".")[1] for name in trained} == set("012345")
    loss = model.loss(tokens(), tokens())
    loss.backward()
    assert all(p.grad is not None for p in trained.values())


VARIANTS = [
    (RandomBases, {}),
    (OwnBases, {}),
    (ZeroInput, {}),
    (MeanInput, {}),
    (TokenInput, {}),
    (WindowInput, {}),
    (SizedStepNorm, {"size": "channel"}),
    (GateStart, {"gate_bias": 0.0}),
    (DrawnDepth, {}),
    (Rounded, {}),
    (Released, {}),
    (Seams, {"one_seam": "in", "train_coda": "none"}),
    (LowRank, {"train_coda": "all"}),
    (PaperCut, {"train_coda": "all"}),
    (StepAdapters, {"train_coda": "all", "modulation": "none"}),
    (AdaptedFull, {}),
    *((Alternative, {"kind": kind}) for kind in KINDS),
]


@pytest.mark.parametrize("kind, settings", VARIANTS, ids=str)
def test_a_saved_variant_comes_back_bit_for_bit(kind, settings, tmp_path):
    base = folder_of(small_qwen(), tmp_path / "base")
    model = kind(Qwen.from_pretrained(base), depth=2, **settings, **CUT)
    move_trained_weights(model, 0.1)
    model.save(tmp_path / "run")
    again = kind.load(tmp_path / "run")
    assert torch.equal(again(tokens()), model(tokens()))
    assert again.trained_parameters().keys() == model.trained_parameters().keys()


# ---- SmolLM2 ---------------------------------------------------------------------------------------------

# The fields of a GGUF file that holds a model of the sizes of SMALL.
GGUF_METADATA = {
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.block_count": 6,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["<|endoftext|>", *(chr(33 + i) for i in range(94)), "ab", "12"],
    "tokenizer.ggml.token_type": [3] + [1] * 96,
    "tokenizer.ggml.merges": ["a b", "1 2"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
}


def gguf_weights(qwen: Qwen) -> dict:
    """The weights of a model under the names and in the order of a GGUF file: rotary pairs are neighbours."""
    state = qwen.state_dict()
    weights = {"token_embd.weight": state["embed_tokens.weight"], "output_norm.weight": state["norm.weight"]}
    for i in range(qwen.config.num_hidden_layers):
        for name, hub_name in LAYER_NAMES.items():
            weight = state[f"layers.{i}.{hub_name}.weight"]
            if name in ("attn_q", "attn_k"):
                rows = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of one head of 8 channels
                heads = len(weight) // 8
                weight = weight[torch.cat([rows + 8 * head for head in range(heads)])]
            weights[f"blk.{i}.{name}.weight"] = weight
    return weights


@torch.no_grad()
def test_a_model_comes_back_from_the_tensors_of_a_gguf_file(tmp_path):
    qwen = small_qwen(config=replace(SMALL, rms_norm_eps=1e-5, attention_bias=False))
    write_model(GGUF_METADATA, gguf_weights(qwen), tmp_path)
    again = Qwen.from_pretrained(tmp_path)
    assert again.config == replace(qwen.config, eos_token_id=(0,))
    assert torch.equal(again(tokens()), qwen(tokens()))


def test_the_tokenizer_of_a_gguf_file_merges_letters_and_no_digits(tmp_path):
    write_model(GGUF_METADATA, gguf_weights(small_qwen()), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab12<|endoftext|>").tokens == ["ab", "1", "2", "<|endoftext|>"]
    assert tokenizer.decode(tokenizer.encode("ab12<|endoftext|>").ids) == "ab12"


def test_prose_is_what_a_page_says_outside_its_head_code_tables_and_menus():
    html = """<html><head><title>Title</title></head><body><nav><p>Menu</p></nav>
        <h1>Heading</h1><p>First &amp;   <b>second</b>.</p><pre>code</pre><table><tr><td>cell</table>
        <p>Third.</p><script>run()</script></body></html>"""
    assert prose(html) == "Heading\nFirst & second.\n\nThird."


def test_a_text_has_each_long_page_once_and_few_of_them_are_held_out(tmp_path):
    contents = {"short.html": "<p>short</p>", "genindex-A.html": "<p>an index</p>" * 200}
    for i in range(100):
        contents[f"page{i}.html"] = f"<p>number {i} of</p>" + "<p>a long page</p>" * 200
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    write_text([tmp_path / name for name in contents], tmp_path)

    train = (tmp_path / "train.txt").read_text().split("\n<|endoftext|>\n")
    val = (tmp_path / "val.txt").read_text().split("\n<|endoftext|>\n")
    assert 1 <= len(val) <= 12
    first_lines = [text.splitlines()[0] for text in train + val]
    assert sorted(first_lines) == sorted(f"number {i} of" for i in range(100))
