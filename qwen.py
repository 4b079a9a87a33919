"""The Qwen2.5 decoder in plain PyTorch: the model, its weights from a folder or the Hub, and generation.

One thing here is unusual. A layer does not call its projections itself: where one would write linear(x), it
calls project(linear, x, name), and `project` is an argument of the layer's forward. By default
project(linear, x, name) is linear(x). ouroboros.py passes a function that adds a low-rank update, which
differs from position to position.

Letters in shapes: B sequences, T tokens, S tokens including those in a cache (S >= T), d hidden_size, H
attention heads, H_kv key-value heads, D head_dim, V vocab_size.
"""

import hashlib
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from support.fast import attend_without_groups, grouped_attention_fits, head_cross_entropy, promote
from support.files import UserError, check_choice, check_number, full_name, one_line
from support.pretrained import load_tokenizer as load_tokenizer  # for those who import it from here
from support.pretrained import read_config_numbers, read_weights

# The names of the seven projections of a layer, as in a Hub checkpoint.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float64)  # those that hold any bfloat16 weight exactly


@dataclass(frozen=True)
class Config:
    """The shape of a model, under the names of the Hub's config.json."""

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
    attention_bias: bool = True  # of the q, k and v projections; loading finds it out from the weights
    eos_token_id: tuple[int, ...] = ()  # any of these ends a text

    @classmethod
    def from_pretrained(cls, folder_or_repo) -> "Config":
        """Read config.json. Raises UserError for a model that this decoder cannot run."""
        return cls(**read_config_numbers(folder_or_repo))


# ---- Rotary positions ------------------------------------------------------------------------------------


def rotary_at(config: Config, first: int, length: int, device=None):
    """The cosine and the sine of the angles at positions first .. first+length-1, each [length, D], in
    float32.

    Position p rotates the pair of channels (i, i + D/2) of a head by the angle p * theta^(-2i/D).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    position = torch.arange(first, first + length, device=device)
    angle = position[:, None] * config.rope_theta**-exponent  # [length, D/2]
    angle = angle.repeat(1, 2)  # [length, D]: the same for both channels of a pair
    return angle.cos(), angle.sin()


def rotate_half(x):
    """(a, b) -> (-b, a), where a and b are the two halves of the channels."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotate(x, rotary):
    """Rotate each pair (a, b) to (a cos - b sin, b cos + a sin). x [B, H, T, D] -> [B, H, T, D]"""
    cos, sin = rotary
    # x cos + rotate_half(x) sin. cos and sin are float32, so the sum is too.
    return torch.addcmul(x * cos, rotate_half(x), sin).to(x.dtype)


# ---- The parts of a layer --------------------------------------------------------------------------------


def attend(q, k, v):
    """softmax(q k^T / sqrt(D)) v, where each query sees the keys up to its own position.

    q [B, H, T, D] -> [B, H, T, D]; k and v [B, H_kv, S, D] with S >= T, the T queries being the newest
    positions. H / H_kv query heads share a key-value head (grouped-query attention).
    """
    T, S = q.shape[2], k.shape[2]
    if not grouped_attention_fits(q, S):
        return attend_without_groups(q, k, v)  # the same in another form, for some devices and types
    if T == 1:  # a single new token sees all keys
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # the general case: query i is at position S - T + i
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def apply_projection(projection: nn.Linear, x, name: str):
    """The default for `project`: apply the projection as it is. x [B, T, in] -> [B, T, out]"""
    return projection(x)


class KVCache:
    """The keys and values of the tokens so far, [B, H_kv, S, D] each, of one layer call.

    A layer that is looped has one cache for each step of the loop.
    """

    def __init__(self):
        self.keys = None
        self.values = None

    @property
    def length(self) -> int:
        """The number of tokens so far."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, k, v):
        """Add the keys and values of new tokens, [B, H_kv, T, D] each. Returns those of all tokens."""
        if self.keys is not None:
            k = torch.cat([self.keys, k], dim=2)
            v = torch.cat([self.values, v], dim=2)
        self.keys = k
        self.values = v
        return k, v


class Attention(nn.Module):
    """Causal self-attention. x [B, T, d] -> [B, T, d]"""

    def __init__(self, config: Config):
        super().__init__()
        d, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(d, config.num_attention_heads * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, d, bias=False)

    def split_heads(self, y):
        """[B, T, heads * D] -> [B, heads, T, D]"""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, rotary, cache: KVCache | None = None, project=apply_projection):
        q = self.split_heads(project(self.q_proj, x, "q_proj"))  # [B, H, T, D]
        k = self.split_heads(project(self.k_proj, x, "k_proj"))  # [B, H_kv, T, D]
        v = self.split_heads(project(self.v_proj, x, "v_proj"))  # [B, H_kv, T, D]
        q = rotate(q, rotary)
        k = rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)  # [B, H_kv, S, D]

        y = attend(q, k, v)  # [B, H, T, D]
        y = y.transpose(1, 2).flatten(2)  # [B, T, H D]
        return project(self.o_proj, y, "o_proj")


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). x [B, T, d] -> [B, T, d]"""

    def __init__(self, config: Config):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x, project=apply_projection):
        gate = project(self.gate_proj, x, "gate_proj")
        up = project(self.up_proj, x, "up_proj")
        return project(self.down_proj, F.silu(gate) * up, "down_proj")


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x [B, T, d] -> [B, T, d]

    rotary: the cosine and sine of the T positions, from rotary_at. cache: the KVCache of this layer call, or
    None. project(projection, x, name): applies the projection called `name`, one of PROJECTIONS.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)  # x / rms(x) * weight
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rotary, cache: KVCache | None = None, project=apply_projection):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, project)
        return x + self.mlp(self.post_attention_layernorm(x), project)

    def projections(self) -> dict[str, nn.Linear]:
        """name -> projection, in the order of PROJECTIONS."""
        return {
            "q_proj": self.self_attn.q_proj,
            "k_proj": self.self_attn.k_proj,
            "v_proj": self.self_attn.v_proj,
            "o_proj": self.self_attn.o_proj,
            "gate_proj": self.mlp.gate_proj,
            "up_proj": self.mlp.up_proj,
            "down_proj": self.mlp.down_proj,
        }


# ---- The model -------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """What the plain and the looped model share: hidden states become logits, a loss or text.

    A subclass has config, embed_tokens, lm_head (None where the head is tied to the embedding), and the
    methods hidden(ids, cache) and new_cache(). loop goes to hidden: depth=N for the looped model alone, and
    in forward also a cache.
    """

    @property
    def head_weight(self):
        """The matrix that turns hidden states into logits, [V, d]."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids, **loop):
        """ids [B, T] int64 -> logits [B, T, V]"""
        return F.linear(self.hidden(ids, **loop), self.head_weight)

    def loss(self, ids, targets, **loop):
        """The mean cross entropy, in nats. ids and targets: [B, T] each.

        targets[:, i] is the token that should follow ids[:, i]; the caller has shifted them (Batches in
        data.py). A target of -100 does not count.
        """
        h = self.hidden(ids, **loop)  # [B, T, d]
        # F.cross_entropy(F.linear(h, head_weight).flatten(0, 1), targets.flatten()), in less memory
        return head_cross_entropy(h, self.head_weight, targets)

    def generate(self, ids, max_new_tokens=32, temperature=0.0, top_p=1.0, **loop):
        """Continue prompts of one length: ids [B, T] -> [B, T + n] with n <= max_new_tokens.

        temperature, top_p: see next_token. Raises UserError for values that are not possible.
        """
        for token in self.new_tokens(ids, max_new_tokens, temperature, top_p, **loop):
            ids = torch.cat([ids, token], dim=1)
        return ids

    @torch.no_grad()
    def new_tokens(self, ids, max_new_tokens: int, temperature=0.0, top_p=1.0, **loop):
        """Yield one more token of all prompts, [B, 1] int64, for each step of the generation.

        Stops after max_new_tokens, or when every text has produced one of the config's end tokens; texts that
        ended earlier are padded with the first of these.
        """
        check_number("max_new_tokens", max_new_tokens, 1, 10**6)
        check_number("top_p", top_p, 1e-6, 1.0)
        if temperature != 0:
            check_number("temperature", temperature, 0.001, 1000.0)
        ends = torch.tensor(self.config.eos_token_id, dtype=torch.int64, device=ids.device)
        padding = self.config.eos_token_id[0] if self.config.eos_token_id else 0
        done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)

        cache = self.new_cache(**loop)
        unseen = ids  # the tokens that are not in the cache yet
        for _ in range(max_new_tokens):
            h = self.hidden(unseen, cache=cache, **loop)
            logits = promote(F.linear(h[:, -1], self.head_weight))  # [B, V]
            token = next_token(logits, temperature, top_p)
            token = torch.where(done, padding, token)
            yield token

            done = done | torch.isin(token, ends)
            if done.all():
                return
            unseen = token if cache is not None else torch.cat([unseen, token], dim=1)


def next_token(logits, temperature: float, top_p: float):
    """The likeliest token at temperature 0, otherwise one that is drawn. logits [B, V] -> [B, 1]

    It is drawn from the likeliest tokens that together have at least the probability top_p (arXiv 1904.09751,
    section 3.1). Raises UserError for logits that are not finite.
    """
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite; give an earlier checkpoint or another depth")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)

    p = (logits / temperature).softmax(-1)
    sorted_p, order = p.sort(dim=-1, descending=True)
    mass_before = sorted_p.cumsum(-1) - sorted_p  # of the likelier tokens
    kept = sorted_p * (mass_before < top_p)
    choice = torch.multinomial(kept, num_samples=1)  # a place in the order
    return order.gather(-1, choice)


class Qwen(LanguageModel):
    """The Qwen2.5 decoder. ids [B, T] -> logits [B, T, V]

    Its modules have the names of a Hub checkpoint, without the prefix "model.".
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.source = None  # the folder or Hub name of the weights, to which a saved Ouroboros refers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def new_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.layers]

    def hidden(self, ids, cache: list[KVCache] | None = None):
        """ids [B, T] -> normalised last hidden states [B, T, d]. The tokens in a cache come before ids."""
        first = 0 if cache is None else cache[0].length
        rotary = rotary_at(self.config, first, ids.shape[1], ids.device)
        if cache is None:
            cache = [None] * len(self.layers)

        x = self.embed_tokens(ids)  # [B, T, d]
        for layer, layer_cache in zip(self.layers, cache):
            x = layer(x, rotary, layer_cache)
        return self.norm(x)

    @classmethod
    def without_weights(cls, folder_or_repo) -> "Qwen":
        """The model that config.json describes, with shapes and no weights: on the meta device."""
        with torch.device("meta"):
            return cls(Config.from_pretrained(folder_or_repo))

    @classmethod
    def from_pretrained(cls, folder_or_repo, dtype=torch.float32, device="cpu") -> "Qwen":
        """Load and freeze the weights of a folder, of a Hub repository, or of "tiny", which comes with this
        program.

        dtype None leaves the weights in their files, on the CPU and in their own type: each is read when it
        is first used. Raises UserError for a checkpoint that is damaged or that this decoder cannot run.
        """
        check_choice("dtype", dtype, (*FLOAT_TYPES, None))
        config = Config.from_pretrained(folder_or_repo)
        tensors = {}
        for name, tensor in read_weights(folder_or_repo):
            if dtype is not None:
                tensor = tensor.to(device, dtype, copy=True)  # a copy, since the file may change later
            tensors[name.removeprefix("model.")] = tensor
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            head = tensors.pop("lm_head.weight")
            if not torch.equal(head, tensors.get("embed_tokens.weight", head)):
                raise UserError(f"{folder_or_repo}: has an lm_head, so tie_word_embeddings must be false")

        biases = any(name.endswith("q_proj.bias") for name in tensors)
        with torch.device("meta"):  # shapes without memory, until the loaded tensors are assigned
            model = cls(replace(config, attention_bias=biases))
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:  # it says which names or shapes differ
            raise UserError(
                f"{folder_or_repo}: its weights do not fit its config.json ({one_line(error)})"
            ) from error
        model.requires_grad_(False)
        model.source = full_name(folder_or_repo)
        return model.eval()

    def fingerprint(self) -> str:
        """A hash of the config and of samples of all weights, by which a saved Ouroboros recognises its base.

        It is the same wherever the files lie and in which type the weights were loaded.
        """
        numbers = asdict(replace(self.config, eos_token_id=()))
        digest = hashlib.sha256(str(numbers).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            values = tensor.flatten()
            last = max(0, len(values) - 256)
            for first in (0, last // 3, last * 2 // 3, last):  # of a mapped file, few pages are read
                sample = values[first : first + 256].bfloat16().float()
                digest.update(sample.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]
