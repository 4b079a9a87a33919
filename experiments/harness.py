"""The models of this repository as lm-evaluation-harness sees them (pip install lm-eval==0.4.13).

A task asks for the probability of a continuation or of a whole text, or for a continuation. The answers are
those of lm_eval's own class for Hugging Face models, with two exceptions: log probabilities are always
float32, and a text without a context follows <|endoftext|>, which ended each document in training.
"""

import math

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from support.fast import promote
from support.files import UserError
from support.machine import progress
from support.pretrained import END_OF_TEXT

GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature"}  # those that are understood here


class HarnessModel(TemplateLM):
    """A LanguageModel of qwen.py with its tokenizer.

    max_length: the most tokens that the model reads at once. batch_size: of the probabilities; texts are
    generated one by one. depth: an argument of the looped model.

    The base class turns a pair of texts, context and continuation, into tokens: spaces at the end of the
    context go to the continuation, and both are encoded together.
    """

    def __init__(self, model, tokenizer, max_length=2048, batch_size=16, **depth):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.depth = depth
        self._device = model.embed_tokens.weight.device  # the base class's name for it

    @property
    def eot_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.tokenizer.token_to_id(END_OF_TEXT)

    def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
        """Text to tokens. A tokenizer that begins every text with a token of its own does so by default."""
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False).ids

    # -- Probabilities

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs) -> list[tuple[float, bool]]:
        """What the base class asks for: requests of (texts, context tokens, continuation tokens)."""
        return self.log_probabilities([(context, continuation) for _, context, continuation in requests])

    def log_probabilities(self, pairs) -> list[tuple[float, bool]]:
        """(the log probability of the continuation, whether each of its tokens is the likeliest) for each
        pair of context and continuation, which are lists of tokens.
        """
        # the longest first, so that there is little padding in a batch
        order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
        answers = [None] * len(pairs)
        for first in progress(range(0, len(pairs), self.batch_size), desc="probabilities", unit=" batches"):
            numbers = order[first : first + self.batch_size]
            for n, answer in zip(numbers, self.answer([pairs[n] for n in numbers])):
                answers[n] = answer
        return answers

    @torch.no_grad()
    def answer(self, pairs) -> list[tuple[float, bool]]:
        """The same for one batch.

        Raises UserError for a continuation that is empty or too long, and for a model without finite logits.
        """
        inputs = []
        for context, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"a task asks for a continuation of {len(continuation)} tokens, where 1 to "
                    f"{self.max_length} can be scored; change the task or --max-length"
                )
            # Of a long context, the end. The last token predicts nothing that is asked for.
            tokens = (context + continuation)[-self.max_length - 1 : -1]
            inputs.append(torch.tensor(tokens, device=self.device))

        # [B, T]. The padding stands to the right, where no token before it sees it.
        ids = pad_sequence(inputs, batch_first=True, padding_value=self.eot_token_id)
        h = self.model.hidden(ids, **self.depth)  # [B, T, d]

        answers = []
        for i, (_, continuation) in enumerate(pairs):
            end = len(inputs[i])
            predicting = h[i, end - len(continuation) : end]  # the head reads no other state
            logits = promote(F.linear(predicting, self.model.head_weight))  # [tokens, V]
            targets = torch.tensor(continuation, device=self.device)
            loss = F.cross_entropy(logits, targets, reduction="sum").item()
            if not math.isfinite(loss):  # the choice of an answer would mean nothing
                raise UserError("the logits are not finite; give an earlier checkpoint, RUN/step-N")
            answers.append((-loss, bool((logits.argmax(-1) == targets).all())))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """The log probability of each text. A text longer than max_length is read in windows, in which each
        of its tokens is predicted once.
        """
        windows = []
        text_of_window = []
        for n, request in enumerate(requests):
            tokens = self.tok_encode(*request.args)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append(make_disjoint_window(window))
                text_of_window.append(n)
        totals = [0.0] * len(requests)
        for n, (log_probability, _) in zip(text_of_window, self.log_probabilities(windows)):
            totals[n] += log_probability
        return totals

    # -- Texts

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """How the model continues each context, up to the first of the strings that end the answer.

        Raises UserError for a way of generating that is not known here, such as top_p.
        """
        texts = []
        for request in progress(requests, desc="texts", unit=" texts"):
            context, settings = request.args
            settings = normalize_gen_kwargs(settings)
            unknown = sorted(set(settings) - GENERATION_SETTINGS)
            if unknown:
                raise UserError(f"{request.task_name}: generation_kwargs {unknown} are not known here")
            ends = [end for end in settings["until"] if end]
            temperature = settings.get("temperature", 0.0)
            texts.append(self.continuation(context, ends, settings["max_gen_toks"], temperature))
        return texts

    def continuation(self, context: str, ends: list[str], max_new_tokens: int, temperature: float) -> str:
        """The text that follows a context, without the end string and what follows it."""
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"--max-length {self.max_length}: leaves no room for the {max_new_tokens} tokens that a task "
                "generates; give more"
            )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        prompt = prompt[-(self.max_length - max_new_tokens) :]
        ids = torch.tensor([prompt], device=self.device)
        tokens = []
        for token in self.model.new_tokens(ids, max_new_tokens, temperature, **self.depth):
            tokens.append(token.item())
            # an end string may be a special token, which is not part of the answer
            shown = self.tokenizer.decode(tokens, skip_special_tokens=False)
            if any(end in shown for end in ends):
                break
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, stop=ends, think_end_token=None)
