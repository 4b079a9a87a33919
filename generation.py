"""Generation: a model continues prompts, token by token."""

import torch
import torch.nn.functional as F

from device import promote  # to float32, or float64 if it is that already


@torch.no_grad()
def new_tokens(model, ids, max_new_tokens: int, temperature=0.0, top_p=1.0, **options):
    """Yield the next tokens of all prompts, [B, 1] int64, again and again. ids [B, T]: prompts of one length.

    Stops after max_new_tokens, or when every text has produced one of the config's end tokens; texts that
    ended earlier are padded with the first of these. temperature, top_p: see next_token. **options are
    passed on to the model's hidden() and new_cache().
    """
    ends = torch.tensor(model.config.eos_token_id, dtype=torch.int64, device=ids.device)
    padding = model.config.eos_token_id[0] if model.config.eos_token_id else 0
    done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)

    cache = model.new_cache(**options)
    unseen = ids  # the tokens that are not in the cache yet
    for _ in range(max_new_tokens):
        h = model.hidden(unseen, cache=cache, **options)
        logits = promote(F.linear(h[:, -1], model.head_weight))  # [B, V]
        token = next_token(logits, temperature, top_p)
        token = torch.where(done, padding, token)
        yield token

        done = done | torch.isin(token, ends)
        if done.all():
            return
        ids = torch.cat([ids, token], dim=1)
        unseen = ids if cache is None else token


def next_token(logits, temperature: float, top_p: float):
    """The likeliest token at temperature 0, otherwise one that is drawn. logits [B, V] -> [B, 1]

    It is drawn with torch's random numbers, from the likeliest tokens that together have at least top_p.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        p = nucleus(p, top_p)
    return torch.multinomial(p, num_samples=1)


def nucleus(p, top_p: float):
    """The probabilities of the likeliest tokens that together have at least top_p; 0 for all others.

    p [B, V] -> [B, V], where a row need not sum to 1. Source: arXiv 1904.09751, section 3.1.
    """
    sorted_p, order = p.sort(dim=-1, descending=True)
    mass_before = sorted_p.cumsum(-1) - sorted_p  # of the likelier tokens
    kept = sorted_p * (mass_before < top_p)
    return torch.zeros_like(p).scatter(-1, order, kept)
