"""Log-likelihoods and greedy continuations of text by a checkpoint's model: what lm-eval asks.

A text is read after one token that begins it, as every document is in training. Windows and cuts
are those of lm-eval's own backend for `transformers` models, so both give the same scores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megascale.convert.one_rank import OneRankModel

BATCH_TOKENS = 4096
"""Tokens of one pass, or one window where that is longer."""

TokenPair = tuple[list[int], list[int]]
"""Tokens that are read, and those after them that are scored."""


@dataclass(frozen=True)
class TextTokens:
    """Text to ids and back, and the ids that begin and end a text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    first_id: int
    end_ids: frozenset[int]
    """Generation stops at any of them."""
    unsettled: int | None = 0
    """So many ids at the end of a text depend on what follows it, as those of the last of
    Equal-Info Windows do; None: nobody knows how many."""


@dataclass(frozen=True)
class Scored:
    """How a model judges a stretch of tokens."""

    log_likelihood: float
    """Sum over the tokens, in nats."""
    is_greedy: bool
    """Whether each of them is what the model finds likeliest."""


@dataclass(frozen=True)
class TextScorer:
    """A model and its tokenizer."""

    model: OneRankModel
    tokens: TextTokens

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """How likely each second text is after the first.

        The first loses its beginning where both together exceed the context. A second text that
        exceeds the context alone is scored whole, in windows, as `whole` does.
        """
        return self._score([self._split(*pair) for pair in pairs])

    def whole(self, text: str) -> float:
        """Log-likelihood of all of a text; each token is scored once.

        Windows follow one another at the length of the context. The last one begins earlier, so
        that its tokens have a full context before them.
        """
        (scored,) = self._score([([self.tokens.first_id], self.tokens.encode(text))])
        return scored.log_likelihood

    def generate(self, prompt: str, stops: Sequence[str], most_tokens: int) -> str:
        """The greedy continuation, up to an id that ends a text or the first of `stops`, which is
        left out.

        A prompt loses its beginning where it and `most_tokens` together exceed the context. Where
        `most_tokens` alone exceed it, the beginning goes as the text grows. Each token costs a
        whole pass.
        """
        begin, ids = [self.tokens.first_id, *self.tokens.encode(prompt)], list[int]()
        if most_tokens < self._context:
            begin = begin[most_tokens - self._context :]
        text = ""
        while len(ids) < most_tokens:
            (logits,) = self.model.logits([(begin + ids)[-self._context :]])
            ids.append(int(logits[-1].argmax()))
            if ids[-1] in self.tokens.end_ids:
                break
            text = self.tokens.decode(ids)
            places = [text.find(stop) for stop in stops if stop and stop in text]
            if places:
                return text[: min(places)]
        return text

    @property
    def _context(self) -> int:
        return self.model.config.data.context_tokens

    def _split(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Tokens of both; spaces between them go to the second, where tokenizers want them.

        Ids of the context that depend on what follows are part of the second. So what it holds of
        the context is the same for every text that is compared (but where nobody knows how many).
        """
        stripped = context.rstrip()
        text = context[len(stripped) :] + text
        before = self.tokens.encode(stripped) if stripped else []
        both = self.tokens.encode(stripped + text)
        if self.tokens.unsettled is None:
            before = list(os.path.commonprefix([before, both]))
        elif self.tokens.unsettled:
            before = before[: -self.tokens.unsettled]
        return [self.tokens.first_id, *before], both[len(before) :]

    def _score(self, pairs: Sequence[TokenPair]) -> list[Scored]:
        """Judge the second of each pair, after the first, in as many windows as it takes."""
        windows = [list(_windows(*pair, self._context)) for pair in pairs]
        judged = self._score_windows([window for each in windows for window in each])
        parts = [[next(judged) for _ in each] for each in windows]
        return [
            Scored(
                sum((part.log_likelihood for part in each), 0.0),
                all(part.is_greedy for part in each),
            )
            for each in parts
        ]

    def _score_windows(self, windows: Sequence[TokenPair]) -> Iterator[Scored]:
        """Judge the second of each window, after the first."""
        for batch in _batches(windows):
            logits = self.model.logits([(first + second)[:-1] for first, second in batch])
            for (_, second), out in zip(batch, logits, strict=True):
                chances = torch.log_softmax(out[len(out) - len(second) :], dim=-1)
                wanted = torch.tensor(second, dtype=torch.int64, device=out.device)
                total = chances.gather(-1, wanted[:, None]).sum().item()
                yield Scored(total, bool((chances.argmax(dim=-1) == wanted).all()))


def _windows(before: list[int], text: list[int], context: int) -> Iterator[TokenPair]:
    """`text` in parts of at most `context` tokens, each after as many tokens as one pass can read.

    A pass reads at most `context` tokens; the last token of a window is only a target.
    """
    joined = before + text
    for start in range(len(before), len(joined), context):
        end = min(start + context, len(joined))
        yield joined[max(0, end - 1 - context) : start], joined[start:end]


def _batches(pairs: Sequence[TokenPair]) -> Iterator[list[TokenPair]]:
    batch: list[TokenPair] = []
    for pair in pairs:
        total = sum(len(first) + len(second) for first, second in [*batch, pair])
        if batch and total > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch
