"""M1, the byte model behind the code, frozen so that every machine computes the same bits of it.

Encoder and decoder must see equal probabilities, and floats drift: the result of a matrix product
depends on the order of its sums, so on the library, the number of threads and the shape of the
batch. Here every number of a matrix product is a whole multiple of a power of two, small enough
that no partial sum needs more than 53 bits. Then fp64 holds all of them exactly, and there is one
result whatever the order, with or without fused multiply-adds:

- a weight is an int16 times a power of two of its tensor: 15 bits and the sign;
- an activation is a multiple of 2^-12 and lies within +-2^8: 20 bits and the sign;
- the part that attention gives to a key is a multiple of 2^-16 up to 1: 16 bits;
- no sum has more than 2^11 terms, so none needs more than 20 + 20 + 11 = 51 bits.

Between products there is nothing but IEEE 754's own operations on single numbers (sum, product,
quotient, square root, rounding), which are the same everywhere; exponentials come from a table
that is made with integers. Rotary angles are kept in the file, since cosines differ by library.

The shape is that of our models in `model.build`: RMSNorm, rotary attention, SwiGLU.
Shape suffixes: B texts, T places, H hidden, D head size, A heads, V symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Floats, Integers
from megascale.errors import UserError
from megascale.infowindow.checked_files import Arrays, digest_of, read_arrays, write_arrays
from megascale.infowindow.tables import END

KIND = "megascale.infowindow.m1"
MADE_BY = "megascale infowindow train-m1"
ACTIVATION_BITS, ACTIVATION_LIMIT = 12, 256.0
WEIGHT_LIMIT = 2**15 - 1
SHARE_BITS, EXP_BITS, TABLE_BITS = 16, 30, 12
MOST_TERMS = 2**11
BATCH_PLACES = 1 << 11
"""Places of one pass: what fits into the processor's cache, roughly."""


@dataclass(frozen=True)
class Shape:
    """The sizes of an M1."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    context_bytes: int
    """Bytes that it sees at most."""
    rope_base: float
    norm_eps: float
    tied_embeddings: bool

    def require_exact(self) -> None:
        """Raises UserError where sums would not fit into 53 bits, or bytes into the vocabulary."""
        longest = max(self.hidden_size, self.ffn_hidden_size, self.context_bytes + 1)
        if longest > MOST_TERMS or self.vocab_size <= END:
            raise UserError(
                f"M1: sizes up to {MOST_TERMS} and a vocabulary of {END + 1} can be frozen, not "
                f"{longest} and {self.vocab_size}; train a smaller one on a corpus of bytes"
            )

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of an M1's arrays, without the exponents."""
        hidden, inner = self.hidden_size, self.ffn_hidden_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        yield "model.norm.weight", (hidden,)
        if not self.tied_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)
        for one in ("cos", "sin"):
            yield f"rotary.{one}", (self.context_bytes + 1, self.head_dim // 2)
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for layer in range(self.num_layers):
            for name, size in of_layer.items():
                yield f"model.layers.{layer}.{name}.weight", size


@dataclass(frozen=True)
class M1:
    """A frozen byte model."""

    shape: Shape
    arrays: Arrays = field(repr=False)
    """int16 by name, with the exponent of each under `NAME.exponent`, as in Hugging Face's Llama;
    `rotary.cos` and `rotary.sin` (places, D / 2)."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shape and weights."""
        return digest_of(KIND, self.arrays, asdict(self.shape))

    @staticmethod
    def freeze(shape: Shape, weights: Mapping[str, NDArray[Any]]) -> M1:
        """Round trained weights to int16 times a power of two.

        Raises UserError for a shape whose sums would not fit into 53 bits, and for weights that
        are not finite.
        """
        shape.require_exact()
        arrays: dict[str, NDArray[Any]] = {}
        for name, weight in [*weights.items(), *_rotary(shape).items()]:
            if not np.isfinite(weight).all():
                raise UserError(f"M1: {name} has values that are no numbers; train it again")
            arrays[name], arrays[f"{name}.exponent"] = _to_int16(weight)
        return M1(shape, arrays)

    def save(self, path: Path) -> None:
        """Write it. Raises UserError where that is impossible."""
        write_arrays(path, KIND, self.arrays, asdict(self.shape))

    @staticmethod
    def open(path: Path) -> M1:
        """Read it. Raises UserError for what is not a whole M1 file of this version."""
        content = read_arrays(path, KIND, MADE_BY)
        return M1.of(content.arrays, content.facts, path)

    @staticmethod
    def of(arrays: Arrays, facts: Mapping[str, Any], where: Path) -> M1:
        """An M1 from the content of a file; `where` names that."""
        try:
            model = M1(Shape(**facts), arrays)
            model.shape.require_exact()
            model._require_tensors()
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{where}: no M1 that this program knows; {MADE_BY} again") from None
        return model

    def _require_tensors(self) -> None:
        """Raises KeyError or ValueError unless the arrays are those of the shape."""
        known = 0
        for name, size in self.shape.tensors():
            for one, wanted in ((name, size), (f"{name}.exponent", (1,))):
                found = self.arrays[one]
                if found.dtype != np.int16 or found.shape != wanted or not found.size:
                    raise ValueError(f"{one} is {found.dtype} of {found.shape}")
                known += 1
        if known != len(self.arrays):
            raise ValueError("tensors that no M1 has")

    @property
    def num_parameters(self) -> int:
        """Weights, without the rotary table."""
        return sum(
            one.size
            for name, one in self.arrays.items()
            if not name.endswith(".exponent") and not name.startswith("rotary.")
        )

    def weights_along(self, texts: list[bytes]) -> list[Integers]:
        """See `ByteModel`; a text is read in pieces of what the model sees, half of it anew."""
        pieces: list[bytes] = []
        keep: list[list[tuple[int, int]]] = []
        for text in texts:
            keep.append([])
            for start, first, stop in _pieces(len(text), self.shape.context_bytes):
                keep[-1].append((len(pieces), first - start))
                pieces.append(text[start:stop])
        found: list[Integers] = [np.empty((0, END + 1), np.int64)] * len(pieces)
        for batch in _batches(pieces):
            hidden = self._hidden([pieces[i] for i in batch])
            for i, states in zip(batch, hidden, strict=True):
                found[i] = self._weights_of(states[: len(pieces[i]) + 1])
        return [np.concatenate([found[i][skip:] for i, skip in parts]) for parts in keep]

    def weights_in_parts(self, text: bytes) -> Iterator[Integers]:
        """See `ByteModel`."""
        for start, first, stop in _pieces(len(text), self.shape.context_bytes):
            (weights,) = self.weights_along([text[start:stop]])
            yield weights[first - start :]

    def weights_after(self, contexts: list[bytes]) -> Integers:
        """See `ByteModel`."""
        seen = [one[_begin(len(one), self.shape.context_bytes) :] for one in contexts]
        states = np.empty((len(seen), self.shape.hidden_size))
        for batch in _batches(seen):
            texts = [seen[i] for i in batch]
            hidden = self._hidden(texts)
            states[batch] = hidden[np.arange(len(texts)), [len(text) for text in texts]]
        return self._weights_of(states)

    @cached_property
    def _weights(self) -> dict[str, Floats]:
        """The weights in fp64, matrices transposed so that a row of states stands to their left."""
        return {
            name: _whole(self.arrays[name] * 2.0 ** int(self.arrays[f"{name}.exponent"][0]))
            for name in self.arrays
            if not name.endswith(".exponent")
        }

    def _hidden(self, texts: list[bytes]) -> Floats:
        """States (B, T, H) after the end of the document before each text and after its bytes."""
        tokens = np.full((len(texts), 1 + max(map(len, texts))), END)
        for row, text in zip(tokens, texts, strict=True):
            row[1 : 1 + len(text)] = np.frombuffer(text, np.uint8)
        x = _grid(self._weights["model.embed_tokens.weight"][tokens])
        for layer in range(self.shape.num_layers):
            name = f"model.layers.{layer}"
            x = _grid(x + self._attention(self._norm(x, f"{name}.input_layernorm"), name))
            x = _grid(x + self._mlp(self._norm(x, f"{name}.post_attention_layernorm"), name))
        return self._norm(x, "model.norm")

    def _norm(self, x: Floats, name: str) -> Floats:
        mean = (x * x).sum(axis=-1, keepdims=True) / x.shape[-1]
        return _grid(x / np.sqrt(mean + self.shape.norm_eps) * self._weights[f"{name}.weight"])

    def _product(self, x: Floats, name: str) -> Floats:
        weight = self._weights[f"{name}.weight"]
        flat = x.reshape(-1, x.shape[-1]) @ weight.T
        return _grid(flat).reshape(*x.shape[:-1], -1)

    def _attention(self, x_BTH: Floats, layer: str) -> Floats:
        shape, places = self.shape, x_BTH.shape[1]
        q, k, v = (
            self._product(x_BTH, f"{layer}.self_attn.{one}_proj")
            .reshape(*x_BTH.shape[:2], -1, shape.head_dim)
            .transpose(0, 2, 1, 3)
            for one in "qkv"
        )
        cos, sin = (self._weights[f"rotary.{one}"][:places] for one in ("cos", "sin"))
        groups = shape.num_heads // shape.num_kv_heads
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (np.repeat(one, groups, axis=1) if groups > 1 else one for one in (k, v))
        scores_BATT = q @ k.transpose(0, 1, 3, 2)
        scores_BATT += np.triu(np.full((places, places), -np.inf), 1)
        scores_BATT -= scores_BATT.max(axis=-1, keepdims=True)
        scores_BATT *= 1.0 / math.sqrt(shape.head_dim)
        shares = _exp(scores_BATT)
        shares /= shares.sum(axis=-1, keepdims=True)
        shares *= 2.0**SHARE_BITS
        np.rint(shares, out=shares)
        shares *= 2.0**-SHARE_BITS
        mixed = _grid(shares @ v).transpose(0, 2, 1, 3)
        return self._product(mixed.reshape(*x_BTH.shape[:2], -1), f"{layer}.self_attn.o_proj")

    def _mlp(self, x: Floats, layer: str) -> Floats:
        gate = self._product(x, f"{layer}.mlp.gate_proj")
        power = _exp(-np.abs(gate))
        gate *= np.where(gate >= 0, 1.0, power) / (1.0 + power)
        return self._product(
            _grid(gate * self._product(x, f"{layer}.mlp.up_proj")), f"{layer}.mlp.down_proj"
        )

    def _weights_of(self, states_NH: Floats) -> Integers:
        """Weights of all symbols, (N, 257), multiples of 2^-30 of the most probable one's."""
        tied = self.shape.tied_embeddings
        head = self._weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        logits = _grid(states_NH @ head[: END + 1].T)
        logits -= logits.max(axis=1, keepdims=True)
        return (_exp(logits) * 2.0**EXP_BITS).astype(np.int64)


def _whole(values: Any) -> Floats:
    return np.ascontiguousarray(values, dtype=np.float64)


def _grid(x: Floats) -> Floats:
    """Rounded to multiples of 2^-12, within +-2^8; in place."""
    np.multiply(x, 2.0**ACTIVATION_BITS, out=x)
    np.rint(x, out=x)
    np.multiply(x, 2.0**-ACTIVATION_BITS, out=x)
    return np.clip(x, -ACTIVATION_LIMIT, ACTIVATION_LIMIT, out=x)


def _exp(x: Floats) -> Floats:
    """e^x for x <= 0, as multiples of 2^-30, by a table of powers of two with steps of 2^-12."""
    steps = x * (math.log2(math.e) * 2.0**TABLE_BITS)
    np.maximum(steps, _LOWEST, out=steps)
    np.floor(steps, out=steps)
    return _POWERS.take(steps.astype(np.int64) - _LOWEST)


def _power_table() -> Floats:
    """2^(i / 4096), rounded down to multiples of 2^-30, for i from `_LOWEST` to 0; from square
    roots of whole numbers."""
    bits = 80
    table = [1 << bits]
    root = 2 << bits
    for _ in range(TABLE_BITS):
        root = math.isqrt(root << bits)
        table = [one for first in table for one in (first, first * root >> bits)]
    # after step k the bit of weight 2^-k of the exponent is the lowest of the index
    octave = np.array([one >> (bits - EXP_BITS) for one in table])
    octaves = [octave >> down for down in range(EXP_BITS + 1, 0, -1)]
    return _whole(np.concatenate([*octaves, octave[:1]])) * 2.0**-EXP_BITS


_LOWEST = -(EXP_BITS + 1) << TABLE_BITS
_POWERS = _power_table()


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    first, second = np.split(x, 2, axis=-1)
    return _grid(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))


def _rotary(shape: Shape) -> dict[str, Floats]:
    pairs = np.arange(0, shape.head_dim, 2) / shape.head_dim
    angles = np.arange(shape.context_bytes + 1)[:, None] * shape.rope_base**-pairs
    return {"rotary.cos": np.cos(angles), "rotary.sin": np.sin(angles)}


def _to_int16(weight: NDArray[Any]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """int16 and the exponent of the power of two that they count."""
    largest = float(np.abs(weight).max(initial=2.0**-100))
    exponent = math.frexp(largest)[1] - 15
    if largest > WEIGHT_LIMIT * 2.0**exponent:
        exponent += 1
    scaled = np.rint(np.asarray(weight, dtype=np.float64) * 2.0**-exponent)
    return scaled.astype(np.int16), np.array([exponent], dtype=np.int16)


def _begin(length: int, most: int) -> int:
    """Where the model's view of a context of `length` bytes begins.

    It moves by half of what the model sees, so that a long text is read in few passes.
    """
    half = most // 2
    return 0 if length <= most else -(-(length - most) // half) * half


def _pieces(length: int, most: int) -> list[tuple[int, int, int]]:
    """(start, first, stop): the prefixes of `first` to `stop` bytes are seen from `start` on."""
    pieces, first = [], 0
    while first <= length:
        start = _begin(first, most)
        stop = min(length, start + most)
        pieces.append((start, first, stop))
        first = stop + 1
    return pieces


def _batches(texts: list[bytes]) -> list[list[int]]:
    """Texts of like length together, each batch of bounded size."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches: list[list[int]] = []
    for i in order:
        places = len(texts[i]) + 1
        if not batches or (len(batches[-1]) + 1) * places > BATCH_PLACES:
            batches.append([])
        batches[-1].append(i)
    return batches
