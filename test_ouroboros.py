"""What this program claims, as tests. With transformers installed the parity tests are live.

Parity on other checkpoints: PARITY_FOLDERS="folder folder" pytest -k parity
"""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import train
from data import Batches, PythonSource, TextSource, open_source
from ouroboros import (Controller, Gate, Ouroboros, default_cut, prefix_mean, read_checkpoint, sequence_mean,
                       svd_bases)
from qwen import (PROJECTIONS, Config, HeadLoss, KVCache, Qwen, UserError, attend, exit_on_user_error,
                  load_tokenizer, rotary_tables, rotate)

HERE = Path(__file__).resolve().parent
needs_transformers = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
SMALL = Config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
               num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, eos_token_id=())


def small_qwen(seed=0, config=SMALL, dtype=torch.float32):
    """Random weights, large enough that attention and every bias matter."""
    torch.manual_seed(seed)
    qwen = Qwen(config)
    for p in qwen.parameters():
        nn.init.normal_(p, mean=0.0 if p.ndim == 2 else 0.5, std=0.15)
    return qwen.to(dtype).requires_grad_(False)


def small_model(dtype=torch.float32, randomise=True, **switches):
    """A looped model on it: 2 + 1 + 2 layers, rank 4, depth 3, with trained weights that are not at their start."""
    switches = {"prelude": 2, "recurrent": 3, "coda": 2, "rank": 4, "depth": 3, **switches}
    model = Ouroboros(small_qwen(dtype=dtype), **switches)
    if randomise:
        for p in model.trained_parameters().values():
            p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype)


def tokens(B=2, T=12, seed=1, vocabulary=97):
    return torch.randint(0, vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))


def folder_of(qwen: Qwen, folder: Path, **changes):
    """Write a Qwen as a Hub folder."""
    folder.mkdir(parents=True, exist_ok=True)
    c = qwen.config._asdict()
    config = {**{k: v for k, v in c.items() if k not in ("attention_bias", "eos_token_id")}, "model_type": "qwen2",
              "eos_token_id": list(qwen.config.eos_token_id) or None, "architectures": ["Qwen2ForCausalLM"],
              "hidden_act": "silu", "use_sliding_window": False, "max_position_embeddings": 512, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    state = {n if n == "lm_head.weight" else f"model.{n}": p.contiguous() for n, p in qwen.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# qwen.py: the same numbers as transformers

# heads, key-value heads, tied, of the published sizes; the width is scaled down to 16 channels a head
LAYOUTS = {"0.5B": (14, 2, True), "1.5B": (12, 2, True), "3B": (16, 2, True), "7B": (28, 4, False),
           "14B": (40, 8, False), "32B": (40, 8, False), "72B": (64, 8, False)}


def transformers_model(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def assert_parity(folder, vocabulary):
    ours, theirs, ids = Qwen.from_pretrained(folder), transformers_model(folder), tokens(2, 200, vocabulary=vocabulary)
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
        greedy = theirs.generate(ids[:1, :20], max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids[:1, :20], 20), greedy)


@needs_transformers
@pytest.mark.parametrize("size", LAYOUTS)
def test_parity_with_transformers_for_each_published_head_layout(size, tmp_path):
    heads, kv_heads, tied = LAYOUTS[size]
    config = Config(vocab_size=211, hidden_size=16 * heads, intermediate_size=24 * heads, num_hidden_layers=2,
                    num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16, rope_theta=1e6,
                    tie_word_embeddings=tied)
    torch.manual_seed(0)
    qwen = Qwen(config)
    for p in qwen.parameters():
        nn.init.normal_(p, mean=0.0 if p.ndim == 2 else 0.5, std=0.05)
    assert_parity(folder_of(qwen, tmp_path), 211)


@needs_transformers
@pytest.mark.parametrize("folder", [str(HERE / "tiny"), *os.environ.get("PARITY_FOLDERS", "").split()])
def test_parity_with_transformers_on_pretrained_models(folder):
    assert_parity(folder, 4096)


REFERENCE_IDS = [[11, 500, 42, 4000, 7, 7, 1234, 99]]
REFERENCE = [-3.45378, 1.05365, 2.62292, -0.1031, 0.04303, -0.19033, 0.30849, 5.51185]  # transformers 5.23.0, float32


def test_tiny_gives_the_stored_logits_that_transformers_gave():
    logits = Qwen.from_pretrained("tiny")(torch.tensor(REFERENCE_IDS))[0, -1, :8]
    assert torch.allclose(logits, torch.tensor(REFERENCE), atol=1e-4)


def test_untied_heads_shards_and_the_absence_of_biases_are_read_as_the_checkpoint_says(tmp_path):
    config = Config(**{**SMALL._asdict(), "tie_word_embeddings": False, "attention_bias": False})
    qwen = small_qwen(config=config)
    folder, ids = folder_of(qwen, tmp_path / "one"), tokens()
    expected = qwen(ids)
    assert torch.equal(Qwen.from_pretrained(folder)(ids), expected)
    shard(folder)
    assert not (folder / "model.safetensors").exists()
    loaded = Qwen.from_pretrained(folder)
    assert torch.equal(loaded(ids), expected) and loaded.layers[0].self_attn.q_proj.bias is None
    some = Qwen.from_pretrained(folder, layers=[0, 5])
    assert torch.equal(some.layers[5].mlp.up_proj.weight, qwen.layers[5].mlp.up_proj.weight)
    assert not [*some.layers[3].parameters()]  # what is not asked for takes no memory


def shard(folder):
    """Spread model.safetensors over two files and an index, as the Hub does."""
    state = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, folder / file)
    size = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_rotary_tables_are_float32_in_a_bf16_model_and_bf16_stays_close():
    assert rotary_tables(SMALL, 1003, "cpu")[0].dtype == torch.float32
    exact = small_qwen()(tokens())
    rounded = small_qwen().to(torch.bfloat16)(tokens())
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_tables_made_while_generating_serve_training_too():
    model, ids = small_model(), tokens(T=11)
    rotary_tables.cache_clear()
    with torch.inference_mode():
        model(ids)
    model.loss(ids, ids).backward()


def test_rope_theta_is_read_at_the_top_and_inside_rope_parameters(tmp_path):
    old = Config.from_json(folder_of(small_qwen(), tmp_path / "a", rope_theta=5e5) / "config.json")
    new = Config.from_json(folder_of(small_qwen(), tmp_path / "b", rope_parameters={"rope_theta": 5e5}) / "config.json")
    assert old.rope_theta == new.rope_theta == 5e5


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "llama"}, "'model_type': 'llama'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'type': 'yarn'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "'rope_type': 'yarn'"),
    ({"use_sliding_window": True, "max_window_layers": 2}, "'use_sliding_window': True"),
    ({"hidden_size": "wide"}, "cannot be read as the config.json"),
    ({"num_key_value_heads": 3}, "do not fit together"),
    ({"num_hidden_layers": 7}, "Missing key"),
    ({"num_hidden_layers": 5}, "Unexpected key"),
    ({"intermediate_size": 40}, "size mismatch"),
])
def test_a_checkpoint_it_cannot_run_is_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        Qwen.from_pretrained(folder_of(small_qwen(), tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_harmless_surplus_is_passed_over_and_damage_is_named(tmp_path):
    folder = folder_of(small_qwen(), tmp_path)
    path, state = folder / "model.safetensors", load_file(folder / "model.safetensors")
    duplicate = {"lm_head.weight": state["model.embed_tokens.weight"].clone(),
                 "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**state, **duplicate}, path)
    assert torch.equal(Qwen.from_pretrained(folder)(tokens()), small_qwen()(tokens()))
    path.write_bytes(path.read_bytes()[:-100])
    for break_it, message in [(lambda: None, "model.safetensors: cannot be read as a whole"),
                              (lambda: path.write_bytes(b"{}"), "model.safetensors: cannot be read as a whole"),
                              (path.unlink, "model.safetensors: no such file"),
                              (lambda: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
                              (lambda: shutil.rmtree(folder), "no such folder")]:
        break_it()
        with pytest.raises(UserError, match=message):
            Qwen.from_pretrained(folder)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = folder_of(small_qwen(), tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "../model/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index of safetensors files beside it"):
        Qwen.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# generation


def greedy_without_cache(model, ids, n, **how):
    for _ in range(n):
        ids = torch.cat([ids, model(ids, **how)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


SWITCHES = [{}, {"pool": "sequence"}, {"modulation": "static"}, {"modulation": "none"}, {"gate": False},
            {"step_norm": False}, {"patch": True, "train_coda": "all"}, {"train_coda": "norms", "modulation": "none"},
            {"gate": False, "step_norm": False, "modulation": "none"}]
names = [", ".join(f"{k}={v}" for k, v in s.items()) or "all" for s in SWITCHES]


def test_the_cache_changes_no_token_of_the_plain_model():
    qwen = small_qwen()
    assert torch.equal(qwen.generate(tokens(), 12), greedy_without_cache(qwen, tokens(), 12))


@pytest.mark.parametrize("switches", SWITCHES, ids=names)
def test_the_cache_changes_no_token_of_the_looped_model(switches):
    model = small_model(**switches)
    for depth in (1, 3, 5):
        expected = greedy_without_cache(model, tokens(), 12, depth=depth)
        assert torch.equal(model.generate(tokens(), 12, depth=depth), expected)


def test_a_cache_can_be_fed_in_pieces():
    model, ids = small_model(torch.float64), tokens(T=11)
    cache = defaultdict(KVCache)
    pieces = [model(piece, cache=cache) for piece in ids.split([4, 1, 6], dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), model(ids), atol=1e-9)


def test_generation_stops_at_an_end_token_and_samples_by_temperature():
    qwen, ids = small_qwen(), tokens(B=1)
    free = qwen.generate(ids, 12)[0, 12:].tolist()
    ending = Config(**{**SMALL._asdict(), "eos_token_id": (free[3], 96)})
    assert small_qwen(config=ending).generate(ids, 12)[0, 12:].tolist() == free[: free.index(free[3]) + 1]
    torch.manual_seed(0)
    draws = torch.stack([qwen.generate(ids, 4, temperature=5.0) for _ in range(5)])
    assert len(draws.unique(dim=0)) > 1
    assert torch.equal(qwen.generate(ids, 4, temperature=1e-4), qwen.generate(ids, 4))


# ---------------------------------------------------------------------------------------------------------------------
# ouroboros.py


def test_qwen2_5_3b_at_rank_32_trains_9214592_parameters():
    with torch.device("meta"):
        qwen = Qwen(Config(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                           num_attention_heads=16, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True))
        model = Ouroboros(qwen, rank=32)
    parts = {"controller": 692_864, "gate": 8_390_656, "step_norm": 131_072}
    for part, expected in parts.items():
        assert sum(p.numel() for p in getattr(model, part).parameters()) == expected
    assert sum(p.numel() for p in model.trained_parameters().values()) == 9_214_592
    assert (len(model.prelude), len(model.coda)) == (8, 8) and model.recurrent is qwen.layers[18]


def test_the_cut_keeps_the_papers_proportions():
    assert {L: default_cut(L) for L in (12, 24, 28, 30, 36)} == {
        12: (3, 6, 3), 24: (5, 12, 5), 28: (6, 14, 6), 30: (7, 15, 7), 36: (8, 18, 8)}


def test_shapes():
    model, ids = small_model(), tokens()
    assert model(ids).shape == model(ids, depth=7).shape == model.cut(ids).shape == (2, 12, 97)
    assert model.hidden(ids).shape == (2, 12, 32) and model.loss(ids, ids).shape == ()
    assert model.generate(ids, max_new_tokens=5).shape == (2, 17)
    assert prefix_mean(torch.randn(2, 12, 32)).shape == (2, 12, 32)
    assert sequence_mean(torch.randn(2, 12, 32)).shape == (2, 1, 32)
    m = Controller(32, rank=4)(torch.randn(2, 12, 32), 0)
    assert len(m) == 7 and all(diagonal.shape == (2, 12, 4) for diagonal in m)
    for lora, name in zip(model.lora, PROJECTIONS):
        out_features, in_features = model.recurrent.get_submodule(name).weight.shape
        assert lora.A.shape == (4, in_features) and lora.B.shape == (out_features, 4)


def written_out(model, ids):
    """The looped model again, from the equations at the head of ouroboros.py, one position at a time."""
    s, layers = model.settings, small_qwen(dtype=torch.float64).layers
    P, C, r = s["prelude"], s["coda"], s["rank"]
    h = model.embed_tokens(ids).double()
    rotary = rotary_tables(SMALL, ids.shape[1], "cpu")
    for layer in layers[:P]:
        h = layer(h, rotary)
    for t in range(s["depth"]):
        per_position = []
        for i in range(ids.shape[1]):  # with this position's own weights, run everything up to it and keep its row
            pooled = h[:, : i + 1].mean(dim=1)
            m = [diagonal[0] for diagonal in model.controller(pooled, t)]
            layer = small_qwen(dtype=torch.float64).layers[s["recurrent"]]
            for k, name in enumerate(PROJECTIONS):
                A, B = model.lora[k].A, model.lora[k].B
                layer.get_submodule(name).weight += s["alpha"] / r * B @ torch.diag(m[k]) @ A
            per_position.append(layer)
        # Keys and values of position j come from j's own weights, so attention is put together by hand.
        h = torch.cat([h_new_at(per_position, h, i, rotary, model, t) for i in range(ids.shape[1])], dim=1)
    for layer in layers[len(layers) - C :]:
        h = layer(h, rotary)
    return model.norm(h) @ model.head.T


def h_new_at(per_position, h, i, rotary, model, t):
    layer, cache = per_position[i], KVCache()
    x = layer.input_layernorm(h)
    for j in range(i):
        a = per_position[j].self_attn
        k, v = (p(x[:, j : j + 1]).view(len(h), 1, -1, a.head_dim).transpose(1, 2) for p in (a.k_proj, a.v_proj))
        cache.append(rotate(k, [table[j : j + 1] for table in rotary]), v)
    new = layer(h[:, i : i + 1], [table[i : i + 1] for table in rotary], cache)
    new = new / (new.square().mean(-1, keepdim=True) + SMALL.rms_norm_eps).sqrt() * model.step_norm.weight[t]
    old = h[:, i : i + 1]
    g = torch.sigmoid(torch.cat([new, old], -1) @ model.gate.linear.weight.T + model.gate.linear.bias)
    return g * new + (1 - g) * old


def test_the_model_is_what_its_equations_say():
    model, ids = small_model(torch.float64), tokens(B=1, T=6)
    with torch.no_grad():
        assert torch.allclose(model(ids), written_out(model, ids), atol=1e-6)


@pytest.mark.parametrize("pool, leaks", [("prefix", False), ("sequence", True)])
def test_the_future_does_not_change_the_past_unless_the_pool_sees_it(pool, leaks):
    model, ids = small_model(pool=pool), tokens()
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 97
    change = (model(ids)[:, :8] - model(other)[:, :8]).abs().max()
    assert (change > 1e-3) if leaks else (change == 0)


def test_the_prefix_mean_is_summed_in_float32():
    h = torch.full((1, 5000, 1), 1.01, dtype=torch.bfloat16)
    assert prefix_mean(h)[0, -1, 0] == h[0, 0, 0]


def test_zero_heads_mean_no_modulation():
    plain, zero = small_model(randomise=False, modulation="none"), small_model(randomise=False)
    assert torch.equal(plain(tokens()), zero(tokens()))
    nn.init.normal_(zero.controller.heads.weight)
    assert not torch.allclose(plain(tokens()), zero(tokens()), atol=1e-3)


def test_the_gate_keeps_88_percent_at_the_start():
    new, old = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    assert torch.allclose(Gate(32)(new, old), 0.1192 * new + 0.8808 * old, atol=1e-4)


def test_steps_past_the_trained_depth_reuse_the_last_trained_steps_embedding_and_norm():
    model, ids = small_model(), tokens()
    before = model(ids, depth=5)
    with torch.no_grad():
        model.controller.step.weight[3:] += 1
        model.step_norm.weight[3:] += 1
        assert torch.equal(model(ids, depth=5), before)
        model.step_norm.weight[2] += 1
        assert not torch.equal(model(ids, depth=5), before)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("train_coda", ["none", "norms", "lora", "all"])
def test_with_patch_training_starts_exactly_from_the_cut_model(depth, train_coda):
    model, ids = small_model(randomise=False, depth=depth, patch=True, train_coda=train_coda), tokens()
    assert torch.equal(model(ids), model.cut(ids))
    assert not torch.allclose(small_model(randomise=False, depth=depth)(ids), model.cut(ids), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("modulation", ["none", "static"])
@pytest.mark.parametrize("train_coda, adapted", [("lora", (4, 5)), ("all", (0, 1, 3, 4, 5))])
def test_what_patch_and_adapters_train_is_what_their_equations_say(train_coda, adapted, modulation):
    switches = dict(modulation=modulation, depth=2, patch=True, train_coda=train_coda)
    model, ids = small_model(torch.float64, **switches), tokens()
    layers, rotary = small_qwen(dtype=torch.float64).layers, rotary_tables(SMALL, 12, "cpu")
    assert len(model.adapters) == len(adapted)
    for layer, adapter in zip((layers[i] for i in adapted), model.adapters):  # written into the layers' weights
        for norm, change in zip((layer.input_layernorm, layer.post_attention_layernorm), adapter.change):
            norm.weight *= 1 + change
        for name, A, B in zip(PROJECTIONS, adapter.A, adapter.B):
            layer.get_submodule(name).weight += B.weight @ A.weight
    h = layers[1](layers[0](model.embed_tokens(ids), rotary), rotary)
    h = h + h @ model.patches[0].weight.T
    for t, o in enumerate(model.opening):
        looped = deepcopy(layers[3])
        for k, name in enumerate(PROJECTIONS if modulation == "static" else ()):
            A, B, m = model.lora[k].A, model.lora[k].B, model.controller.table[t, k]
            looped.get_submodule(name).weight += 16 / 4 * B @ torch.diag(m) @ A
        h = (1 - o) * h + o * looped(h, rotary)
    h = h + h @ model.patches[1].weight.T
    h = layers[5](layers[4](h, rotary), rotary)
    assert torch.allclose(model(ids), model.norm(h) @ model.head.T, atol=1e-10)
    assert torch.equal(model.cut(ids), small_model(torch.float64).cut(ids))  # the baseline has none of it


@torch.no_grad()
@pytest.mark.parametrize("kind", ["scale", "matrix", "lora", "lora one", "layer"])
def test_the_alternatives_of_the_experiments_are_what_they_say(kind):
    from experiments.paper import Alternative  # here, since it brings more than the other tests need
    model, ids = Alternative(small_qwen(), kind, prelude=2, recurrent=3, coda=2, rank=4, depth=1), tokens()
    start, trained = model.cut(ids), model.trained_parameters().values()
    assert torch.allclose(model(ids), start, atol=1e-5)
    if kind.startswith("lora"):  # of the size of the paper's system
        budget = sum(p.numel() for p in small_model().trained_parameters().values())
        assert abs(sum(p.numel() for p in trained) - budget) < 0.1 * budget
    for p in trained:
        p += 0.1 * torch.randn_like(p)
    layers, x = small_qwen().layers, model.extra
    for n, i in enumerate({"lora": (0, 1, 3, 4, 5), "lora one": (3,)}.get(kind, ())):
        for k, name in enumerate(PROJECTIONS):
            layers[i].get_submodule(name).weight += x[f"B{7 * n + k}"] @ x[f"A{7 * n + k}"]
    h, rotary = model.embed_tokens(ids), rotary_tables(SMALL, 12, "cpu")
    for i in (0, 1, 3, 4, 5):
        h = (model.recurrent if kind == "layer" and i == 3 else layers[i])(h, rotary)
        if i == 3:
            h = h * x["scale"] if kind == "scale" else h @ x["matrix"].T if kind == "matrix" else h
    ours = model(ids)
    assert torch.allclose(ours, model.norm(h) @ model.head.T, atol=1e-4) and not torch.allclose(ours, start, atol=1e-2)


def test_the_variants_of_the_experiments_are_what_they_say():
    from experiments.paper import DrawnDepth, LowRank, RandomBases, Rounded, Seams
    cut = dict(prelude=2, recurrent=3, coda=2, rank=4)
    for ours, random in zip(small_model().lora, RandomBases(small_qwen(), **cut).lora):
        assert torch.allclose(random.A @ random.A.T, torch.eye(4), atol=1e-5)
        assert torch.allclose(random.B.T @ random.B, torch.diag(ours.B.square().sum(0)), atol=1e-5)
        assert not torch.allclose(random.B @ random.A, ours.B @ ours.A, atol=1e-2)
    for seams, trained in (("in", [True, False]), ("out", [False, True]), ("none", [False, False])):
        assert [P.weight.requires_grad for P in Seams(small_qwen(), seams, patch=True, **cut).patches] == trained
    assert all(p.dtype == torch.bfloat16 for p in Rounded(small_qwen(), **cut).trained_parameters().values())
    low = LowRank(small_qwen(), patch=True, **cut)
    assert [tuple(P.weight.shape) for P in low.patches[0]] == [(4, 32), (32, 4)]
    assert torch.equal(low(tokens()), low.cut(tokens()))
    drawn, losses = DrawnDepth(small_qwen(), **cut), set()
    for seed in range(20):
        ids = tokens(seed=seed)
        depth = min((1, 2, 4, 8), key=lambda d: abs(drawn.loss(ids, ids) - Ouroboros.loss(drawn, ids, ids, depth=d)))
        assert drawn.loss(ids, ids) == Ouroboros.loss(drawn, ids, ids, depth=depth)
        losses.add(depth)
    assert losses == {1, 2, 4, 8}


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_the_tables_in_the_repository_are_those_of_the_logs_beside_them(model, tmp_path):
    from experiments.paper_tables import write_all
    results, again = HERE / "experiments" / "paper" / model, tmp_path / model
    shutil.copytree(results, again, ignore=shutil.ignore_patterns("*.md", "*.png", "*.svg"))
    write_all(again)
    assert (again / "tables.md").read_text() == (results / "tables.md").read_text()
    assert {path.name for path in again.iterdir()} == {path.name for path in results.iterdir()}


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (8, 40)])
def test_svd_bases_are_the_truncated_svd(shape):
    R = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    A, B = svd_bases(R, 8)
    assert torch.allclose(B.norm(dim=0), S[:8], rtol=1e-3)  # B = U S
    assert torch.allclose(A @ A.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(B @ A, (U[:, :8] * S[:8]) @ Vh[:8], atol=1e-4)
    assert torch.allclose((R - B @ A).norm() ** 2, (S[8:] ** 2).sum(), rtol=1e-3, atol=1e-4)  # captured energy


def test_svd_bases_of_a_residual_without_full_rank_are_finite():
    R = torch.randn(24, 3) @ torch.randn(3, 40)
    A, B = svd_bases(R, 8)
    assert torch.allclose(A @ A.T, torch.eye(8), atol=1e-4) and torch.allclose(B @ A, R, atol=1e-3)


def test_the_residual_is_the_mean_of_the_removed_layers_minus_the_recurrent_one():
    qwen, model = small_qwen(), small_model(rank=16)
    W = [layer.self_attn.k_proj.weight for layer in qwen.layers]
    assert torch.allclose(model.lora[1].B @ model.lora[1].A, W[2] - W[3], atol=1e-4)  # 6 - (2 + 1 + 2) = layer 2 alone


@pytest.mark.parametrize("switches", SWITCHES[:-1], ids=names[:-1])
def test_gradients_reach_every_trained_tensor_and_no_other(switches):
    model = small_model(torch.float64, **switches)  # random modulation without the step norm gives scores of 1e9
    model.loss(tokens(), tokens(seed=2)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, name
        assert p.requires_grad == name.startswith(("controller", "gate", "step_norm", "opening", "patches", "adapters"))


def test_the_prelude_builds_no_graph_and_the_loop_does():
    model, graphs = small_model(), []
    for layer in [*model.prelude, model.recurrent]:
        layer.register_forward_hook(lambda _, __, out: graphs.append(out.grad_fn is not None))
    model.loss(tokens(), tokens())
    assert graphs == [False] * 2 + [True] * 3


@pytest.mark.parametrize("part", ["projection", "gate", "step norm", "controller", "whole model"])
def test_gradients_match_finite_differences(part):
    model = small_model(torch.float64)
    x, y = (torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if part == "projection":
        lora, m = model.lora[0], torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lora, (x, m))
    elif part == "whole model":
        p, ids = model.controller.heads.weight, tokens(B=1, T=5)
        assert torch.autograd.gradcheck(lambda p: model.loss(ids, ids), p, fast_mode=True)
    else:
        module = {"gate": model.gate, "step norm": model.step_norm, "controller": model.controller}[part]
        inputs = (x, y) if part == "gate" else (x, 1)
        assert torch.autograd.gradcheck(lambda *_: module(*inputs), (x, list(module.parameters())[-1]), fast_mode=True)


def test_a_step_changes_what_is_trained_and_not_a_bit_of_what_is_frozen():
    model = small_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=0.01)
    for _ in range(3):
        model.loss(tokens(), tokens(seed=2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) != (name in model.trained_parameters()), name


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = Ouroboros(Qwen.from_pretrained("tiny"), rank=32, depth=2)
    ids, targets = tokens(1, 12, vocabulary=4096), tokens(1, 12, seed=2, vocabulary=4096)
    optimizer, losses = torch.optim.Adam(model.trained_parameters().values(), lr=0.01), []
    for _ in range(300):
        loss = model.loss(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses) < 0.05 * losses[0]


def test_the_loss_is_the_mean_over_targets_that_count():
    model, ids, targets = small_model(), tokens(), tokens(seed=2)
    targets[0, :5] = -100
    log_p = model(ids).log_softmax(-1)
    picked = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(model.loss(ids, targets), -picked[targets >= 0].mean())


@pytest.mark.parametrize("switches, message", [
    ({"depth": 0}, "depth 0"), ({"depth": 65}, "depth 65"), ({"rank": 17}, "rank 17 does not fit self_attn.k_proj"),
    ({"prelude": 0}, "is no cut"), ({"coda": 0}, "is no cut"), ({"recurrent": 4}, "is no cut"),
    ({"recurrent": 1}, "is no cut"), ({"prelude": 3, "coda": 2}, "is no cut"), ({"pool": "max"}, "pool 'max'"),
    ({"modulation": "dynamic"}, "modulation 'dynamic'")])
def test_a_switch_that_makes_no_sense_is_one_clear_error(switches, message):
    with pytest.raises(UserError, match=message):
        small_model(**switches)


@pytest.mark.parametrize("switches", SWITCHES, ids=names)
def test_a_saved_model_comes_back_bit_for_bit(switches, tmp_path):
    base = folder_of(small_qwen(), tmp_path / "base")
    model = Ouroboros(Qwen.from_pretrained(base), 2, 3, 2, rank=4, depth=3, **switches)
    for p in model.trained_parameters().values():
        p.data += 0.1 * torch.randn_like(p)
    model.save(tmp_path / "run")
    again = Ouroboros.load(tmp_path / "run")
    assert torch.equal(model(tokens()), again(tokens())) and again.settings == model.settings
    assert again.trained_parameters().keys() == model.trained_parameters().keys()


def test_a_saved_model_is_refused_on_another_base_and_when_damaged(tmp_path):
    base, other = folder_of(small_qwen(), tmp_path / "base"), folder_of(small_qwen(seed=1), tmp_path / "other")
    Ouroboros(Qwen.from_pretrained(base), 2, 3, 2, rank=4).save(tmp_path / "run")
    with pytest.raises(UserError, match="is not that model"):
        Ouroboros.load(tmp_path / "run", base=other)
    moved = shutil.move(base, tmp_path / "moved")
    assert Ouroboros.load(tmp_path / "run", base=moved, dtype=torch.bfloat16).depth == 8
    weights = tmp_path / "run" / "ouroboros.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="ouroboros.safetensors: cannot be read as a whole"):
        Ouroboros.load(tmp_path / "run", base=moved)
    with pytest.raises(UserError, match="ouroboros.safetensors: no such file"):
        Ouroboros.load(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------------------------------------
# fast and small: what is faster or smaller computes the same


def loss_and_gradients(model, ids, targets):
    model.zero_grad()
    loss = model.loss(ids, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.trained_parameters().items()}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_loss_in_chunks_is_the_cross_entropy_of_all_logits():
    torch.manual_seed(0)
    h, head = torch.randn(700, 32, requires_grad=True), torch.randn(997, 32)  # 256 + 256 + 188
    targets = torch.randint(0, 997, (700,))
    targets[::7] = -100
    expected = F.cross_entropy(h @ head.T, targets)
    gradient, = torch.autograd.grad(3 * expected, h)
    loss = HeadLoss.apply(h, head, targets)
    assert abs(loss - expected) < 1e-6 * expected
    assert relative(torch.autograd.grad(3 * loss, h)[0], gradient) < 1e-6
    with pytest.raises(AssertionError, match="freeze the head"):
        Qwen(SMALL).loss(tokens(), tokens())


def test_no_tensor_holds_all_logits_in_training_or_evaluation():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    config = Config(**{**SMALL._asdict(), "vocab_size": 5000})
    model, ids = Ouroboros(small_qwen(config=config), 2, 3, 2, rank=4, depth=2), tokens(2, 512)
    with Largest() as largest:
        model.loss(ids, ids).backward()
        with torch.no_grad():
            model.loss(ids, ids, cut=True)
    assert largest.elements < 1024 * 5000 / 2


@pytest.mark.parametrize("T, S", [(12, 12), (1, 12), (5, 12)])
def test_attention_written_out_is_the_fused_one(T, S):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
    written_out = attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    assert relative(written_out, attend(q, k, v)) < 0.01


def test_activation_checkpointing_keeps_less_and_changes_no_bit():
    model, ids = small_model(), tokens()
    kept = {}
    for model.checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            model.loss(ids, ids)
        kept[model.checkpointing] = sum(sizes), loss_and_gradients(model, ids, ids)
    (more, (loss, gradients)), (less, (loss_again, gradients_again)) = kept[False], kept[True]
    assert less < 0.1 * more
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize("checkpointing, switches", [(False, {}), (True, {}), (False, SWITCHES[6])])
def test_compiled_blocks_are_traced_whole_give_the_same_and_keep_their_names(checkpointing, switches):
    model, ids = small_model(**switches), tokens()
    names, (loss, gradients) = model.state_dict().keys(), loss_and_gradients(model, ids, tokens(seed=2))
    generated = model.generate(ids, 5)
    model.checkpointing = checkpointing
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    loss_compiled, gradients_compiled = loss_and_gradients(model, ids, tokens(seed=2))
    assert abs(loss_compiled - loss) < 1e-5 * loss and model.state_dict().keys() == names
    for name in gradients:
        assert relative(gradients_compiled[name], gradients[name]) < 1e-4, name
    assert torch.equal(model.generate(ids, 5), generated)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_program_keeps_freed_memory_instead_of_clearing_it_again():
    code = """if True:
        import resource, torch
        from qwen import keep_freed_memory
        keep_freed_memory()
        faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
        for _ in range(10):  # the heap finds its shape within a few
            torch.ones(2**24)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(min(after - before for before, after in zip(faults, faults[1:])))"""
    faults = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert int(faults) < 100  # 64 MiB are 16384 pages


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def small_tokenizer(vocabulary=400, **special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([Path(data.__file__).read_text()], trainer)
    return tokenizer


TOKENIZER = small_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_text(path, documents=60, separator="\n<|endoftext|>\n"):
    """Documents in which every word names its document."""
    path.write_text(separator.join(" ".join([f"doc{n}"] * (20 + n % 7)) for n in range(documents)))
    return path


def documents_in(batches):
    """All that the batches of one pass hold, and the documents that they name."""
    total = sum(batches.sequences(i) for i in range(len(batches.tokens)))
    rows = TOKENIZER.decode_batch(batches.batch(0, total)[0].tolist())
    return {name for row in rows for name in re.findall(r" doc(\d+) ", row)}


def test_the_target_is_the_next_token_shifted_once(tmp_path):
    source = TextSource(write_text(tmp_path / "text.txt"))
    batches = Batches(source, "train", TOKENIZER, length=16)
    stream, (ids, targets) = batches.chunk(0).tolist(), batches.batch(0, 30)
    for row, aims in zip(ids.tolist(), targets.tolist()):
        starts = [i for i in range(0, len(stream), 16) if stream[i : i + 16] == row]
        assert any(stream[i + 1 : i + 17] == aims for i in starts)
    published = Batches(source, "train", TOKENIZER, length=16, offset=2)
    ids, targets = published.batch(0, 5)
    assert torch.equal(ids[:, 2:], targets[:, :-2])


def test_no_document_is_in_both_splits_and_all_are_in_one(tmp_path):
    source = TextSource(write_text(tmp_path / "text.txt"))
    train = documents_in(Batches(source, "train", TOKENIZER, 16))
    held_out = documents_in(Batches(source, "val", TOKENIZER, 16))
    assert not train & held_out and held_out == {"0", "20", "40"} and len(train) == 57


def test_a_folders_own_split_is_used_and_jsonl_is_read(tmp_path):
    (tmp_path / "text").mkdir()
    lines = "".join(json.dumps({"text": f"doc{n} " * 30}) + "\n" for n in range(9))
    (tmp_path / "text" / "train.jsonl").write_text(lines)
    with gzip.open(tmp_path / "text" / "val.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "doc99 " * 60}) + "\n")
    source = open_source(str(tmp_path / "text"))
    assert documents_in(Batches(source, "train", TOKENIZER, 16)) == {str(n) for n in range(9)}
    assert documents_in(Batches(source, "val", TOKENIZER, 16)) == {"99"}


def test_documents_are_joined_by_the_end_of_text_token(tmp_path):
    batches = Batches(TextSource(write_text(tmp_path / "text.txt")), "train", TOKENIZER, 16)
    text = TOKENIZER.decode(batches.chunk(0).tolist(), skip_special_tokens=False)
    assert [set(re.findall(r"doc\d+", d)) for d in text.split("<|endoftext|>")[:3]] == [{"doc1"}, {"doc2"}, {"doc3"}]


def test_batches_are_a_function_of_seed_and_position_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 2_000)  # several chunks
    source = TextSource(write_text(tmp_path / "text.txt"))

    def make(seed):
        return Batches(source, "train", TOKENIZER, 16, seed=seed)

    one = make(0)
    walk = [one.batch(4 * step, 4)[0] for step in range(120)]  # over more than one epoch
    assert len(one.tokens) > 2 and one.complete
    for step in (37, 0, 115):
        assert torch.equal(make(0).batch(4 * step, 4)[0], walk[step])  # a new start, straight at that step
    assert not torch.equal(make(1).batch(0, 4)[0], walk[0])
    n = sum(one.sequences(i) for i in range(len(one.tokens)))
    rows = {tuple(row) for row in one.batch(0, n)[0].tolist()}
    assert rows == {tuple(row) for row in one.batch(n, n)[0].tolist()}  # each epoch is the same text,
    assert not torch.equal(one.batch(0, n)[0], one.batch(n, n)[0])  # in another order


def test_the_second_start_reads_the_cache(tmp_path, monkeypatch):
    source = TextSource(write_text(tmp_path / "text.txt"))
    first = Batches(source, "train", TOKENIZER, 16).batch(0, 8)[0]
    monkeypatch.setattr(Batches, "encode", lambda *_: pytest.fail("tokenized again"))
    assert torch.equal(Batches(source, "train", TOKENIZER, 16).batch(0, 8)[0], first)
    assert not list((tmp_path / "cache").rglob("*.part*"))
    write_text(tmp_path / "text.txt", documents=61)  # another text is another cache
    with pytest.raises(pytest.fail.Exception):
        Batches(TextSource(tmp_path / "text.txt"), "train", TOKENIZER, 16)


def test_the_python_source_holds_out_files_by_their_path_and_leaves_tests_out():
    source = PythonSource()
    split = {name: {d for chunk in source.chunks(name) for d in chunk} for name in ("train", "val")}
    assert 0.02 < sum(map(len, split["val"])) / sum(map(len, split["train"])) < 0.1
    assert not any({"test", "tests"} & set(path.parts[-3:-1]) for _, path in source.files)
    assert any("class Module" in d for d in split["train"] | split["val"])


@pytest.mark.parametrize("name, content, message", [
    ("text.txt", b"short", "text is too short"), ("text.txt", b"\xff\xfe" * 900, "cannot be read as text"),
    ("text.jsonl", b'{"no": 1}\n' * 50, "cannot be read as text"), ("text.jsonl", b'{"text": 1}\n', "cannot be read"),
    ("text.jsonl.gz", b"no gzip", "cannot be read as text"),
    ("text.csv", b"a,b", "no such file"), (None, b"", "no such file")])
def test_a_text_that_cannot_be_used_is_one_clear_error(name, content, message, tmp_path):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Batches(open_source(str(tmp_path / (name or "nothing"))), "train", TOKENIZER, 16)


# ---------------------------------------------------------------------------------------------------------------------
# train.py and ouroboros.py as commands, the Hub included


def start(*arguments, env=None, cwd=None):
    """Start a program of ours as a user does, or a module."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    program = ["-m", arguments[0]] if arguments[0].startswith("torch.") else [str(HERE / arguments[0])]
    command = [sys.executable, *program, *map(str, arguments[1:])]
    return subprocess.Popen(command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def run(*arguments, timeout=600, **where):
    with start(*arguments, **where) as process:
        out, error = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(arguments, process.returncode, out, error)


QUICK = ["--depth", 2, "--rank", 4, "--steps", 6, "--seq-len", 32, "--batch-size", 4, "--eval-sequences", 4]


@pytest.fixture
def pretrained(tmp_path):
    """A folder with a small random model, its tokenizer and a text of its own."""
    config = Config(**{**SMALL._asdict(), "vocab_size": 400, "eos_token_id": (0,)})
    folder = folder_of(small_qwen(config=config), tmp_path / "model")
    TOKENIZER.save(str(folder / "tokenizer.json"))
    write_text(tmp_path / "text.txt", 400)
    return folder


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_end(*runs):
    """Bit for bit the same weights, moments and step, and the same loss at every step."""
    (tensors, about), (others, other) = map(read_checkpoint, runs)
    assert tensors.keys() == others.keys() and about["step"] == other["step"]
    assert not [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert losses(runs[0]) == losses(runs[1])


def test_training_lowers_the_held_out_loss_and_leaves_everything_behind(pretrained, tmp_path):
    out = tmp_path / "run"
    result = run("train.py", "--model", pretrained, "--data", tmp_path / "text.txt", *QUICK, "--steps", 60,
                 "--lr", 0.02, "--out", out, "--eval-every", 20)
    assert result.returncode == 0, result.stderr
    losses = json.loads((out / "results.json").read_text())
    assert losses["ouroboros"]["held-out"] < losses["cut"]["held-out"] - 0.2
    for part in ("full model (6 layers)", "cut to 3 layers", "ouroboros, depth 2", "gap recovered", "held-out text"):
        assert part in result.stdout
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 61)) and "held_out" in log[19] and log[-1]["lr"] < 1e-4
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG" or not find_spec("matplotlib")
    assert not list(out.glob("*.part*")) and not list(out.glob("*.pt"))

    again = run("train.py", "--eval", out)
    assert again.returncode == 0 and result.stdout.split("gap recovered")[1].split()[:2] == (
        again.stdout.split("gap recovered")[1].split()[:2])
    text = run("ouroboros.py", out, "--prompt", "doc1 doc1", "--max-new-tokens", 5)
    assert text.returncode == 0 and text.stdout.startswith("doc1 doc1")
    taken = run("train.py", "--model", pretrained, "--data", tmp_path / "text.txt", *QUICK, "--out", out)
    assert taken.returncode == 2 and "nothing saved is overwritten" in taken.stderr


def test_patch_carries_what_did_best_and_the_command_line_has_the_last_word(monkeypatch):
    def parsed(*options):
        monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *options])
        args = train.parse_arguments()
        return args.depth, args.modulation, args.train_coda, args.lr
    assert parsed() == (8, "controller", "none", 0.002)
    assert parsed("--patch") == (1, "none", "all", 0.006)
    others = "--depth", "4", "--modulation", "static", "--train-coda", "norms", "--lr", "0.1"
    assert parsed("--patch", *others) == (4, "static", "norms", 0.1)


def test_without_a_working_compiler_it_says_so_in_one_line_and_goes_on(pretrained, tmp_path):
    broken = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    result = run("train.py", "--model", pretrained, "--data", tmp_path / "text.txt", *QUICK, "--steps", 2,
                 "--compile", "on", "--out", tmp_path / "run", env=broken)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("torch.compile does not work here") == 1 and "gap recovered" in result.stdout


@pytest.mark.parametrize("arguments, message", [
    (["--depth", 0], "--depth"), (["--depth", 65], "depth 65"), (["--rank", 65], "rank 65 does not fit"),
    (["--rank", "many"], "--rank"), (["--model", "nowhere"], "no such folder"), (["--data", "no.txt"], "no such file"),
    (["--prelude", 11], "is no cut"), (["--device", "tpu"], "--device tpu"), (["--pool", "max"], "--pool"),
    (["--device", "cpu:x"], "--device cpu:x: cannot be used"),
    (["--eval", "nowhere"], "nowhere/ouroboros.safetensors: no such file"), (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"), (["--x"], "--x"),
    (["--seed", "-1"], "--seed"), (["--resume", "a", "--eval", "b"], "not allowed with"),
    (["--modulation", "none", "--no-gate", "--no-step-norm"], "nothing is left to train"),
    (["--resume", "nowhere", "--rank", 4], "nowhere/ouroboros.safetensors: no such file")])
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = [] if {"--eval", "--resume"} & {*arguments} else ["--data", write_text(tmp_path / "text.txt", 400)]
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *map(str, [*text, *arguments])])
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(train.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error
    assert re.match("(train.py: )?error: ", error) and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_programs_exit_with_code_2_and_one_line():
    for command in (["train.py", "--eval", "nowhere"], ["ouroboros.py", "nowhere", "--prompt", "x"], ["ouroboros.py"]):
        result = run(*command)
        assert result.returncode == 2 and re.match("(ouroboros.py: )?error: ", result.stderr)
        assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# a run that can be trusted: stopped, killed, damaged, starved, spread over processes


def stop_at(process, out, row, *signals):
    """Send the signals when the log has so many rows; return the exit code and what was printed."""
    log = out / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= row):
        assert process.poll() is None, process.communicate()
    for number in signals:
        process.send_signal(number)
    printed = "".join(process.communicate(timeout=600))
    return process.returncode, printed


def common(pretrained, steps=200):
    return ["--model", pretrained, "--data", pretrained.parent / "text.txt", *QUICK, "--steps", steps]


def test_a_run_stopped_and_killed_and_resumed_ends_bit_for_bit_as_the_one_left_alone(pretrained, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "stopped"
    assert run("train.py", *common(pretrained), "--out", alone).returncode == 0
    code, printed = stop_at(start("train.py", *common(pretrained), "--out", out), out, 21, signal.SIGINT)
    assert code == 130 and f"python train.py --resume {out}" in printed
    resume = ["train.py", "--resume", out]
    assert stop_at(start(*resume, "--save-every", 7), out, 50, signal.SIGKILL)[0] == -signal.SIGKILL
    code, printed = stop_at(start(*resume), out, 90, signal.SIGTERM)
    assert code == 143 and f"--resume {out}" in printed
    assert stop_at(start(*resume), out, 130, signal.SIGINT, signal.SIGINT)[0] == 130
    (out / "log.jsonl").open("a").write('{"step": 4')  # a line that a kill cut short
    assert run(*resume).returncode == 0
    assert_same_end(alone, out)
    assert len(list(out.glob("step-*"))) == 2 and not list(out.glob("step-*/*.part*"))
    again = run(*resume)  # nothing is left to do but to show the results again
    assert again.returncode == 0 and "gap recovered" in again.stdout


def test_before_its_first_checkpoint_a_killed_run_can_be_started_again(pretrained, tmp_path):
    part = tmp_path / "run" / "step-0000000" / "ouroboros.123.part.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    assert "no such file" in run("train.py", "--resume", tmp_path / "run").stderr
    assert run("train.py", *common(pretrained, 2), "--out", tmp_path / "run").returncode == 0


def test_what_may_change_on_the_way_changes_and_the_rest_is_refused(pretrained, tmp_path):
    out, alone = tmp_path / "run", tmp_path / "alone"
    assert run("train.py", *common(pretrained, 6), "--out", out).returncode == 0
    for changed, message in [(["--rank", 5], "--rank cannot change"), (["--model", "tiny"], "--model cannot change"),
                             (["--no-gate"], "--gate cannot change"), (["--seed", 1], "--seed cannot change"),
                             (["--batch-size", 2], "--batch-size times --accumulation stay 4"),
                             (["--steps", 5], "--steps must be 6 or more"), (["--out", "x"], "--out cannot change")]:
        refused = run("train.py", "--resume", out, *changed)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    os.utime(tmp_path / "text.txt")  # the text counts, not the time of its file
    changes = ["--steps", 9, "--eval-every", 2, "--batch-size", 2, "--accumulation", 2, "--rank", 4]
    same = ["--model", os.path.relpath(pretrained), "--data", os.path.relpath(tmp_path / "text.txt")]
    assert run("train.py", "--resume", out, *changes, *same).returncode == 0
    assert run("train.py", *common(pretrained, 9), "--eval-every", 2, "--out", alone).returncode == 0
    assert len(losses(out)) == 9 and json.loads((out / "args.json").read_text())["steps"] == 9
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "held_out" in row] == [1, 2, 3, 4, 5, 6, 8, 9]
    shutil.copytree(out / "step-0000009", out / "step-0000009-mine")  # what another put there stays
    assert run("train.py", "--resume", out / "step-0000006", "--steps", 8).returncode == 0  # back to the one before
    assert sorted(p.name for p in out.glob("step*")) == ["step-0000006", "step-0000008", "step-0000009-mine"]
    write_text(tmp_path / "text.txt", 399)
    assert "not the text any more" in run("train.py", "--resume", out).stderr


@pytest.fixture
def two_checkpoints(tmp_path):
    """A run's folder with checkpoints of two models, and what the earlier one holds."""
    base, run = folder_of(small_qwen(), tmp_path / "base"), tmp_path / "run"
    for step in (1, 2):
        model = Ouroboros(Qwen.from_pretrained(base), 2, 3, 2, rank=4, depth=step)
        model.save(run / f"step-000000{step}", {"more": torch.arange(3)}, step=step)
    return run


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(two_checkpoints, capsys):
    path = two_checkpoints / "step-0000002" / "ouroboros.safetensors"
    whole, (tensors, about) = path.read_bytes(), read_checkpoint(two_checkpoints)
    assert about["step"] == 2 and not capsys.readouterr().err
    rng, recognised = np.random.default_rng(0), 0
    for damage in [*range(60), "truncated", "longer", "missing"]:
        broken = bytearray(whole)
        if isinstance(damage, int):
            broken[rng.integers(len(whole) if damage % 2 else 3000)] ^= 1 << rng.integers(8)
        path.unlink() if damage == "missing" else path.write_bytes(
            whole[:-9] if damage == "truncated" else whole + b"x" if damage == "longer" else broken)
        others, other = read_checkpoint(two_checkpoints)
        error = capsys.readouterr().err
        if other["step"] == 1:
            assert error.startswith(f"{path}: ") and error.count("\n") == 1 and "the checkpoint before it is" in error
            assert Ouroboros.load(two_checkpoints).depth == 1
            capsys.readouterr()
            recognised += 1
        else:  # a bit that says nothing, such as a blank in the header
            assert other == about and all(torch.equal(others[name], tensors[name]) for name in tensors)
    assert recognised >= 60
    shutil.rmtree(path.parent)
    (two_checkpoints / "step-0000001" / "ouroboros.safetensors").write_bytes(whole[:99])
    with pytest.raises(UserError, match="step-0000001/ouroboros.safetensors: cannot be read as a whole checkpoint"):
        read_checkpoint(two_checkpoints)


class Fixed:
    """Batches without a file: sequence n is drawn with seed n; but no target counts in the `empty` steps of four."""

    def __init__(self, empty=()):
        self.empty = empty

    def batch(self, first, size, device):
        both = torch.stack([tokens(1, 9, seed=n)[0] for n in range(first, first + size)])
        ids, targets = both[:, :-1], both[:, 1:]
        return ids, torch.full_like(targets, -100) if first // 4 in self.empty else targets


def arguments(out, **changes):
    """What train.train needs of the command line."""
    usual = dict(out=out, resume=None, steps=6, warmup=1, lr=0.01, norm_lr_scale=1.0, batch_size=2, accumulation=2,
                 seq_len=8, eval_every=100, eval_sequences=2, save_every=1)
    return SimpleNamespace(**usual | changes)


def test_a_step_without_a_number_changes_nothing_and_is_logged(tmp_path):
    train.train(small_model(), Fixed(empty=[3, 4]), Fixed(), arguments(tmp_path, steps=5), torch.device("cpu"))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["loss"] is None, row.get("skipped")) for row in rows] == [(False, None)] * 3 + [(True, 1), (True, 2)]
    before, after = (read_checkpoint(tmp_path / f"step-000000{step}")[0] for step in (4, 5))
    assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())


def test_nine_steps_without_a_number_and_nine_more_do_not_end_a_run(tmp_path):
    fixed, args = Fixed(empty=[*range(1, 10), *range(11, 20)]), arguments(tmp_path, steps=21, save_every=100)
    assert train.train(small_model(), fixed, Fixed(), args, torch.device("cpu")) == 0
    assert [loss is None for loss in losses(tmp_path)] == [False, *[True] * 9, False, *[True] * 9, False]


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    class Interrupting(Fixed):
        def batch(self, *where):
            if where[0] == 4:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(*where)

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            train.train(small_model(), Interrupting(), Fixed(), arguments(tmp_path), torch.device("cpu"))
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert caught.value.code == 130 and len(losses(tmp_path)) == 1 and read_checkpoint(tmp_path)[1]["step"] == 1


def test_ten_steps_without_a_number_end_the_run_with_what_to_try(pretrained, tmp_path):
    result = run("train.py", *common(pretrained, 40), "--lr", 1e9, "--norm-lr-scale", 1e9, "--out", tmp_path / "run")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ten steps in a row had no finite loss") and f"--resume {tmp_path / 'run'}" in line


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid(), reason="needs root to mount a small file system")
def test_on_a_full_or_read_only_disk_the_old_checkpoint_stays_and_the_run_goes_on_later(pretrained, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        out = disk / "run"
        assert run("train.py", *common(pretrained, 4), "--out", out).returncode == 0
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
        full = run("train.py", "--resume", out, "--steps", 400)
        assert full.returncode == 2 and "cannot be written" in full.stderr and "make room" in full.stderr
        assert "Traceback" not in full.stderr and read_checkpoint(out)[1]["step"] == 4
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        locked = run("train.py", "--resume", out, "--steps", 8)
        assert locked.returncode == 2 and "log.jsonl: cannot be written" in locked.stderr
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        (disk / "filler").unlink()
        assert run("train.py", "--resume", out, "--steps", 8).returncode == 0
        assert len(losses(out)) == 8 and not list(out.rglob("*.part*"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_folder_removed_under_a_run_is_one_clear_line(pretrained, tmp_path):
    out = tmp_path / "run"
    process = start("train.py", *common(pretrained, 100_000), "--save-every", 100_000, "--out", out)
    while not (out / "log.jsonl").exists() or not losses(out):
        assert process.poll() is None, process.communicate()
    out.rename(tmp_path / "elsewhere")
    _, error = process.communicate(timeout=600)
    assert process.returncode == 2 and "log.jsonl: no such file; make room or bring its folder back" in error
    assert read_checkpoint(tmp_path / "elsewhere")[1]["step"] == 0


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build's libraries alone may not fit")
def test_out_of_memory_ends_with_the_number_and_what_helps(pretrained):
    command = " ".join(map(str, [sys.executable, HERE / "train.py", *common(pretrained), "--device", "cpu"]))
    sizes = " --depth 64 --seq-len 256 --batch-size 512"
    result = subprocess.run(["sh", "-c", f"ulimit -v 4000000; exec {command} {sizes}"], capture_output=True, text=True,
                            timeout=600)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert line.startswith("error: try a smaller --batch-size") and re.search(r"\d{6,} bytes", line)


TORCHRUN = ["torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node"]


def train_twice(folder):
    """50 steps in float64 and the first one in float32; by a script that torchrun starts, too."""
    for dtype, steps in ((torch.float64, 50), (torch.float32, 1)):
        args = arguments(Path(folder) / str(steps), steps=steps, lr=1e-3, accumulation=3, save_every=100)
        model = small_model(dtype, randomise=False)
        if steps == 1:  # heads of zero would keep the gradient from the rest of the Controller
            nn.init.normal_(model.controller.heads.weight, std=0.001)
        train.train(model, Fixed(), Fixed(), args, torch.device("cpu"))


def test_two_processes_are_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport test_ouroboros\n"
                      "test_ouroboros.train.dist.init_process_group('gloo')\n"
                      f"test_ouroboros.train_twice({str(tmp_path / 'two')!r})\n")
    result = run(*TORCHRUN, 2, script)
    assert result.returncode == 0, result.stderr
    train_twice(tmp_path / "one")
    one, two = (torch.tensor(losses(tmp_path / name / "50"), dtype=torch.float64) for name in ("one", "two"))
    assert (one - two).abs().max() < 1e-12 and len(one.unique()) == 50
    (first, _), (again, _) = (read_checkpoint(tmp_path / name / "1") for name in ("one", "two"))
    gradients = [name for name in first if name.startswith("exp_avg/")]  # a tenth of the gradient after one step
    assert gradients and max(relative(again[name], first[name]) for name in gradients) < 1e-6


def test_torchrun_stops_on_sigterm_and_goes_on_with_another_number_of_processes(pretrained, tmp_path):
    one, out = tmp_path / "one", tmp_path / "many"
    options = [*common(pretrained, 100), "--dtype", "float32", "--patch", "--modulation", "controller"]
    assert run("train.py", *options, "--out", one).returncode == 0
    process = start(*TORCHRUN, 2, HERE / "train.py", *options, "--out", out)
    _, printed = stop_at(process, out, 20, signal.SIGTERM)
    assert printed.count(f"Go on: python train.py --resume {out}") == 1  # the first process speaks, the other is silent
    assert 20 <= read_checkpoint(out)[1]["step"] == len(losses(out)) < 100
    result = run(*TORCHRUN, 3, HERE / "train.py", "--resume", out)
    assert result.returncode == 0 and result.stdout.count("gap recovered") == 1, result.stderr
    assert max(abs(a - b) for a, b in zip(losses(one), losses(out), strict=True)) < 1e-4
    too_many = run(*TORCHRUN, 5, HERE / "train.py", "--resume", out)
    assert "a step has fewer sequences than the 5 processes" in too_many.stderr


def one_line(action):
    """What action() gives, or None where it ends with a UserError, which has to be one line."""
    try:
        return action()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return None


def flipped(path: Path, rng, first=None):
    """Change one bit of a file, among its `first` bytes."""
    content = bytearray(path.read_bytes())
    content[rng.integers(min(len(content), first or len(content)))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
                                  "tokenizer.json", "00000.npy", "finewebedu_train_000001.bin"])
def test_a_flipped_bit_gives_a_model_and_tokens_or_one_line(name, pretrained, tmp_path):
    shard(pretrained)
    ids = np.arange(3000, dtype="<u2") % 50_000
    (tmp_path / name).write_bytes(np.array([20240520, 1, len(ids)] + [0] * 253, "<i4").tobytes() + ids.tobytes())
    source = TextSource(tmp_path / "text.txt")
    path = pretrained / name if name.startswith(("config", "model", "tokenizer")) else tmp_path / name
    path = Batches(source, "train", TOKENIZER, 16).folder / name if name.endswith("npy") else path
    whole, rng, works = path.read_bytes(), np.random.default_rng(0), []

    def use():
        if name.endswith("bin"):
            return data.read_shard(path)
        qwen = Qwen.from_pretrained(pretrained)
        batches = Batches(source, "train", load_tokenizer(pretrained, qwen.config.vocab_size), 16)
        return qwen(batches.batch(0, 2)[0]), qwen.generate(torch.tensor([[1, 2]]), 2)
    for _ in range(50):
        flipped(path, rng, first=200 if name.endswith(("npy", "bin")) else None)
        works.append(one_line(use) is not None)
        path.write_bytes(whole)
    assert one_line(use) is not None and not all(works)


def test_random_configurations_work_or_say_in_one_line_why_not(tmp_path):
    rng, works = np.random.default_rng(0), 0

    def pick(*values):
        return values[rng.integers(len(values))]
    for n in range(60):
        heads, kv_heads, D = pick(1, 2, 4, 6), pick(1, 2), pick(2, 4, 8)
        config = Config(vocab_size=pick(2, 33, 97), hidden_size=pick(8, 20, 32), intermediate_size=pick(8, 24),
                        num_hidden_layers=pick(4, 5, 7), num_attention_heads=heads * kv_heads,
                        num_key_value_heads=kv_heads, head_dim=D, tie_word_embeddings=pick(True, False),
                        attention_bias=pick(True, False))
        switches = dict(prelude=pick(None, None, 1, 2), coda=pick(None, None, 1, 2), recurrent=pick(None, None, 3),
                        rank=pick(1, 2, 4, 9), depth=pick(1, 1, 2, 3, 5, 0), pool=pick("prefix", "sequence"),
                        modulation=pick("controller", "static", "none"), gate=pick(True, False),
                        step_norm=pick(True, False), patch=pick(True, False),
                        train_coda=pick("none", "norms", "lora", "all"))

        def use(folder=tmp_path / str(n), config=config, switches=switches):
            folder_of(small_qwen(seed=1, config=config), folder / "base")
            model = Ouroboros(Qwen.from_pretrained(folder / "base"), **switches)
            for p in model.trained_parameters().values():
                p.data += 0.01 * torch.randn_like(p)
            ids = tokens(pick(1, 3), pick(1, 2, 17), vocabulary=config.vocab_size)
            loss = model.loss(ids, ids)
            if model.trained_parameters():
                loss.backward()
            model.save(folder)
            assert torch.equal(Ouroboros.load(folder)(ids), model(ids)) and torch.isfinite(loss)
            assert torch.equal(model.generate(ids, 3), greedy_without_cache(model, ids, 3))
            return True
        works += one_line(use) is True
    assert 20 < works < 60


def test_a_pickle_in_the_cache_is_not_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    source = TextSource(write_text(tmp_path / "text.txt"))
    path = Batches(source, "train", TOKENIZER, 16).folder / "00000.npy"
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="00000.npy: cannot be read as tokens"):
        Batches(source, "train", TOKENIZER, 16)
    assert not (tmp_path / "executed").exists()


class Hub(BaseHTTPRequestHandler):
    """A Hub on this machine: serves folder/REPO/FILE, hangs up drops[FILE] times in the middle of FILE."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def log_message(self, *_):
        pass

    def answer(self, body):
        repo, _, name = self.path.removeprefix("/datasets").partition("/resolve/main/")
        path, self.server.seen = self.server.folder / repo.strip("/") / name, [*self.server.seen, (self.path, body)]
        content, error = (path.read_bytes(), None) if path.is_file() else (b"", "EntryNotFound")
        if not path.parent.is_dir():
            error = "RepoNotFound"
        start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
        self.server.resumed += [name] if start else []
        self.send_response(404 if error else 206 if start else 200)
        if error:
            self.send_header("X-Error-Code", error)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", "c0ffee" + "0" * 34)
        self.send_header("ETag", f'"{name}-{len(content)}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body and self.server.drops.get(name):
            self.server.drops[name] -= 1
            self.wfile.write(content[start:11_000_000])
            self.close_connection = True
        elif body:
            self.wfile.write(content[start:])


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.drops, server.seen, server.resumed = tmp_path / "hub", {}, [], []
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
                  "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def hub_with_everything(hub, pretrained):
    """A sharded model, GPT-2's tokenizer and FineWeb-Edu's token shards, all small."""
    shutil.copytree(pretrained, hub.folder / "someone" / "model")
    shard(hub.folder / "someone" / "model")
    gpt2 = json.loads(small_tokenizer(350).to_str())
    gpt2["model"]["vocab"]["<|endoftext|>"] = gpt2["added_tokens"][0]["id"] = 50256
    for folder in ("openai-community/gpt2", data.FINEWEB):
        (hub.folder / folder).mkdir(parents=True)
    (hub.folder / "openai-community" / "gpt2" / "tokenizer.json").write_text(json.dumps(gpt2))
    gpt2 = Tokenizer.from_str(json.dumps(gpt2))
    for name, words in (("train_000001", "été"), ("val_000000", "日本")):
        ids = np.array([i for n in range(90) for i in [50256, *gpt2.encode(f"{words} {n} " * 20).ids]], "<u2")
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (hub.folder / data.FINEWEB / f"finewebedu_{name}.bin").write_bytes(header.tobytes() + ids.tobytes())
    return hub


def test_the_whole_hub_path_end_to_end_and_then_offline(hub_with_everything, tmp_path):
    hub = hub_with_everything
    command = ["train.py", "--model", "someone/model", "--data", "fineweb-edu", *QUICK]
    result = run(*command, "--out", tmp_path / "a", env={**hub.env, "HF_TOKEN": "hf_secret"})
    assert result.returncode == 0, result.stderr
    left_behind = [path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert b"hf_secret" not in b"".join([*left_behind, result.stdout.encode(), result.stderr.encode()])
    assert str(tmp_path) not in (tmp_path / "a" / "log.jsonl").read_text()
    assert "about 0.4 GB are fetched from the Hub" in result.stdout and "gap recovered" in result.stdout
    cached = np.load(next((tmp_path / "cache" / "ouroboros").glob("*/00000.npy")))
    assert re.match(r"(été|日本) 0 ", TOKENIZER.decode(cached.tolist()))  # GPT-2's tokens -> text -> the model's
    asked = len(hub.seen)
    offline = run(*command, "--out", tmp_path / "b", env={**hub.env, "HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    assert len(hub.seen) == asked
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_what_can_go_wrong_on_the_hub_is_one_line_each(hub_with_everything, tmp_path):
    hub, large = hub_with_everything, "finewebedu_train_000002.bin"
    (hub.folder / data.FINEWEB / large).write_bytes(bytes(12_000_000))

    def fetch(repo="someone/model", name="config.json", repo_type="model", **env):
        code = f"from qwen import *; exit_on_user_error(lambda: print(locate('{repo}', '{name}', '{repo_type}')))"
        result = subprocess.run([sys.executable, "-c", code], cwd=HERE, env={**os.environ, **hub.env, **env},
                                capture_output=True, text=True, timeout=600)
        return result.returncode, (result.stderr if result.returncode else result.stdout).strip().splitlines()[-1]

    nothing = "error: some/one: no folder here and no model on the Hub that you may read; check the name, log in"
    assert fetch("some/one") == (2, nothing)
    assert fetch(name="no.json") == (2, "error: someone/model: this Hub repository has no no.json")
    assert "cannot be reached" in fetch(HF_HUB_OFFLINE="1")[1]
    assert "cannot be reached" in fetch(HF_ENDPOINT="http://127.0.0.1:9")[1]
    hub.drops[large] = 99
    returncode, line = fetch(data.FINEWEB, large, "dataset")
    assert returncode == 2 and f"{large} could not be downloaded" in line and "run the command again" in line
    hub.drops.clear()
    returncode, line = fetch(data.FINEWEB, large, "dataset")
    assert returncode == 0 and Path(line).read_bytes() == bytes(12_000_000)
    assert large in hub.resumed  # in a new try at once or, with older versions of the Hub's client, in the next run


def test_a_damaged_token_shard_is_named(hub_with_everything, tmp_path, monkeypatch):
    path = hub_with_everything.folder / data.FINEWEB / "finewebedu_train_000001.bin"
    assert len(data.read_shard(path)) > 1000
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="finewebedu_train_000001.bin: not a whole token shard"):
        data.read_shard(path)
