"""qwen.py: the same numbers as transformers, and checkpoints that are read as they say or refused.

Parity on other checkpoints: PARITY_FOLDERS="folder folder" pytest tests/test_qwen.py
"""

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, folder_of, shard, small_model, small_qwen, tokens
from safetensors.torch import load_file, save_file
from torch import nn

from files import UserError
from qwen import Config, Qwen, rotary_at

# ---- Parity ----------------------------------------------------------------------------------------------

needs_transformers = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")

# (heads, key-value heads, tied) of the published sizes; the width is scaled down to 16 channels a head
LAYOUTS = {
    "0.5B": (14, 2, True),
    "1.5B": (12, 2, True),
    "3B": (16, 2, True),
    "7B": (28, 4, False),
    "14B": (40, 8, False),
    "32B": (40, 8, False),
    "72B": (64, 8, False),
}


@torch.no_grad()
def assert_parity(folder, vocabulary: int):
    """The logits of 200 tokens and 20 tokens of greedy generation are those of transformers."""
    from transformers import AutoModelForCausalLM

    ours = Qwen.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    theirs.eval()

    ids = tokens(2, 200, vocabulary=vocabulary)
    logits = theirs(ids).logits
    largest = logits.abs().max()
    assert (ours(ids) - logits).abs().max() < max(1e-4, 1e-5 * largest)  # rounding grows with the logits
    prompt = ids[:1, :20]
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, 20), expected)


@needs_transformers
@pytest.mark.parametrize("size", LAYOUTS)
def test_parity_with_transformers_for_each_published_head_layout(size, tmp_path):
    heads, kv_heads, tied = LAYOUTS[size]
    config = Config(
        vocab_size=211,
        hidden_size=16 * heads,
        intermediate_size=24 * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    qwen = Qwen(config)
    for p in qwen.parameters():
        mean = 0.0 if p.ndim == 2 else 0.5
        nn.init.normal_(p, mean=mean, std=0.05)
    assert_parity(folder_of(qwen, tmp_path), 211)


@needs_transformers
@pytest.mark.parametrize("seed", range(6))
def test_parity_with_transformers_for_random_llamas(seed, tmp_path):
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.integers(1, 4))
    config = Config(
        vocab_size=211,
        hidden_size=72,  # any number of heads here divides it
        intermediate_size=int(rng.integers(20, 90)),
        num_hidden_layers=2,
        num_attention_heads=kv_heads * int(rng.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=2 * int(rng.integers(2, 12)),
        rope_theta=float(rng.choice([1e4, 1e5])),
        rms_norm_eps=float(rng.choice([1e-5, 1e-6])),
        tie_word_embeddings=seed % 2 == 0,
        attention_bias=False,
    )
    llama = dict(model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False)
    assert_parity(folder_of(small_qwen(seed, config), tmp_path, **llama), 211)


@needs_transformers
@pytest.mark.parametrize("folder", os.environ.get("PARITY_FOLDERS", "").split())
def test_parity_of_pretrained_models_as_llamas(folder, tmp_path):
    qwen = Qwen.from_pretrained(folder)
    biases = [p for name, p in qwen.named_parameters() if name.endswith("proj.bias")]
    if any(bias.any() for bias in biases):
        pytest.skip("a Llama has no biases")
    for layer in qwen.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            layer.self_attn.get_submodule(name).bias = None
    llama = dict(model_type="llama", architectures=["LlamaForCausalLM"], use_sliding_window=None)
    folder_of(qwen, tmp_path, **llama)
    assert_parity(tmp_path, 4096)


@needs_transformers
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_the_defaults_of_config_json_are_those_of_transformers(model_type, tmp_path):
    from transformers import AutoConfig

    required = dict(
        vocab_size=211,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=32,
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **required}))
    ours = Config.from_pretrained(tmp_path)
    theirs = AutoConfig.for_model(model_type, **required)
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    end = theirs.eos_token_id
    assert ours.eos_token_id == (() if end is None else (end,))


@needs_transformers
@pytest.mark.parametrize("folder", [str(ROOT / "tiny"), *os.environ.get("PARITY_FOLDERS", "").split()])
def test_parity_with_transformers_on_pretrained_models(folder):
    assert_parity(folder, 4096)


def test_tiny_gives_the_stored_logits_that_transformers_gave():
    ids = torch.tensor([[11, 500, 42, 4000, 7, 7, 1234, 99]])
    # transformers 5.23.0 in float32
    stored = [-3.45378, 1.05365, 2.62292, -0.1031, 0.04303, -0.19033, 0.30849, 5.51185]
    logits = Qwen.from_pretrained("tiny")(ids)
    assert torch.allclose(logits[0, -1, :8], torch.tensor(stored), atol=1e-4)


# ---- Rotary positions ------------------------------------------------------------------------------------


def test_the_rotary_table_is_float32_in_a_bfloat16_model_whose_logits_stay_close():
    cos, sin = rotary_at(SMALL, 0, 1003, "cpu")
    assert cos.dtype == sin.dtype == torch.float32
    exact = small_qwen()(tokens())
    rounded = small_qwen(dtype=torch.bfloat16)(tokens())
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_the_rows_of_the_rotary_table_do_not_depend_on_where_a_call_begins():
    cos, sin = rotary_at(SMALL, 0, 3000, "cpu")
    for first, length in ((0, 1), (1, 7), (1020, 9), (2999, 1)):
        rows = slice(first, first + length)
        some_cos, some_sin = rotary_at(SMALL, first, length, "cpu")
        assert torch.equal(some_cos, cos[rows])
        assert torch.equal(some_sin, sin[rows])


def test_what_generation_computed_does_not_stand_in_the_way_of_training():
    model = small_model()
    ids = tokens(T=11)
    with torch.inference_mode():
        model(ids)
    model.loss(ids, ids).backward()


def test_rope_theta_is_read_at_the_top_and_inside_rope_parameters(tmp_path):
    old = folder_of(small_qwen(), tmp_path / "old", rope_theta=5e5)
    new = folder_of(small_qwen(), tmp_path / "new", rope_parameters={"rope_theta": 5e5})
    assert Config.from_pretrained(old).rope_theta == 5e5
    assert Config.from_pretrained(new).rope_theta == 5e5


# ---- Checkpoints -----------------------------------------------------------------------------------------


def test_untied_heads_shards_and_the_absence_of_biases_are_read_as_the_checkpoint_says(tmp_path):
    config = replace(SMALL, tie_word_embeddings=False, attention_bias=False)
    qwen = small_qwen(config=config)
    folder = folder_of(qwen, tmp_path)
    ids = tokens()
    expected = qwen(ids)
    assert torch.equal(Qwen.from_pretrained(folder)(ids), expected)

    shard(folder)
    assert not (folder / "model.safetensors").exists()
    loaded = Qwen.from_pretrained(folder)
    assert torch.equal(loaded(ids), expected)
    assert loaded.layers[0].self_attn.q_proj.bias is None
    assert loaded.lm_head is not None


def test_a_layer_that_is_not_asked_for_takes_no_memory(tmp_path):
    qwen = small_qwen()
    some = Qwen.from_pretrained(folder_of(qwen, tmp_path), layers=[0, 5])
    for i in (0, 5):
        assert torch.equal(some.layers[i].mlp.up_proj.weight, qwen.layers[i].mlp.up_proj.weight)
    for i in (1, 2, 3, 4):
        assert list(some.layers[i].parameters()) == []


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    folder = folder_of(small_qwen(), tmp_path)
    qwen = Qwen.from_pretrained(folder)
    before = qwen(tokens())
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:  # in place: a file that is mapped into memory would be seen to change
        file.write(bytes(path.stat().st_size))
    assert torch.equal(qwen(tokens()), before)


def test_a_copy_of_a_tied_head_and_stored_rotary_constants_are_passed_over(tmp_path):
    folder = folder_of(small_qwen(), tmp_path)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors")
    assert torch.equal(Qwen.from_pretrained(folder)(tokens()), small_qwen()(tokens()))


# ---- What is refused -------------------------------------------------------------------------------------


def assert_cannot_be_loaded(folder, message: str):
    with pytest.raises(UserError, match=message) as caught:
        Qwen.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "'model_type': 'mistral'"),
        ({"model_type": "llama", "mlp_bias": True}, "'mlp_bias': True.*without biases"),
        ({"model_type": "llama", "attention_bias": True}, "'attention_bias': True.*without biases"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'rope_type': 'llama3'.*without rope scaling",
        ),
        ({"model_type": "llama", "num_attention_heads": 5}, "do not fit together"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "'full_attention'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor': 0.5"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised weights \(gptq\)"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised weights \(awq\)"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantised weights \(quantization_config\)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantised weights \(quantization\)"),
        ({"torch_dtype": "float8_e4m3fn"}, r"quantised weights \(float8_e4m3fn\).*bfloat16"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'type': 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "'rope_type': 'yarn'"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "'use_sliding_window': True"),
        ({"hidden_size": "wide"}, "cannot be read as the config.json"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "do not fit together"),
        ({"num_hidden_layers": 7}, r"layers\.6\.\S+ is missing"),
        ({"num_hidden_layers": 5}, r"layers\.5\.\S+ is not a part of the model"),
        ({"intermediate_size": 40}, r"has shape \[\d+, \d+\], not \[\d+, \d+\]"),
    ],
)
def test_a_checkpoint_that_the_decoder_cannot_run_is_refused_in_one_line(changes, message, tmp_path):
    assert_cannot_be_loaded(folder_of(small_qwen(), tmp_path, **changes), message)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_tensors_of_a_quantised_type_are_refused(dtype, tmp_path):
    folder = folder_of(small_qwen(), tmp_path)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].to(dtype)
    save_file(state, folder / "model.safetensors")
    assert_cannot_be_loaded(folder, "up_proj.weight is .* cannot run; name the model from which they")


def test_a_wrong_type_is_no_damage_of_the_file(tmp_path):
    folder = folder_of(small_qwen(), tmp_path)
    with pytest.raises(TypeError):
        Qwen.from_pretrained(folder, dtype="float32")


def test_damage_is_named(tmp_path):
    folder = folder_of(small_qwen(), tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_cannot_be_loaded(folder, "model.safetensors: cannot be read as a whole")
    path.write_bytes(b"{}")
    assert_cannot_be_loaded(folder, "model.safetensors: cannot be read as a whole")
    path.unlink()
    assert_cannot_be_loaded(folder, "model.safetensors: no such file")
    (folder / "config.json").write_text("{")
    assert_cannot_be_loaded(folder, "config.json: cannot be read")
    shutil.rmtree(folder)
    assert_cannot_be_loaded(folder, "no such folder")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = folder_of(small_qwen(), tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "../model/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_cannot_be_loaded(folder, "index of safetensors files beside it")
