"""An exported model as lm-evaluation-harness asks it: log-likelihoods, and generated text."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, StoppingCriteria

from data_pipeline.stream import load_tokenizer
from pretrain.errors import TrainingError, UserError
from pretrain.evals.predictions import predict

LOGITS_BYTES = 64 << 20
# What a task generates that does not say how much, as in the harness's own models.
GENERATED_TOKENS = 256

# Tokens of the context, and those of the answer to it.
Pair = tuple[list[int], list[int]]


class ExportedModel(TemplateLM):
    """A folder of `farspan export`, in transformers.

    Unlike the harness's own class for transformers, it makes logits of answers alone, so that a
    long context fits; it encodes text as in training, without special tokens; and it counts what
    it truncates.

    Attributes:
        truncated: requests of each task whose context lost its beginning.
        progress: called with what is asked for, the requests that are answered, and all of them.
    """

    def __init__(
        self,
        folder: Path,
        max_length: int,
        tokens_at_a_time: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            max_length: tokens that the model sees at most.
            tokens_at_a_time: of the rows of a forward pass, in which there is one at least.
            dtype: of the computation.
        """
        super().__init__()
        self.max_length, self._device, self._dtype = max_length, device, dtype
        self._tokens_at_a_time = max(max_length, tokens_at_a_time)
        self._text = load_tokenizer(folder / "tokenizer.json")
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
        self._head: Tensor = self._model.get_output_embeddings().weight
        self.truncated: Counter[str] = Counter()
        self.progress: Callable[[str, int, int], None] = lambda what, done, total: None

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self._text.encode(string)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each request's answer after its context, and whether it is what greedy decoding gives.

        An empty context, or one without a token of its own, is the token that ends a document.
        """
        pairs = []
        for request in requests:
            context, answer = request.args
            pair = self._encode_pair(context, answer) if context else self._alone(answer)
            # One of white space only has no token left.
            pair = (pair[0] or [self.eot_token_id], pair[1])
            self._check(request, *pair)
            pairs.append(pair)
        return self._score(pairs)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each request's whole text, each token once, in windows of `max_length` tokens."""
        owner, windows = [], []
        for number, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.eot_token_id, self.max_length, context_len=1
            )
            for window in map(utils.make_disjoint_window, rolling):
                owner.append(number)
                windows.append(window)
        sums = [0.0] * len(requests)
        for number, (loglikelihood, _) in zip(owner, self._score(windows), strict=True):
            sums[number] += loglikelihood
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that each request's context is continued with, up to where it says to stop."""
        default = min(GENERATED_TOKENS, max(1, self.max_length // 2))
        asked = [
            (self.tok_encode(request.args[0]), normalize_gen_kwargs(request.args[1], default))
            for request in requests
        ]
        for request, (context, how) in zip(requests, asked, strict=True):
            self._check_room(request.task_name, len(context), how["max_gen_toks"])
            del context[: max(0, len(context) - self.max_length + how["max_gen_toks"])]
        order = sorted(range(len(asked)), key=lambda i: (-len(asked[i][0]), str(asked[i][1])))
        texts = [""] * len(asked)
        done = 0
        # Contexts of the same length alone share a pass, so that none is padded.
        for _, alike in groupby(order, key=lambda i: (len(asked[i][0]), str(asked[i][1]))):
            for batch in _pieces(list(alike), self._tokens_at_a_time // self.max_length):
                contexts = torch.tensor([asked[i][0] or [self.eot_token_id] for i in batch])
                for i, text in zip(
                    batch, self._continue(contexts, asked[batch[0]][1]), strict=True
                ):
                    texts[i] = text
                done += len(batch)
                self.progress("texts", done, len(asked))
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, answer) for _, context, answer in requests])

    def _alone(self, answer: str) -> Pair:
        return [self.eot_token_id], self.tok_encode(answer)

    def _check(self, request: Any, context: list[int], answer: list[int]) -> None:
        task = request.task_name
        if not answer:
            raise UserError(
                f"{task}: the answer {request.args[1]!r} has no token of its own after "
                f"{request.args[0][-20:]!r}: begin answers with a space (target_delimiter or "
                "doc_to_target of the task's file)"
            )
        if len(answer) > self.max_length:
            raise UserError(
                f"{task}: an answer has {len(answer)} tokens, and the model sees "
                f"{self.max_length} at most (--context)"
            )
        if len(context) + len(answer) > self.max_length + 1:
            self.truncated[task] += 1

    def _check_room(self, task: str, context: int, generated: int) -> None:
        if generated >= self.max_length:
            raise UserError(
                f"{task} generates up to {generated} tokens, and the model sees {self.max_length} "
                "at most (--context), its context among them: set less in the task's file, as "
                f"generation_kwargs.max_gen_toks: {max(1, self.max_length // 2)}"
            )
        if context + generated > self.max_length:
            self.truncated[task] += 1

    @torch.no_grad()
    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        # Answers of one token to a context share its row, as all rows that begin alike would.
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (context, answer) in enumerate(pairs):
            rows[tuple((context + answer)[-(self.max_length + 1) : -1])].append(number)
        scores: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(sorted(rows, key=len, reverse=True)):
            hidden = self._hidden(batch)
            for row, tokens in zip(hidden, batch, strict=True):
                for number in rows[tokens]:
                    answer = pairs[number][1]
                    at_answer = row[len(tokens) - len(answer) : len(tokens)]
                    scores[number] = self._score_answer(at_answer, answer)
            self.progress("answers", len(scores), len(pairs))
        return [scores[number] for number in range(len(pairs))]

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        """Rows that come by falling length, as many at a time as have `tokens_at_a_time`."""
        first = 0
        while first < len(rows):
            count = max(1, self._tokens_at_a_time // len(rows[first]))
            yield rows[first : first + count]
            first += count

    def _hidden(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """[b, longest, d]. What stands after a token does not change it, so rows are filled up."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        with self._precision():
            output = self._model.base_model(ids.to(self.device), use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _score_answer(self, hidden: Tensor, answer: Sequence[int]) -> tuple[float, bool]:
        labels = torch.tensor(answer, device=hidden.device)
        chunk = max(1, LOGITS_BYTES // (4 * self._head.shape[0]))
        likeliest, losses = predict(hidden.to(self._head.dtype), self._head, labels, chunk)
        total = -losses.double().sum().item()
        if not math.isfinite(total):
            raise TrainingError(
                "the model's logits are not finite, so that no answer is likelier than another; "
                "`farspan report RUN` shows since which step its weights or losses are not"
            )
        return total, bool((likeliest == labels).all())

    @torch.no_grad()
    def _continue(self, contexts: Tensor, how: dict[str, Any]) -> list[str]:
        """
        Args:
            contexts: [b, T]
            how: normalised settings of the harness, for all of them.
        """
        settings = dict(how)
        stops, new = list(settings.pop("until", None) or ()), settings.pop("max_gen_toks")
        if not settings.get("do_sample"):
            settings.pop("temperature", None)
        start = contexts.shape[1]
        with self._precision():
            ids = self._model.generate(
                contexts.to(self.device),
                attention_mask=torch.ones_like(contexts, device=self.device),
                max_new_tokens=new,
                pad_token_id=self.eot_token_id,
                stopping_criteria=[_Stops(self._text.decode_batch, start, stops)],
                **settings,
            )
        # Without special tokens: a document that has ended is filled up with them.
        texts = self._text.decode_batch(ids[:, start:].tolist())
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _precision(self) -> AbstractContextManager[Any]:
        enabled = self._dtype != torch.float32
        return torch.autocast(self.device.type, self._dtype if enabled else None, enabled)


class _Stops(StoppingCriteria):
    """Ends a row whose new text contains a stop."""

    def __init__(
        self, decode: Callable[[list[list[int]]], list[str]], start: int, stops: Sequence[str]
    ) -> None:
        self._decode, self._start = decode, start
        self._stops = [stop for stop in stops if stop]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self._decode(input_ids[:, self._start :].tolist())
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _pieces(items: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(items), max(1, size)):
        yield items[first : first + size]
