"""The models of this repository as lm-evaluation-harness sees them (pip install lm-eval==0.4.13).

A task asks a model for the probability of a continuation, for the probability of a whole text, or for a
continuation. The questions are texts. What is a task and how it is scored is lm_eval's part; benchmark.py
runs the tasks.

The answers are those of lm_eval's own class for Hugging Face models, HFLM, for the same weights, with two
exceptions: log probabilities are always float32, and a text without a context follows the token that ended a
document in training, <|endoftext|>, which is the first token of a text for the base models of Qwen2.5 too.
"""

import math

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from device import promote
from files import UserError
from hub import END_OF_TEXT
from qwen import LanguageModel

STRIDE = 32  # generated tokens after which a text is searched for the strings that end it
GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature"}  # those that are understood here


class HarnessModel(TemplateLM):
    """A LanguageModel of qwen.py with its tokenizer.

    max_length: the most tokens that the model reads at once. batch_size: of the probabilities; texts are
    generated one by one. options: passed on to the model, such as depth.

    The base class turns a pair of texts, context and continuation, into tokens: spaces at the end of the
    context go to the continuation, and both are encoded together.
    """

    def __init__(self, model: LanguageModel, tokenizer, max_length=2048, batch_size=16, **options):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.options = options
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
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self.log_probabilities(pairs, disable_tqdm)

    def log_probabilities(self, pairs, disable_tqdm=False) -> list[tuple[float, bool]]:
        """(the log probability of the continuation, whether each of its tokens is the likeliest) for each
        pair of context and continuation, which are lists of tokens.
        """

        def length(n: int) -> int:
            context, continuation = pairs[n]
            return len(context) + len(continuation)

        longest_first = sorted(range(len(pairs)), key=length, reverse=True)  # little padding in a batch
        answers = [None] * len(pairs)
        with tqdm(total=len(pairs), desc="probabilities", disable=disable_tqdm) as bar:
            for first in range(0, len(pairs), self.batch_size):
                numbers = longest_first[first : first + self.batch_size]
                batch = [pairs[n] for n in numbers]
                for n, answer in zip(numbers, self.answer(batch)):
                    answers[n] = answer
                bar.update(len(batch))
        return answers

    @torch.no_grad()
    def answer(self, pairs) -> list[tuple[float, bool]]:
        """The same for one batch.

        Raises UserError for a continuation that is empty or too long, and for a model without finite logits.
        """
        inputs = []
        for context, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                text = self.tokenizer.decode(context + continuation)
                raise UserError(
                    f"a continuation of {len(continuation)} tokens, at the end of {text[-80:]!r}, where 1 to "
                    f"{self.max_length} can be scored; change the task or --max-length"
                )
            # Of a long context, the end. The last token predicts nothing that is asked for.
            tokens = (context + continuation)[-self.max_length - 1 : -1]
            inputs.append(torch.tensor(tokens, device=self.device))

        # [B, T]. The padding stands to the right, where no token before it sees it.
        ids = pad_sequence(inputs, batch_first=True, padding_value=self.eot_token_id)
        h = self.model.hidden(ids, **self.options)  # [B, T, d]

        answers = []
        for i, (_, continuation) in enumerate(pairs):
            end = len(inputs[i])
            predicting = h[i, end - len(continuation) : end]  # the head reads no other state
            logits = promote(F.linear(predicting, self.model.head_weight))  # [tokens, V]
            targets = torch.tensor(continuation, device=self.device)
            loss = F.cross_entropy(logits, targets, reduction="sum").item()
            if not math.isfinite(loss):  # the choice of an answer would mean nothing
                raise UserError(
                    "the logits are not finite; try --dtype float32, or an earlier checkpoint, RUN/step-N"
                )
            likeliest = bool((logits.argmax(-1) == targets).all())
            answers.append((-loss, likeliest))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """The log probability of each text. A text longer than max_length is read in windows, in which each
        of its tokens is predicted once.
        """
        windows = []
        text_of_window = []
        for n, request in enumerate(requests):
            (text,) = request.args
            overlapping = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in overlapping:
                windows.append(make_disjoint_window(window))
                text_of_window.append(n)

        totals = [0.0] * len(requests)
        answers = self.log_probabilities(windows, disable_tqdm)
        for n, (log_probability, _) in zip(text_of_window, answers):
            totals[n] += log_probability
        return totals

    # -- Texts

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """How the model continues each context, up to the first of the strings that end the answer.

        Raises UserError for a way of generating that is not known here, such as top_p.
        """
        texts = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            context, settings = request.args
            settings = normalize_gen_kwargs(settings)
            unknown = set(settings) - GENERATION_SETTINGS
            if unknown:
                raise UserError(
                    f"{request.task_name}: asks for {', '.join(sorted(unknown))} in its generation_kwargs; "
                    f"only {', '.join(sorted(GENERATION_SETTINGS))} can be set here"
                )
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
        longest = len(prompt) + max_new_tokens
        text = ""
        while ids.shape[1] < longest:
            ids = self.model.generate(ids, min(STRIDE, longest - ids.shape[1]), temperature, **self.options)
            new_tokens = ids[0, len(prompt) :].tolist()
            text = self.tokenizer.decode(new_tokens, skip_special_tokens=True)
            if new_tokens[-1] in self.model.config.eos_token_id or any(end in text for end in ends):
                break
        return postprocess_generated_text(text, stop=ends, think_end_token=None)
