"""Log-likelihoods and greedy continuations of text by a checkpoint's model: what lm-eval asks.

A text is read after one token that begins it, as every document is in training, and long ones
lose their beginning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megascale.train.one_rank import OneRankModel

BATCH_TOKENS = 4096
"""Tokens of one pass, or one text where that is longer."""


@dataclass(frozen=True)
class TextTokens:
    """Text to ids and back, and the ids that begin and end one."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    first_id: int
    end_id: int
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
        """How likely each second text is after the first."""
        split = [self._split(*pair) for pair in pairs]
        return self._score([self._cut(context, text) for context, text in split])

    def whole(self, text: str) -> float:
        """Log-likelihood of all of a text, cut where the context ends; each token counts once."""
        ids, most = self.tokens.encode(text), self._context
        joined = [self.tokens.first_id, *ids]
        starts = range(0, len(ids), most)
        windows = [(joined[i : i + 1], joined[i + 1 : i + 1 + most]) for i in starts]
        return sum(one.log_likelihood for one in self._score(windows))

    def generate(self, prompt: str, stops: Sequence[str], most_tokens: int) -> str:
        """The greedy continuation, up to the first of `stops`, which is left out.

        Each token costs a whole pass.
        """
        begin, ids = [self.tokens.first_id, *self.tokens.encode(prompt)], list[int]()
        text = ""
        while len(ids) < most_tokens:
            (logits,) = self.model.logits([(begin + ids)[-self._context :]])
            ids.append(int(logits[-1].argmax()))
            if ids[-1] == self.tokens.end_id:
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
            before = os.path.commonprefix([before, both])
        elif self.tokens.unsettled:
            before = before[: -self.tokens.unsettled]
        return [self.tokens.first_id, *before], both[len(before) :]

    def _cut(self, context: list[int], text: list[int]) -> tuple[list[int], list[int]]:
        """The end of both that fits; the last token is only a target."""
        both = (context + text)[-self._context - 1 :]
        count = min(len(text), len(both) - 1)
        return both[: len(both) - count], both[len(both) - count :]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """Judge the second of each pair, after the first."""
        scored: list[Scored] = []
        for batch in _batches(pairs):
            logits = self.model.logits([(first + second)[:-1] for first, second in batch])
            for (_, second), out in zip(batch, logits, strict=True):
                chances = torch.log_softmax(out[len(out) - len(second) :], dim=-1)
                wanted = torch.tensor(second, dtype=torch.int64, device=out.device)
                total = chances.gather(-1, wanted[:, None]).sum().item()
                scored.append(Scored(total, bool((chances.argmax(dim=-1) == wanted).all())))
        return scored


def _batches(
    pairs: Sequence[tuple[list[int], list[int]]],
) -> Iterator[list[tuple[list[int], list[int]]]]:
    batch: list[tuple[list[int], list[int]]] = []
    for pair in pairs:
        total = sum(len(first) + len(second) for first, second in [*batch, pair])
        if batch and total > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch
