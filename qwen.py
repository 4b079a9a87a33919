"""The Qwen2.5 decoder in plain PyTorch, from one RMSNorm up to a pretrained model that generates text.

Read it top to bottom. The one thing a plain decoder would not have is the argument `project` of a layer: *how to
apply a projection*. By default a projection is just applied; ouroboros.py passes a version that modulates it.

Letters in the shape comments: B sequences, T tokens, d hidden_size, H heads of D channels, V vocabulary.
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import count, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn

BUILT_IN = {"tiny": Path(__file__).resolve().parent / "tiny"}  # found from any current folder

# The seven projections of a layer, and the numbers by which `project` knows them.
PROJECTIONS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
Q, K, V, O, GATE, UP, DOWN = range(7)

class UserError(Exception):
    """Something the person at the keyboard can mend, one line that says what to do. Programs exit with code 2."""

# ---- The decoder -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """What a forward pass needs of a Hub config.json, under the Hub's names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = True  # of q, k and v; the checkpoint has the last word
    eos_token_id: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, path: Path) -> "Config":
        """Read config.json. UserError for what this decoder cannot run: another architecture, rope scaling, windows."""
        raw = read_json(path)
        rope, eos = raw.get("rope_parameters") or raw.get("rope_scaling") or {}, raw.get("eos_token_id")
        try:
            windows = raw.get("use_sliding_window") and raw.get("max_window_layers", 0) < raw["num_hidden_layers"]
            for wrong, what in [
                (raw["model_type"] != "qwen2", f"model_type is {raw['model_type']!r}, not 'qwen2'"),
                (raw.get("hidden_act", "silu") != "silu", f"hidden_act is {raw.get('hidden_act')!r}, not 'silu'"),
                (rope.get("rope_type", rope.get("type", "default")) != "default", f"rope scaling is set ({rope})"),
                (windows or "sliding_attention" in (raw.get("layer_types") or ()), "a sliding window is in use"),
            ]:
                if wrong:
                    raise UserError(f"{path}: {what}; this program runs the plain Qwen2.5 decoder only")
            raw = {"num_key_value_heads": raw["num_attention_heads"], **raw, **rope}
            raw["head_dim"] = raw.get("head_dim") or int(raw["hidden_size"]) // int(raw["num_attention_heads"])
            sizes = {f.name: int(raw[f.name]) for f in fields(cls)[:7]}
            numbers = {name: float(raw.get(name, getattr(cls, name))) for name in ("rms_norm_eps", "rope_theta")}
            config = cls(**sizes, **numbers, tie_word_embeddings=raw.get("tie_word_embeddings") is True,
                         eos_token_id=tuple(int(e) for e in (eos if isinstance(eos, list) else [eos]) if e is not None))
            if min(*sizes.values(), *numbers.values()) <= 0 or config.head_dim % 2 or (
                    config.num_attention_heads % config.num_key_value_heads):
                raise ValueError(f"sizes that do not fit together: {sizes | numbers}")
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not the config.json of a Qwen2.5 model ({error!r}); get the file again") from None
        return config

def promote(x):
    """x in float32 or, if it is float64 already, as it is: bf16 is too coarse for sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

class RMSNorm(nn.Module):
    """x / rms(x) * weight, the root mean square taken over channels in float32. [..., d] -> [..., d]"""
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)

def rms_norm(x, weight, eps):
    x32 = promote(x)
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)

def rotary_tables(config: Config, start: int, stop: int, device):
    """Cosine and sine, each [T, D/2], of the angles by which positions start..stop-1 turn: position * theta^(-2i/D) for
    pair i of a head's D channels. float32 whatever the weights are."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    angles = torch.arange(start, stop, device=device)[:, None] * config.rope_theta**-exponent
    return angles.cos(), angles.sin()

def rotate(x, rotary):
    """Turn channel i together with channel i + D/2. [B, H, T, D] -> [B, H, T, D]"""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

def plain(projection: nn.Linear, x, which: int):
    """How a plain layer applies its projection number `which`: as it is."""
    return projection(x)

class Attention(nn.Module):
    """Causal self-attention; each key-value head serves H / H_kv query heads (GQA). [B, T, d] -> [B, T, d]"""
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rotary, cache=None, project=plain):
        B, T, _ = x.shape
        q = project(self.q_proj, x, Q).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, D]
        k = project(self.k_proj, x, K).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H_kv, T, D]
        v = project(self.v_proj, x, V).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        if x.is_mps:  # where torch 2.6 aborts on enable_gqa
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        # T new queries against all keys so far: a lone query sees every one; without a past the mask is the triangle.
        past = k.shape[2] - T
        mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if past and T > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not past and T > 1, enable_gqa=True)
        return project(self.o_proj, y.transpose(1, 2).reshape(B, T, -1), O)

class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). [B, T, d] -> [B, T, d]"""
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x, project=plain):
        return project(self.down_proj, F.silu(project(self.gate_proj, x, GATE)) * project(self.up_proj, x, UP), DOWN)

class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). [B, T, d] -> [B, T, d]
    rotary: the tables of the T positions; cache: a KVCache that is read and extended, or None;
    project: a function (projection, input, number 0..6) -> output, called for each of the seven projections."""
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rotary, cache=None, project=plain):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, project)
        return x + self.mlp(self.post_attention_layernorm(x), project)

class KVCache:
    """Keys and values, [B, H_kv, T, D] each, of the T tokens that one layer has seen."""
    keys = values = None

    def append(self, k, v):
        """Add tokens; return all keys and values so far."""
        if self.keys is not None:
            k, v = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        self.keys, self.values = k, v
        return k, v

class Cache:
    """What generation keeps of the tokens so far: their number, a KVCache for each layer call of a forward, in the
    order of the calls, and for the looped model (sum, number) of each step's inputs."""
    def __init__(self):
        self.length, self.layers, self.sums = 0, defaultdict(KVCache), {}

class LanguageModel(nn.Module):
    """What the plain and the looped model share: from hidden(ids, cache=None, **how) to logits, the loss and text.
    lm_head is None where the head is tied to the embedding."""
    cacheable = True

    def start(self, ids, cache=None):
        """The rotary tables of ids [B, T], which follow what is in the cache, and the caches for the layer calls."""
        first, T = cache.length if cache else 0, ids.shape[1]
        if cache:
            cache.length += T
        caches = map(cache.layers.__getitem__, count()) if cache else repeat(None)
        return rotary_tables(self.config, first, first + T, ids.device), caches

    def head(self, h):
        """[..., d] -> logits [..., V]"""
        return F.linear(h, (self.lm_head or self.embed_tokens).weight)

    def forward(self, ids, **how):
        """ids [B, T] int64 -> logits [B, T, V]"""
        return self.head(self.hidden(ids, **how))

    def loss(self, ids, targets, **how):
        """Mean cross entropy, in nats, of targets [B, T] already aligned with ids [B, T]; -100 does not count."""
        return cross_entropy(self(ids, **how), targets)

    @torch.no_grad()
    def generate(self, ids, max_new_tokens=32, temperature=0.0, **how):
        """Continue prompts of one length: ids [B, T] -> [B, T + n], n <= max_new_tokens; the likeliest token at
        temperature 0, else sampled. Stops when all have met one of the config's end tokens; who met it is filled up."""
        cache, new = Cache() if self.cacheable else None, ids
        ends = torch.tensor(self.config.eos_token_id, dtype=torch.int64, device=ids.device)
        done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            logits = promote(self.head(self.hidden(new, cache=cache, **how)[:, -1]))  # [B, V]
            new = logits.argmax(-1, keepdim=True)
            if temperature > 0:
                new = torch.multinomial((logits / temperature).softmax(-1), 1)
            if len(ends):
                new = torch.where(done, ends[0], new)
                done |= torch.isin(new, ends)
            ids = torch.cat([ids, new], dim=1)
            if done.all():
                break
            new = ids if cache is None else new  # without a cache the model sees everything again
        return ids

def cross_entropy(logits, targets):
    """Mean over the valid targets, in nats. [B, T, V], [B, T] -> scalar"""
    return F.cross_entropy(promote(logits).flatten(0, 1), targets.flatten(), ignore_index=-100)

class Qwen(LanguageModel):
    """The Qwen2.5 decoder, its modules named as in a Hub checkpoint: ids [B, T] -> logits [B, T, V]."""
    def __init__(self, config: Config):
        super().__init__()
        self.config, self.source = config, None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        untied = not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if untied else None

    def hidden(self, ids, cache=None):
        """ids [B, T] -> normalised last hidden state [B, T, d]. With a cache, ids are the tokens that follow it."""
        rotary, caches = self.start(ids, cache)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, rotary, next(caches))
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, folder_or_repo, dtype=torch.float32, device="cpu", layers=None) -> "Qwen":
        """Load config.json and the safetensors weights of a folder, of a Hub repository or of the built-in "tiny".
        layers: the only ones to load (the looped model needs 17 of 36); the others stay without memory. Default: all.
        Raises UserError for a checkpoint this decoder cannot run, or a damaged one."""
        name, config = str(folder_or_repo), Config.from_json(locate(folder_or_repo, "config.json"))
        files, wanted = tensor_files(folder_or_repo), layers or range(config.num_hidden_layers)
        if max(wanted) >= config.num_hidden_layers:
            raise UserError(f"{name}: has no layer {max(wanted)}; name another base model")
        # The model is laid out without memory, what is wanted of it is then allocated once, and each tensor is copied
        # to its place: there is never a second copy of the weights.
        with torch.device("meta"):
            model = cls(replace(config, attention_bias=any(".0.self_attn.q_proj.bias" in key for key in files)))
        model.source = str(Path(name).resolve()) if Path(name).is_dir() and name not in BUILT_IN else name
        for part in [model.embed_tokens, *(model.layers[i] for i in wanted), model.norm, model.lm_head]:
            if part is not None:
                part.to(dtype).to_empty(device=device)
        places = dict(model.requires_grad_(False).eval().named_parameters())
        for path in sorted(set(files.values())):
            with open_safetensors(path) as file:
                for key in file.keys():
                    ours = key.removeprefix("model.")
                    if ours.endswith("rotary_emb.inv_freq") or ours == "lm_head.weight" and config.tie_word_embeddings:
                        continue
                    if ours not in places:
                        raise UserError(f"{path}: the tensor {key} belongs to no Qwen2.5 model of this config.json")
                    place = places.pop(ours)
                    if place.is_meta:
                        continue
                    tensor = file.get_tensor(key)
                    if tensor.shape != place.shape:
                        raise UserError(f"{path}: {key} is {[*tensor.shape]}, config.json asks for {[*place.shape]}")
                    place.copy_(tensor)
        if places:
            raise UserError(f"{name}: {len(places)} tensors are missing, such as {next(iter(places))}; get it again")
        return model

# ---- Files, from a folder or from the Hub ----------------------------------------------------------------------------
def locate(folder_or_repo, filename: str, repo_type="model", required=True) -> Path | None:
    """The path of one file of a folder, of the built-in model or of a Hub repository (downloaded once, then cached).
    A file that is not there is a UserError, or None if it is not required."""
    name = str(folder_or_repo)
    folder = BUILT_IN.get(name, Path(name))
    if folder.is_dir():
        if (folder / filename).is_file():
            return folder / filename
        problem = f"{folder / filename}: no such file; a model has config.json, model.safetensors and tokenizer.json"
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name}: no such folder; give one, a Hub name such as Qwen/Qwen2.5-0.5B, or tiny")
    else:
        try:
            return Path(hf_hub_download(name, filename, repo_type=repo_type))
        except GatedRepoError:
            problem = f"{name}: the Hub asks you to accept this repository's terms and to log in (hf auth login)"
        except RepositoryNotFoundError:
            problem = f"{name}: neither a folder here nor a {repo_type} on the Hub; check the name"
        except LocalEntryNotFoundError:  # the network, not the repository: a kind of EntryNotFoundError all the same
            problem = f"{name}: the Hub cannot be reached and {filename} is not in the cache; try again when online"
        except EntryNotFoundError:
            problem = f"{name}: this Hub repository has no {filename}"
        except Exception as error:  # whatever broke in the Hub's client, which has tried again by itself
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            required, problem = True, f"{name}: {filename} could not be downloaded ({reason}); run the command again"
    if required:
        raise UserError(problem)

def tensor_files(folder_or_repo) -> dict[str, Path]:
    """The file of each tensor: all in model.safetensors, or spread as model.safetensors.index.json says."""
    index = locate(folder_or_repo, "model.safetensors.index.json", required=False)
    if index is None:
        path = locate(folder_or_repo, "model.safetensors")
        with open_safetensors(path) as file:
            return dict.fromkeys(file.keys(), path)
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
    if not all(isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) for name in names):
        raise UserError(f"{index}: its weight_map does not name safetensors files beside it; get the file again")
    paths = {name: locate(folder_or_repo, name) for name in sorted(names)}
    return {tensor: paths[name] for tensor, name in weight_map.items()}

@contextmanager
def open_safetensors(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); get it again") from None

def load_tokenizer(folder_or_repo) -> Tokenizer:
    """The tokenizer.json of a folder, a Hub repository or the built-in model."""
    path = locate(folder_or_repo, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # which some checkpoints store
        tokenizer.no_padding()
        return tokenizer
    except Exception as error:  # the tokenizers package raises nothing more precise
        raise UserError(f"{path}: not a tokenizer ({error}); get the file again") from None

def read_json(path: Path) -> dict:
    """A JSON object from a file; UserError if the file holds none."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object ({error}); check the name or get it again") from None

def replace_file(path: Path, write):
    """Call write(temporary path) and rename: a reader of `path` finds the old file or the new one, never half a one."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); make room or name another folder") from None
    finally:
        if part.exists():
            part.unlink()

# ---- What the programs share -----------------------------------------------------------------------------------------
def pick_device(name: str, dtype="auto"):
    """(device, type of the frozen weights) for --device auto, cuda, mps or cpu and --dtype auto, float32 or bfloat16.
    auto is bfloat16 where the hardware multiplies it natively: CUDA since Ampere, a CPU that says so (Linux)."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, available in kinds.items() if available]
    try:
        device = torch.empty(0, device=there[0] if name == "auto" else name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: this machine and this build of torch have {', '.join(there)}") from None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = Path("/proc/cpuinfo")
        native = device.type == "cpu" and cpu.exists() and re.search("avx512_bf16|amx_bf16", cpu.read_text())
    auto = torch.bfloat16 if native else torch.float32
    return device, {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists what there is")

def exit_on_user_error(main):
    """Run a program; what its user can mend is one line on stderr and exit code 2, not a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        problem = "not enough memory on the GPU; try a smaller --batch-size, --seq-len or --depth"
    except UserError as error:
        problem = " ".join(str(error).split())
    else:
        return
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
