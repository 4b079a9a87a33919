"""qwen.py: the same numbers as transformers, generation, and checkpoints that are read or refused.

Parity on other checkpoints: PARITY_FOLDERS="folder folder" pytest tests/test_qwen.py
"""

import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, folder_of, shard, small_model, small_qwen, tokens
from safetensors.torch import load_file, save_file

from ouroboros import Ouroboros
from qwen import Config, Qwen, load_tokenizer, next_token
from support.files import UserError

# ---- Parity ----------------------------------------------------------------------------------------------

needs_transformers = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")


@torch.no_grad()
def assert_parity(folder, vocabulary: int):
    """The logits of 200 tokens and 20 tokens of greedy generation are those of transformers."""
    from transformers import AutoModelForCausalLM

    ours = Qwen.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = tokens(2, 200, vocabulary=vocabulary)
    logits = theirs(ids).logits
    assert (ours(ids) - logits).abs().max() < max(1e-4, 1e-5 * logits.abs().max())
    prompt = ids[:1, :20]
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, 20), expected)


SHAPES = [dict(), dict(num_key_value_heads=1), dict(num_key_value_heads=4), dict(head_dim=6)]
SHAPES += [dict(tie_word_embeddings=False), dict(rms_norm_eps=1e-3, rope_theta=1e6)]


@needs_transformers
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_random_model_has_the_logits_and_the_tokens_of_transformers(shape, model_type, tmp_path):
    config = replace(SMALL, attention_bias=model_type == "qwen2", **shape)
    assert_parity(folder_of(small_qwen(config=config), tmp_path, model_type=model_type), 97)


@needs_transformers
@pytest.mark.parametrize("folder", [str(ROOT / "tiny"), *os.environ.get("PARITY_FOLDERS", "").split()])
def test_a_pretrained_model_has_the_logits_and_the_tokens_of_transformers(folder):
    assert_parity(folder, 4096)


def test_tiny_gives_the_stored_logits_of_transformers_5_23_in_float32():
    ids = torch.tensor([[11, 500, 42, 4000, 7, 7, 1234, 99]])
    stored = [-3.45378, 1.05365, 2.62292, -0.1031, 0.04303, -0.19033, 0.30849, 5.51185]
    logits = Qwen.from_pretrained("tiny")(ids)
    assert torch.allclose(logits[0, -1, :8], torch.tensor(stored), atol=1e-4)


# ---- Generation ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model", [small_qwen(), small_model().cut], ids=["plain", "cut"])
def test_the_cache_changes_no_logits(model):
    cache = model.new_cache()
    logits = [model(piece, cache=cache) for piece in tokens().split([4, 1, 1, 6], dim=1)]
    assert torch.allclose(torch.cat(logits, dim=1), model(tokens()), atol=1e-5)


def sampled(eos_token_id=()) -> list[list[int]]:
    """12 new tokens for each of two prompts, drawn with seed 0 at a temperature at which they vary."""
    torch.manual_seed(0)
    model = small_qwen(config=replace(SMALL, eos_token_id=eos_token_id))
    return model.generate(tokens(B=2), 12, temperature=3.0)[:, 12:].tolist()


def test_a_text_ends_at_any_end_token_and_is_padded_until_all_have_ended():
    first, second = sampled()
    end, other_end = first[2], second[4]
    assert not {end, other_end}.intersection(first[:2] + second[:4])
    assert sampled(eos_token_id=(end, other_end)) == [first[:3] + [end, end], second[:5]]


def test_tokens_are_drawn_with_the_probabilities_of_the_temperature():
    logits = torch.randn(1, 8)
    drawn = next_token(logits.expand(20_000, -1), temperature=2.0, top_p=1.0)
    shares = torch.bincount(drawn[:, 0], minlength=8) / 20_000
    assert (shares - (logits[0] / 2.0).softmax(-1)).abs().max() < 0.015  # about four standard errors


@pytest.mark.parametrize("top_p, kept", [(1e-6, {1}), (0.49, {1}), (0.51, {1, 3}), (0.9, {0, 1, 3})])
def test_top_p_draws_from_the_likeliest_tokens_that_have_it_together(top_p, kept):
    logits = torch.tensor([[0.1, 0.5, 0.05, 0.35]]).log()
    drawn = next_token(logits.expand(2_000, -1), temperature=1.0, top_p=top_p)
    assert set(drawn[:, 0].tolist()) == kept


WRONG_NUMBERS = [("temperature", -1), ("temperature", 1e-40), ("temperature", float("nan"))]
WRONG_NUMBERS += [("top_p", 0), ("top_p", 1.5), ("top_p", float("nan")), ("max_new_tokens", 0)]
WRONG_NUMBERS += [("temperature", "1"), ("top_p", "1"), ("top_p", None), ("max_new_tokens", 2.0)]


@pytest.mark.parametrize("name, value", WRONG_NUMBERS)
def test_a_number_out_of_its_range_is_one_line_that_names_it(name, value):
    model = small_qwen()
    model.hidden = None  # it is told before any work
    with pytest.raises(UserError, match=name):
        model.generate(tokens(), **{"temperature": 1.0, name: value})


# ---- Loading ---------------------------------------------------------------------------------------------


def test_shards_are_found_through_their_index_if_there_is_no_single_file(tmp_path):
    folder = shard(folder_of(small_qwen(seed=1), tmp_path))
    assert torch.equal(Qwen.from_pretrained(folder)(tokens()), small_qwen(seed=1)(tokens()))
    folder_of(small_qwen(), folder)
    assert torch.equal(Qwen.from_pretrained(folder)(tokens()), small_qwen()(tokens()))


@pytest.mark.parametrize("dtype, is_in_the_file", [(torch.float32, False), (None, True)], ids=str)
def test_only_with_dtype_none_the_weights_stay_in_their_file(dtype, is_in_the_file, tmp_path):
    qwen = Qwen.from_pretrained(folder_of(small_qwen(), tmp_path), dtype=dtype)
    before = qwen(tokens())
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:  # in place: what is mapped from the file changes with it
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 4))
    assert torch.equal(qwen(tokens()), before) != is_in_the_file


ENDS = [(7, (7,)), ([7, 9], (7, 9)), (None, ()), ([], ()), ([7, 151643], (7,))]


@pytest.mark.parametrize("value, expected", ENDS, ids=str)
def test_the_end_tokens_of_config_json_are_a_number_a_list_or_null(value, expected, tmp_path):
    folder = folder_of(small_qwen(), tmp_path, eos_token_id=value)
    assert Config.from_pretrained(folder).eos_token_id == expected


def test_the_end_tokens_of_both_config_files_and_of_the_tokenizer_count(pretrained, tmp_path):
    folder = folder_of(small_qwen(config=replace(SMALL, vocab_size=400)), tmp_path, eos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7, 5]}')
    shutil.copy(pretrained / "tokenizer.json", folder)
    assert Config.from_pretrained(folder).eos_token_id == (7, 9, 5, 0)


def test_without_a_number_of_key_value_heads_each_head_has_its_own(tmp_path):
    folder = folder_of(small_qwen(), tmp_path, num_key_value_heads=None)
    assert Config.from_pretrained(folder).num_key_value_heads == SMALL.num_attention_heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_the_fingerprint_is_the_same_for_every_dtype_and_for_shards(dtype, tmp_path):
    folder = folder_of(small_qwen(), tmp_path)
    assert Qwen.from_pretrained(folder, dtype).fingerprint() == small_qwen().fingerprint()
    assert Qwen.from_pretrained(shard(folder), dtype).fingerprint() == small_qwen().fingerprint()


def test_other_weights_or_another_config_have_another_fingerprint():
    changed = small_qwen()
    changed.layers[3].self_attn.k_proj.bias *= 1.1
    other_theta = small_qwen(config=replace(SMALL, rope_theta=5e5))
    assert len({qwen.fingerprint() for qwen in (small_qwen(), changed, other_theta)}) == 3


# ---- What is refused -------------------------------------------------------------------------------------


def assert_refused(folder, message: str):
    """Opening a folder's model and tokenizer is a UserError of one line that says this."""
    with pytest.raises(UserError, match=message) as caught:
        Qwen.from_pretrained(folder)
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


REFUSED = [
    ({"model_type": "mistral"}, "model_type is mistral"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias is True"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is llama3"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
    ({"num_key_value_heads": 3}, "do not fit together"),
    ({"num_hidden_layers": 7}, r"weights do not fit.*layers\.6"),
    ({"intermediate_size": 40}, "weights do not fit.*size mismatch"),
    ({"eos_token_id": "151643"}, "eos_token_id is '151643'"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings is true"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=str)
def test_a_config_json_that_the_decoder_cannot_run_is_refused_by_name(changes, message, tmp_path):
    assert_refused(folder_of(small_qwen(), tmp_path, **changes), message)


def test_a_head_beside_a_tied_embedding_must_be_the_same(tmp_path):
    untied = small_qwen(config=replace(SMALL, tie_word_embeddings=False))
    assert_refused(folder_of(untied, tmp_path, tie_word_embeddings=True), "tie_word_embeddings must be false")
    untied.lm_head.weight.copy_(untied.embed_tokens.weight)
    tied = Qwen.from_pretrained(folder_of(untied, tmp_path, tie_word_embeddings=True))
    assert torch.equal(tied(tokens()), untied(tokens()))


def test_a_type_that_is_no_float_type_of_torch_is_one_line(tmp_path):
    small_model(qwen=Qwen.from_pretrained("tiny")).save(tmp_path)
    for load, folder in ((Qwen.from_pretrained, "tiny"), (Ouroboros.load, tmp_path)):
        with pytest.raises(UserError, match="dtype 'bfloat16': give one of torch.float32"):
            load(folder, dtype="bfloat16")


def test_tensors_of_a_quantised_type_are_refused_by_name(tmp_path):
    state = load_file(folder_of(small_qwen(), tmp_path) / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "model.safetensors")
    assert_refused(tmp_path, "model.safetensors: model.norm.weight is .* quantised")


FILES = ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"]
FILES.append("model-00002-of-00002.safetensors")
DAMAGE = {
    "absent": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "with a flipped byte": lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
    "other JSON": lambda path: path.write_bytes(b"[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_absent_or_damaged_is_one_line_that_names_it(name, damage, pretrained, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "model")
    if not (folder / name).exists():
        shard(folder)
    DAMAGE[damage](folder / name)
    # without its index, a folder of shards lacks a model.safetensors
    assert_refused(folder, f"{name.removesuffix('.index.json')}.*: (is not|no such file)")
