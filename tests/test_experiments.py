"""The models of experiments/ are what they say, and the published tables are those of their logs."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers import (
    ROOT,
    SMALL,
    folder_of,
    move_trained_weights,
    small_model,
    small_qwen,
    tokens,
)

from experiments.paper_tables import write_all
from experiments.smollm2 import LAYER_NAMES, prose, write_model, write_text
from experiments.variants import Alternative, DrawnDepth, LowRank, RandomBases, Rounded, Seams
from hub import load_tokenizer
from ouroboros import Ouroboros
from qwen import PROJECTIONS, Qwen, rotary_at

CUT = dict(prelude=2, recurrent=3, coda=2, rank=4)
KINDS = ("scale", "matrix", "lora", "lora one", "layer")

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
    if kind == "layer":
        layers[3].load_state_dict(model.recurrent.state_dict())

    rotary = rotary_at(SMALL, 0, ids.shape[1], "cpu")
    h = model.embed_tokens(ids)
    for i in (0, 1, 3, 4, 5):
        h = layers[i](h, rotary)
        if i == 3 and kind == "scale":
            h = h * model.behind_recurrent.scale
        if i == 3 and kind == "matrix":
            h = h @ model.behind_recurrent.weight.T
    assert torch.allclose(model(ids), model.norm(h) @ model.head_weight.T, atol=1e-4)
    assert not torch.allclose(model(ids), start, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_alternative_trains_nothing_else(kind):
    trained = alternative(kind).trained_parameters()
    prefixes = {
        "scale": ("behind_recurrent.",),
        "matrix": ("behind_recurrent.",),
        "lora": ("prelude_adapters.", "recurrent_adapter.", "coda_adapters."),
        "lora one": ("recurrent_adapter.",),
        "layer": ("recurrent.",),
    }
    found = {name.split(".")[0] + "." for name in trained}
    assert found == set(prefixes[kind])
    if kind == "layer":
        assert len(trained) == len(small_qwen().layers[3].state_dict())


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


@pytest.mark.parametrize("seams", ["in", "out", "none"])
def test_only_the_seam_that_is_named_is_trained(seams):
    model = Seams(small_qwen(), seams, train_coda="none", **CUT)
    assert model.seam_in.P.weight.requires_grad == (seams == "in")
    assert model.seam_out.P.weight.requires_grad == (seams == "out")
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


VARIANTS = [
    (RandomBases, {}),
    (DrawnDepth, {}),
    (Rounded, {}),
    (Seams, {"seams": "in", "train_coda": "none"}),
    (LowRank, {"train_coda": "all"}),
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


# ---- Tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_the_tables_in_the_repository_are_those_of_the_logs_beside_them(model, tmp_path):
    results = ROOT / "experiments" / "paper" / model
    again = tmp_path / model
    shutil.copytree(results, again, ignore=shutil.ignore_patterns("*.md", "*.png", "*.svg"))
    write_all(again)
    assert (again / "tables.md").read_text() == (results / "tables.md").read_text()
    assert {path.name for path in again.iterdir()} == {path.name for path in results.iterdir()}


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
