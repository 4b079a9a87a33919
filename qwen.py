"""The Qwen2.5 decoder in plain PyTorch, from one rotation up to a pretrained model that generates text.

One thing a plain decoder would not have: a layer takes the argument `project`, *how to apply a projection*, by which
ouroboros.py changes it. Letters in shapes: B sequences, T tokens, d hidden_size, H heads of D channels, V vocabulary.
"""

import ctypes
import json
import math
import os
import re
import sys
from collections import defaultdict, namedtuple
from contextlib import contextmanager
from functools import lru_cache
from itertools import count, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn

BUILT_IN = {"tiny": Path(__file__).resolve().parent / "tiny"}  # found from any current folder

# The seven projections of a layer, and the numbers by which `project` knows them.
PROJECTIONS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
Q, K, V, O, GATE, UP, DOWN = range(7)

class UserError(Exception):
    """Something the person at the keyboard can mend, one line that says what to do. Programs exit with code 2."""

# ---- The decoder -----------------------------------------------------------------------------------------------------
class Config(namedtuple("Config", "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                        "num_key_value_heads head_dim rms_norm_eps rope_theta tie_word_embeddings attention_bias "
                        "eos_token_id", defaults=(1e-6, 10000.0, False, True, ()))):
    """What a forward pass needs of a Hub config.json, under the Hub's names. attention_bias: of q, k and v."""
    @classmethod
    def from_json(cls, path: Path) -> "Config":
        """Read config.json. UserError for what this decoder cannot run: another architecture, rope scaling, windows."""
        raw = {"model_type": None, **cls._field_defaults, **read_json(path)}
        with handling(path, "read as the config.json of a Qwen2.5 model"):
            raw |= raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            known = {"model_type": "qwen2", "hidden_act": "silu", "rope_type": "default", "type": "default",
                     "use_sliding_window": False}
            if other := {key: raw[key] for key in known if raw.get(key, known[key]) != known[key]}:
                raise UserError(f"{path}: {other}: this program runs the plain Qwen2.5 decoder; name another model")
            raw["head_dim"] = raw.get("head_dim") or int(raw["hidden_size"]) // int(raw["num_attention_heads"])
            raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
            c = {name: (int if i < 7 else float)(raw[name]) for i, name in enumerate(cls._fields[:9])}
            if not all(0 < x < math.inf for x in c.values()) or c["head_dim"] % 2 or c["num_hidden_layers"] > 999 or (
                    c["num_attention_heads"] % c["num_key_value_heads"]):
                raise ValueError(f"sizes that do not fit together: {c}")
            ends = [raw["eos_token_id"]] if isinstance(raw["eos_token_id"], int) else raw["eos_token_id"] or ()
            return cls(**c, tie_word_embeddings=raw["tie_word_embeddings"] is True,
                       eos_token_id=tuple(e for e in map(int, ends) if 0 <= e < c["vocab_size"]))

def promote(x):  # to float32 or, if it is float64 already, not at all: bf16 is too coarse for sums
    return x.to(torch.promote_types(x.dtype, torch.float32))

@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a table that generation made may later serve a training step
def rotary_tables(config: Config, length: int, device):
    """Cosine and sine, [length, D] each, of the angle by which each position turns: position * theta^(-2i/D) for the
    channels i and i + D/2 of a head. The first half of the sines is negated. float32 whatever the weights are."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    angles = torch.arange(length, device=device)[:, None] * config.rope_theta**-exponent
    return angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)

def rotate(x, rotary):
    """Turn each pair of channels (a, b) to (a cos - b sin, b cos + a sin). [B, H, T, D] -> [B, H, T, D]"""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)  # rolled: every (a, b) is (b, a)

def attend(q, k, v):
    """softmax(q k^T / sqrt(D)) v, where the T queries are the newest of S tokens and each sees all keys up to its own.
    q [B, H, T, D], k and v [B, H_kv, S, D] -> [B, H, T, D]; each key-value head serves H / H_kv query heads (GQA)."""
    B, H, T, D, S = *q.shape, k.shape[2]
    if q.is_mps or q.is_cpu and q.dtype == torch.bfloat16 and S <= 512:
        # Written out: on such a CPU 3 times as fast as torch's fused kernel, which on MPS aborts or errs.
        scores = (q * D**-0.5).reshape(B, k.shape[1], -1, D) @ k.transpose(2, 3)  # the heads of a group in one product
        mask = torch.full((T, S), -torch.inf, dtype=q.dtype, device=q.device).triu(S - T + 1) if T > 1 else 0
        weights = (scores.view(B, H, T, S) + mask).softmax(-1)
        return (weights.view(scores.shape) @ v).view(B, H, T, D)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=bool(1 < T == S), enable_gqa=True)

def plain(projection: nn.Linear, x, which: int):  # how a plain layer applies its projection number `which`: as it is
    return projection(x)

class Attention(nn.Module):
    """Causal self-attention. [B, T, d] -> [B, T, d]"""
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
    def forward(self, x, rotary, cache=None, project=plain):
        B, T, _ = x.shape
        q, k, v = project(self.q_proj, x, Q), project(self.k_proj, x, K), project(self.v_proj, x, V)
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in (q, k, v))  # [B, H or H_kv, T, D]
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        return project(self.o_proj, attend(q, k, v).transpose(1, 2).reshape(B, T, -1), O)

class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). [B, T, d] -> [B, T, d]"""
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
    def forward(self, x, project=plain):
        inner = F.silu(project(self.gate_proj, x, GATE)) * project(self.up_proj, x, UP)
        return project(self.down_proj, inner, DOWN)

class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); norm(x) = x / rms(x) * weight. [B, T, d] -> [B, T, d]. rotary: of
    the T positions; cache: a KVCache, or None; project: (projection, input, number 0..6) -> output, to apply each."""
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
    def forward(self, x, rotary, cache=None, project=plain):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, project)
        return x + self.mlp(self.post_attention_layernorm(x), project)

class KVCache:
    """Of a layer call, the keys and values [B, H_kv, T, D] of the tokens so far, how many, the sum of its inputs."""
    keys, values, length, input_sum = None, None, 0, 0
    def append(self, k, v):  # tokens; returns all keys and values so far
        k, v = (torch.cat([old, new], dim=2) if self.length else new for old, new in ((self.keys, k), (self.values, v)))
        self.keys, self.values, self.length = k, v, k.shape[2]
        return k, v

class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of hidden states h [N, d] through a frozen head [V, d], targets [N]; -100 does not count.
    Only a chunk of the logits exists at a time, so forward makes what backward needs while it is there: the gradient of
    h, (softmax - one-hot) head / count."""
    @staticmethod
    def forward(ctx, h, head, targets, chunk=256):
        valid, loss, grad = targets != -100, promote(h.new_zeros(())), torch.empty_like(h)
        share = valid.to(loss) / valid.sum()  # of each target in the mean
        for part in (slice(i, i + chunk) for i in range(0, len(h), chunk)):
            log_p = promote(F.linear(h[part], head)).log_softmax(-1)  # [chunk, V]
            target = targets[part, None].clamp(min=0)
            picked = log_p.gather(1, target)
            loss -= share[part] @ picked.squeeze(1)
            if ctx.needs_input_grad[0]:
                log_p.exp_().scatter_(1, target, picked.expm1())  # softmax - one-hot
                torch.mm(log_p.to(h.dtype), head, out=grad[part])
            del log_p  # before the next chunk needs the memory
        ctx.save_for_backward(grad, share)
        return loss
    @staticmethod
    def backward(ctx, grad_loss):
        grad, share = ctx.saved_tensors
        return (grad * (share * grad_loss)[:, None]).to(grad.dtype), None, None, None

class LanguageModel(nn.Module):
    """What the plain and the looped model share: from hidden(ids, cache=None, **how) to logits, the loss and text.
    cache: a defaultdict(KVCache) whose keys number the layer calls of a forward; ids are the tokens that follow it.
    lm_head is None where the head is tied to the embedding."""
    cacheable = True
    def start(self, ids, cache=None):
        """The rotary tables of ids [B, T], which follow what is in the cache, and the caches for the layer calls."""
        first, caches = (0, repeat(None)) if cache is None else (cache[0].length, map(cache.__getitem__, count()))
        tables = rotary_tables(self.config, 1 << (first + ids.shape[1] - 1).bit_length(), ids.device)  # few lengths
        return [table[first : first + ids.shape[1]] for table in tables], caches
    @property
    def head(self):  # [V, d]
        return (self.lm_head or self.embed_tokens).weight
    def forward(self, ids, **how):  # ids [B, T] int64 -> logits [B, T, V]
        return F.linear(self.hidden(ids, **how), self.head)
    def loss(self, ids, targets, **how):
        """Mean cross entropy, in nats, of targets [B, T] already aligned with ids [B, T]; -100 does not count."""
        assert not (torch.is_grad_enabled() and self.head.requires_grad), "freeze the head: it gets no gradient here"
        return HeadLoss.apply(self.hidden(ids, **how).flatten(0, 1), self.head, targets.flatten())
    @torch.no_grad()
    def generate(self, ids, max_new_tokens=32, temperature=0.0, **how):
        """Continue prompts of one length: ids [B, T] -> [B, T + n], n <= max_new_tokens; the likeliest token at
        temperature 0, else sampled. Stops when all have met one of the config's end tokens; who met it is filled up."""
        cache, new = defaultdict(KVCache) if self.cacheable else None, ids
        ends, pad = torch.tensor(self.config.eos_token_id, device=ids.device), (*self.config.eos_token_id, 0)[0]
        done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            logits = promote(F.linear(self.hidden(new, cache=cache, **how)[:, -1], self.head))  # [B, V]
            likeliest = logits.argmax(-1, keepdim=True)
            new = torch.multinomial((logits / temperature).softmax(-1), 1) if temperature > 0 else likeliest
            new = torch.where(done, pad, new)
            done |= torch.isin(new, ends)
            ids = torch.cat([ids, new], dim=1)
            if done.all():
                break
            new = ids if cache is None else new  # without a cache the model sees everything again
        return ids

class Qwen(LanguageModel):
    """The Qwen2.5 decoder, its modules named as in a Hub checkpoint: ids [B, T] -> logits [B, T, V]."""
    def __init__(self, c: Config):
        super().__init__()
        self.config, self.source = c, None
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
    def hidden(self, ids, cache=None):  # ids [B, T] -> normalised last hidden state [B, T, d]
        rotary, caches = self.start(ids, cache)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, rotary, next(caches))
        return self.norm(x)
    @classmethod
    def from_pretrained(cls, folder_or_repo, dtype=torch.float32, device="cpu", layers=None) -> "Qwen":
        """Load config.json and the safetensors weights of a folder, of a Hub repository or of the built-in "tiny".
        layers: the only ones to load (default: all). UserError for a checkpoint it cannot run, or a damaged one."""
        name, config = str(folder_or_repo), Config.from_json(locate(folder_or_repo, "config.json"))
        unwanted = {*range(config.num_hidden_layers)}.difference(layers or range(config.num_hidden_layers))
        tensors, tied = {}, config.tie_word_embeddings
        for path in weight_files(folder_or_repo):
            with handling(path, "read as a whole safetensors file"), safe_open(path, framework="pt") as file:
                for key in file.keys():
                    ours = key.removeprefix("model.")
                    layer = re.match(r"layers\.(\d+)\.", ours)
                    surplus = ours.endswith("rotary_emb.inv_freq") or ours == "lm_head.weight" and tied
                    if not surplus and not (layer and int(layer[1]) in unwanted):
                        tensors[ours] = file.get_tensor(key).to(device, dtype, copy=True)  # it was mapped from the file
        with handling(name, "read as weights of the shapes in its config.json"):
            with torch.device("meta"):  # laid out without memory; the tensors loaded take the places
                biases = any(key.endswith("q_proj.bias") for key in tensors)
                model = cls(config._replace(attention_bias=biases)).requires_grad_(False).eval()
                for i in unwanted:
                    model.layers[i] = nn.Identity()
            model.load_state_dict(tensors, assign=True)
        model.source = str(Path(name).resolve()) if Path(name).is_dir() and name not in BUILT_IN else name
        return model

# ---- Files, from a folder or from the Hub ----------------------------------------------------------------------------
def locate(folder_or_repo, filename: str, repo_type="model", required=True) -> Path | None:
    """The path of a file of a folder, of the built-in model or of a Hub repository; None if absent and not required."""
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
        except RepositoryNotFoundError:
            problem = f"{name}: no folder here and no {repo_type} on the Hub that you may read; check the name, log in"
        except LocalEntryNotFoundError:  # the network, not the repository: a kind of EntryNotFoundError all the same
            problem = f"{name}: the Hub cannot be reached and {filename} is not in the cache; try again when online"
        except EntryNotFoundError:
            problem = f"{name}: this Hub repository has no {filename}"
        except Exception as error:  # whatever broke in the Hub's client, which has tried again by itself
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            required, problem = True, f"{name}: {filename} could not be downloaded ({reason}); run the command again"
    if required:
        raise UserError(problem)

def weight_files(folder_or_repo) -> list[Path]:
    """The files of the weights: model.safetensors, or what model.safetensors.index.json names."""
    index = locate(folder_or_repo, "model.safetensors.index.json", required=False)
    if index is None:
        return [locate(folder_or_repo, "model.safetensors")]
    with handling(index, "read as an index of safetensors files beside it"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) for name in names):
            raise ValueError(f"it names {names}")
    return [locate(folder_or_repo, name) for name in names]

@contextmanager
def handling(path, aim: str, advice="check the name or get it again"):
    """Turn whatever goes wrong with a file into one line that names it. aim: what is done to it, "read as ..."."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, MemoryError)) or isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        reason = f"cannot be {aim} ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        reason = "no such file" if isinstance(error, FileNotFoundError) else reason
        raise UserError(f"{path}: {reason}; {advice}") from None

def read_json(path: Path) -> dict:
    with handling(path, "read as a JSON object"):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")).items())

def load_tokenizer(folder_or_repo, vocab_size=math.inf) -> Tokenizer:
    """The tokenizer.json of a folder, a Hub repository or the built-in model, for a model of so many tokens."""
    path = locate(folder_or_repo, "tokenizer.json")
    with handling(path, "read as a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # which some checkpoints store
        tokenizer.no_padding()
        if max(tokenizer.get_vocab().values()) >= vocab_size:
            raise ValueError(f"it has tokens beyond the {vocab_size} of the model")
        return tokenizer

def replace_file(path: Path, write):
    """Call write(temporary path) and rename: a reader of `path` finds the old file or the new one, never half a one."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    with handling(path, "written", "make room or name another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            with open(part, "r+b") as file:
                os.fsync(file.fileno())  # else a power cut may keep the new name and lose what it names
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

# ---- What the programs share -----------------------------------------------------------------------------------------
def keep_freed_memory():
    """Let glibc keep the memory of freed tensors: mapping and clearing it again takes up to half of a step's time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap

def pick_device(name: str, dtype="auto"):
    """(device, type of the frozen weights) for --device auto, cuda, mps or cpu and --dtype auto, float32 or bfloat16.
    auto is bfloat16 where the hardware multiplies it natively: CUDA since Ampere, a CPU that says so (Linux)."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = there[0] if name == "auto" else name
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name  # torchrun: one for each process
    with handling(f"--device {name}", "used", f"this machine and this build of torch have {', '.join(there)}"):
        device = torch.empty(0, device=name if name.split(":")[0] in there else "none").device
    cpu = Path("/proc/cpuinfo").read_text() if device.type == "cpu" and sys.platform == "linux" else ""
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else (
        re.search("avx512_bf16|amx_bf16", cpu))
    return device, getattr(torch, ("bfloat16" if native else "float32") if dtype == "auto" else dtype)

def exit_on_user_error(main):
    """Run a program; what its user can mend is one line on stderr and exit code 2, not a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:  # torch's "out of memory" is a RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        advice = "try a smaller --batch-size, --seq-len or --depth, or --activation-checkpointing: "
        print("error:", advice * isinstance(error, RuntimeError) + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
