"""M1's arithmetic: the same bits whatever library, batch and threads, and near to torch's."""

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_m1 import random_m1

from megascale.errors import UserError
from megascale.infowindow import m1 as m1_module
from megascale.infowindow.m1 import M1, _begin, _exp, _pieces
from megascale.infowindow.reference import plain_tables
from megascale.infowindow.tables import TOTAL, byte_tables, cumulative

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"line {i} of a tëxt, {i * i}\n" for i in range(20)).encode()[:300]
MODEL = random_m1(kv_heads=1)


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=150), min_size=1, max_size=6))
def test_the_batch_changes_no_bit(texts):
    together = MODEL.weights_after(texts)
    alone = np.concatenate([MODEL.weights_after([text]) for text in texts])
    along = np.stack([one[-1] for one in MODEL.weights_along(texts)])
    assert (together == alone).all() and (together == along).all()


def test_every_prefix_of_a_long_text_is_seen_as_by_itself():
    (along,) = MODEL.weights_along([TEXT])
    each = MODEL.weights_after([TEXT[:i] for i in range(len(TEXT) + 1)])
    assert (along == each).all() and along.shape == (301, 257)


def test_the_tables_of_a_long_text_come_in_parts_of_what_the_model_sees():
    parts = list(MODEL.weights_in_parts(TEXT))
    assert max(map(len, parts)) <= MODEL.shape.context_bytes + 1
    (along,) = MODEL.weights_along([TEXT])
    assert (np.concatenate(parts) == along).all()
    assert (np.stack(list(plain_tables(TEXT, MODEL))) == cumulative(along)).all()


def test_sums_in_any_order_give_the_same_bits(monkeypatch):
    """numpy's own products replaced by ones that add up backwards, in fp64 too."""
    before, calls = MODEL.weights_along([TEXT[:40], TEXT[5:9]]), []

    class Backwards(np.ndarray):
        def __matmul__(self, other):
            left, right = np.asarray(self), np.asarray(other)
            total = np.zeros(np.broadcast_shapes(left.shape[:-2], right.shape[:-2]) + (1, 1))
            for k in reversed(range(left.shape[-1])):
                total = total + left[..., :, k : k + 1] * right[..., k : k + 1, :]
            calls.append(left.shape)
            return total.view(Backwards)

        def __rmatmul__(self, other):
            return other.view(Backwards) @ self

    def grid(x):
        return np.asarray(original(np.asarray(x))).view(Backwards)

    original = m1_module._grid
    monkeypatch.setattr(m1_module, "_grid", grid)
    after = MODEL.weights_along([TEXT[:40], TEXT[5:9]])
    assert all((one == other).all() for one, other in zip(before, after, strict=True))
    assert len(calls) == 2 * 9 + 2  # every product of two layers, and the head twice


def test_every_sum_fits_into_53_bits():
    limit = m1_module.ACTIVATION_LIMIT * 2**m1_module.ACTIVATION_BITS
    for largest in (m1_module.WEIGHT_LIMIT, limit, 2**m1_module.SHARE_BITS):
        assert limit * largest * m1_module.MOST_TERMS <= 2**53


SCRIPT = """
import hashlib, sys
sys.path.insert(0, "tests")
from toy_m1 import random_m1
text = bytes.fromhex("{text}")
model = random_m1(kv_heads=1)
print(model.digest, hashlib.sha256(model.weights_along([text])[0].tobytes()).hexdigest())
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_change_no_bit(threads):
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    script = SCRIPT.replace("{text}", TEXT.hex())
    environment = os.environ | dict.fromkeys(names, threads) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole = hashlib.sha256(MODEL.weights_along([TEXT])[0].tobytes()).hexdigest()
    assert done.stdout.split() == [MODEL.digest, whole]
    # the same on every Python, numpy and processor this was ever run on
    assert MODEL.digest.startswith(DIGEST) and whole.startswith(WEIGHTS)


DIGEST, WEIGHTS = "274729da80d9c368", "49be4ef0c42ef5c9"


def test_exponentials_are_right():
    x = -np.linspace(0, 30, 4001)
    assert np.abs(_exp(x) - np.exp(x)).max() < 2e-4
    assert _exp(np.zeros(1))[0] == 1.0
    assert (_exp(x) * 2**30 % 1 == 0).all()


def test_the_shape_is_that_of_llama():
    """transformers' own Llama with the unrounded weights, in fp64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = MODEL.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tied_embeddings,
    )
    theirs = LlamaForCausalLM(config).double()
    names = [name for name in MODEL._weights if not name.startswith("rotary")]
    theirs.load_state_dict({name: torch.from_numpy(MODEL._weights[name]) for name in names})
    text = TEXT[:50]
    with torch.no_grad():
        ids = torch.tensor([[256, *text]])
        expected = theirs(ids).logits[0].log_softmax(-1).numpy()
    weights = MODEL.weights_along([text])[0]
    found = np.log(np.maximum(weights, 1) / weights.sum(axis=1, keepdims=True))
    likely = expected > math.log(1e-6)
    assert np.abs(found - expected)[likely].max() < 0.02


def test_tables_are_of_bytes_that_go_on():
    tables = byte_tables(MODEL.weights_after([b"", b"x"]))
    assert tables.shape == (2, 257)
    assert (tables[:, 0] == 0).all() and (tables[:, -1] == TOTAL).all()


@given(st.integers(0, 5000), st.integers(16, 1024))
def test_every_prefix_is_in_one_piece(length, most):
    seen = [
        (i, start) for start, first, stop in _pieces(length, most) for i in range(first, stop + 1)
    ]
    assert [i for i, _ in seen] == list(range(length + 1))
    assert all(start == _begin(i, most) and i - start <= most for i, start in seen)
    assert all(i - start >= most // 2 - 1 or start == 0 for i, start in seen)


def test_files_come_back_and_bad_ones_are_refused(tmp_path):
    path = tmp_path / "m1.safetensors"
    MODEL.save(path)
    again = M1.open(path)
    assert again.digest == MODEL.digest and again.num_parameters == MODEL.num_parameters
    assert (again.weights_after([TEXT]) == MODEL.weights_after([TEXT])).all()
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="its checksum is not that of its content"):
        M1.open(path)
    path.write_bytes(raw[:1000])
    with pytest.raises(UserError, match="damaged or no megascale.infowindow.m1 file"):
        M1.open(path)
    with pytest.raises(UserError, match="no such file; make it with megascale infowindow train-m1"):
        M1.open(tmp_path / "other")


@pytest.mark.parametrize(
    "changes, size",
    [
        ({"model.layers.1.self_attn.o_proj.weight": None}, {}),
        ({"model.norm.weight.exponent": None}, {}),
        ({"lm_head.weight": np.zeros((257, 31), np.int16)}, {}),
        ({"lm_head.weight": np.zeros((257, 32))}, {}),
        ({"model.layers.2.mlp.up_proj.weight": np.zeros((64, 32), np.int16)}, {}),
        ({}, {"num_layers": 3}),
        ({}, {"num_layers": 10**12}),
        ({}, {"context_bytes": 65}),
        ({"rotary.cos": np.zeros((4001, 8), np.int16), "rotary.sin": np.zeros((4001, 8), np.int16)},
         {"context_bytes": 4000}),
    ],
)  # fmt: skip
def test_tensors_are_those_of_the_shape(tmp_path, changes, size):
    path, arrays = tmp_path / "m1.safetensors", {**MODEL.arrays, **changes}
    whole = {name: one for name, one in arrays.items() if one is not None}
    M1(replace(MODEL.shape, **size), whole).save(path)
    with pytest.raises(UserError, match="m1.safetensors: no M1 that this program knows; megascale"):
        M1.open(path)


def test_what_cannot_be_frozen_is_refused():
    weights = {name: MODEL._weights[name] for name in MODEL._weights}
    with pytest.raises(UserError, match="sizes up to 2048"):
        M1.freeze(replace(MODEL.shape, ffn_hidden_size=4096), {})
    with pytest.raises(UserError, match="a vocabulary of 257 can be frozen, not 65 and 256"):
        M1.freeze(replace(MODEL.shape, vocab_size=256), {})
    weights["model.norm.weight"] = np.full(32, np.nan)
    with pytest.raises(UserError, match="model.norm.weight has values that are no numbers"):
        M1.freeze(MODEL.shape, weights)
