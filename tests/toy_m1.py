"""Byte models for tests: one that a formula gives, and a small frozen M1."""

from __future__ import annotations

import functools
import hashlib
import math
import random

import numpy as np

from megascale.infowindow.codebook import Codebook
from megascale.infowindow.m1 import M1, Shape

SYMBOLS = 257


class FormulaModel:
    """Weights that depend on the last `order` bytes alone, in a way that nobody can foresee.

    `alphabet` bytes are likely and the others all but impossible; `peak` is how uneven they are.
    """

    digest = "formula"

    def __init__(self, alphabet=b"ab", order=1, peak=3.0, seed=0):
        self.alphabet, self.order, self.peak, self.seed = alphabet, order, peak, seed

    def weights_after(self, contexts):
        return np.stack([self._weights(context) for context in contexts])

    def weights_along(self, texts):
        return [self.weights_after([text[:i] for i in range(len(text) + 1)]) for text in texts]

    def weights_in_parts(self, text):
        yield from np.array_split(self.weights_along([text])[0], 2)

    def _weights(self, context):
        known = context[max(0, len(context) - self.order) :]
        digest = hashlib.sha256(bytes([self.seed]) + known).digest()
        draws = np.random.default_rng(int.from_bytes(digest[:8], "little")).random(256)
        weights = np.ones(SYMBOLS, dtype=np.int64)
        chosen = list(self.alphabet)
        weights[chosen] = (np.exp(self.peak * draws[: len(chosen)]) * 2**17).astype(np.int64)
        return weights


def random_m1(seed=0, layers=2, hidden=32, heads=2, kv_heads=2, context=64, scale=0.3):
    """A frozen M1 with random weights."""
    head_dim, inner = hidden // heads, 2 * hidden
    shape = Shape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=inner,
        vocab_size=SYMBOLS,
        context_bytes=context,
        rope_base=10000.0,
        norm_eps=1e-5,
        tied_embeddings=False,
    )
    sizes = {"model.embed_tokens.weight": (SYMBOLS, hidden), "model.norm.weight": (hidden,)}
    sizes["lm_head.weight"] = (SYMBOLS, hidden)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        sizes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (hidden, hidden),
            f"{name}.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{name}.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, hidden),
            f"{name}.mlp.gate_proj.weight": (inner, hidden),
            f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner),
        }
    draw = random.Random(seed).random  # the same numbers in every version of Python
    return M1.freeze(
        shape,
        {
            name: (4 if name == "lm_head.weight" else 1) * scale * _uniform(draw, size)
            for name, size in sizes.items()
        },
    )


def _uniform(draw, size):
    return np.array([3 * draw() - 1.5 for _ in range(math.prod(size))]).reshape(size)


@functools.cache
def small_book():
    """The codebook of a random M1, compiled once for all tests of a process."""
    return Codebook.compile(random_m1(layers=1), "ac", 16, lambda count: None)
