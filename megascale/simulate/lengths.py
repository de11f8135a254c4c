"""Document lengths drawn from known distributions, to plan and simulate without a corpus."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Floats, Integers
from megascale.corpus.pieces import PieceIndex
from megascale.corpus.shards import Shard
from megascale.corpus.sources import describe
from megascale.errors import UserError, did_you_mean
from megascale.reading import MOST_TEXT_BYTES, read_whole

LONGEST = 2**40
"""Tokens that a line of a lengths file may say."""
_LENGTH = re.compile(r"0{0,40}[1-9][0-9]{0,12}")
MOST_SEQUENCES = 2**22
"""That are drawn at once, more than any batch has."""
BLOCK = 4096
"""Documents are drawn in blocks of so many, so that more tokens only add documents."""


def _lognormal(rng: np.random.Generator, median: float, sigma: float) -> Floats:
    return median * np.exp(sigma * rng.standard_normal(BLOCK))


def _github(rng: np.random.Generator) -> Floats:
    return _lognormal(rng, 1100.0, 1.75)


def _commoncrawl(rng: np.random.Generator) -> Floats:
    return _lognormal(rng, 900.0, 1.2)


def _byted(rng: np.random.Generator) -> Floats:
    """GitHub's body with 0.05 % giants, log-uniform from 0.5M to 4M tokens."""
    body, is_giant = _github(rng), rng.random(BLOCK) < 0.0005
    giants = np.exp(rng.uniform(np.log(0.5e6), np.log(4e6), BLOCK))
    return np.where(is_giant, giants, body)


_BYTESCALE_SHARES = (0.0, 0.8, 0.9477, 0.99, 0.99412, 0.99867, 0.9995, 1.0)
_BYTESCALE_TOKENS = (1 << 7, 1 << 12, 1 << 15, 1 << 17, 1 << 18, 1 << 19, 1 << 21, 3 << 20)


def _bytescale_byted(rng: np.random.Generator) -> Floats:
    """Log-linear between quantiles that meet the facts of ByteScale's figure of its own data.

    About 80 % of documents up to 4K; 1 % from 128K hold 44.3 % of tokens; 0.05 % from 2M hold
    12.1 %; 37 % of tokens in documents over 256K.
    """
    logs = np.interp(rng.random(BLOCK), _BYTESCALE_SHARES, np.log(_BYTESCALE_TOKENS))
    tokens: Floats = np.exp(logs)
    return tokens


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "github": _github,
    "commoncrawl": _commoncrawl,
    "byted": _byted,
    "bytescale_byted": _bytescale_byted,
    "code": _github,
    "web": _commoncrawl,
}
"""By name: a block of document lengths, before any cut. `code` and `web` are plain names of the
first two."""


def draw_lengths(
    name: str,
    num_tokens: int | None,
    context: int,
    seed: int,
    num_sequences: int | None = None,
) -> Integers:
    """Lengths in tokens of documents drawn at random, each cut at `context`.

    Documents are drawn until `num_tokens` is reached, the last one cut so that the sum is exact;
    or, where `num_tokens` is None, `num_sequences` of them. Raises UserError for an unknown name,
    for sizes below 1, and for more than MOST_SEQUENCES.
    """
    if name not in DISTRIBUTIONS:
        meant = did_you_mean(name, DISTRIBUTIONS)
        raise UserError(f"lengths '{name}': unknown{meant}; known are {', '.join(DISTRIBUTIONS)}")
    wanted = num_sequences if num_tokens is None else num_tokens
    if wanted is None or wanted < 1 or context < 1:
        raise UserError(
            f"lengths '{name}': {wanted} of at most {context} tokens; both must be >= 1"
        )
    return _draw(DISTRIBUTIONS[name], num_tokens, context, seed, num_sequences)


def sample_lengths(documents: ArrayLike, num_tokens: int, context: int, seed: int) -> Integers:
    """Like `draw_lengths`, from the lengths of given documents, with replacement."""
    known = np.asarray(documents, dtype=np.float64)
    return _draw(lambda rng: rng.choice(known, BLOCK), num_tokens, context, seed)


def sample_pieces(documents: ArrayLike, num_tokens: int, context: int, seed: int) -> Integers:
    """Lengths of pieces drawn with replacement from all that given documents are cut into.

    Longer documents are cut into several pieces, as training cuts them. Exactly `num_tokens` in
    sum, the last piece cut.
    """
    index = PieceIndex(np.asarray(documents, dtype=np.int64), context)

    def block(rng: np.random.Generator) -> Floats:
        numbers = rng.integers(index.num_pieces, size=BLOCK)
        return index.pieces(numbers).length.astype(np.float64)

    return _draw(block, num_tokens, context, seed)


def given_documents(spec: str, where: str) -> Integers | None:
    """Tokens of the documents of `corpus:PATH`, `file:PATH` or the path of a file that is there;
    None for any other text. The name of a distribution is no path.

    A corpus is a prepared folder or the prefix of a Megatron `.bin` / `.idx` pair.

    Raises UserError, for files beginning with `where`, where they cannot be read.
    """
    kind, _, path = spec.partition(":")
    if kind == "corpus":
        is_prefix = not Path(path).is_dir() and Path(f"{path}.idx").is_file()
        shard = Shard.open(path if is_prefix else describe(path).train)
        return np.asarray(shard.lengths, dtype=np.int64)
    if kind == "file":
        return read_lengths(path, f"{where}file:")
    is_path = spec not in DISTRIBUTIONS and Path(spec).exists()
    return read_lengths(spec, where) if is_path else None


def _draw(
    block: Callable[[np.random.Generator], Floats],
    num_tokens: int | None,
    context: int,
    seed: int,
    num_sequences: int | None = None,
) -> Integers:
    rng = np.random.default_rng(seed)
    blocks: list[Integers] = []
    left = (num_sequences if num_tokens is None else num_tokens) or 0
    while left > 0:
        if len(blocks) * BLOCK >= MOST_SEQUENCES:
            raise UserError(
                f"lengths: more than {MOST_SEQUENCES:,} sequences at once; ask for fewer tokens"
            )
        blocks.append(np.rint(np.clip(block(rng), 1, context)).astype(np.int64))
        left -= BLOCK if num_tokens is None else int(blocks[-1].sum())
    lengths = np.concatenate(blocks)
    return lengths[:num_sequences] if num_tokens is None else _first_tokens(lengths, num_tokens)


def _first_tokens(lengths: Integers, num_tokens: int) -> Integers:
    """The first of `lengths` that hold exactly `num_tokens`, the last one cut."""
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, num_tokens)) + 1
    first = lengths[:count].copy()
    first[-1] -= ends[count - 1] - num_tokens
    return first


def read_lengths(path: str, where: str) -> Integers:
    """Tokens of sequences from a text file, one integer a line; empty lines do not count.

    Raises UserError, which begins with `where` and the path.
    """
    where += path
    try:
        lines = read_whole(path, MOST_TEXT_BYTES, or_stream=True).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{where}: {reason}") from None
    lengths = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if not _LENGTH.fullmatch(text) or int(text) > LONGEST:
            raise UserError(
                f"{where}: line {number} is {text[:40]!r}, not a whole number "
                f"of tokens from 1 to {LONGEST}"
            )
        lengths.append(int(text))
    if not lengths:
        raise UserError(f"{where}: holds no length; write one integer a line")
    return np.array(lengths, dtype=np.int64)
