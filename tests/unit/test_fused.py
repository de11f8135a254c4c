"""Triton kernels against their twins, in Triton's interpreter, and twins against plain torch.

The interpreter must be chosen before triton is imported, so kernels run in a process of their own,
which fails where a difference is above its limit.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megascale.fused.merge import merge_plain
from megascale.fused.rotary import rotate
from megascale.fused.swiglu import swiglu

KERNELS = """
import torch
from megascale.fused import merge, rotary, softmax, swiglu
from megascale.fused import triton_merge, triton_rotary, triton_softmax, triton_swiglu

drawn = torch.Generator().manual_seed(1)
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=drawn).to(dtype)


def check(name, mine, theirs, allowed):
    mine, theirs = (torch.stack([*x]) if isinstance(x, tuple) else x for x in (mine, theirs))
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
    torch.testing.assert_close(mine, theirs, rtol=allowed, atol=allowed, msg=lambda m: name + m)


def rotary_agrees(dtype, allowed):
    "Queries and keys are views of one product, as in the model; heads fill no block."
    for tokens, heads, groups, size in ((5, 9, 3, 20), (1, 2, 2, 8), (0, 2, 1, 8)):
        product = random(tokens, heads + 2 * groups, size, dtype=dtype)
        q, k = product[:, :heads], product[:, heads : heads + groups]
        angle = random(tokens, 1, size // 2)
        table = angle.cos(), angle.sin()
        for is_back, sin in ((False, table[1]), (True, -table[1])):
            found = triton_rotary.turn(q, k, *table, is_back)
            for one, x in zip(found, (q, k), strict=True):
                check("rotary", one, rotary.turn_plain(x, table[0], sin), allowed)


def softmax_agrees(dtype, allowed):
    "Several blocks, rows without an id, targets of other ranks, a rank without ids."
    triton_softmax.BLOCK = 64
    for tokens, width, known in ((7, 200, 150), (3, 64, 64), (2, 50, 0), (0, 10, 10)):
        logits = 10 * random(tokens, width, dtype=dtype)
        rows = torch.randint(-1, max(known, 0) or 1, (tokens,), generator=drawn)
        rows = rows if known else rows.fill_(-1)
        scale = random(tokens).abs() / 100
        twin = softmax.summarise_plain(logits.clone(), known, rows)
        for one, other in zip(triton_softmax.summarise(logits, known, rows), twin[1:]):
            check("summary", one, other, 1e-5)
        mine = logits.clone()
        triton_softmax.differentiate(mine, twin.most_C, scale, known, rows)
        theirs = softmax.differentiate_plain(twin.state_CV, scale, rows).to(dtype)
        check("gradient", mine, theirs, allowed)
    spoilt = torch.tensor([[0.0, float("nan"), 1.0]], dtype=dtype)
    _, total, _ = triton_softmax.summarise(spoilt, 3, torch.zeros(1, dtype=torch.int64))
    assert total.isnan(), "a NaN shows"


def swiglu_agrees(dtype, allowed):
    triton_swiglu.BLOCK = 64
    for tokens, features in ((5, 100), (1, 64), (0, 8)):
        x = random(tokens, 2 * features, dtype=dtype)
        gradient = random(tokens, features, dtype=dtype)
        for weights in (None, random(tokens).abs()):
            found, twin = triton_swiglu.gate(x, weights), swiglu.gate_plain(x, weights)
            check("gate", found, twin, allowed)
            found = triton_swiglu.gate_backward(gradient, x, weights)
            twin = swiglu.gate_backward_plain(gradient, x, weights)
            check("gate of inputs", found[0], twin[0], 4 * allowed)
            if weights is not None:
                check("gate of weights", found[1], twin[1], 1e-4)


def merge_agrees(dtype, allowed):
    "Into rows by a slice and by indices; some have seen no key yet."
    for rows in (slice(2, 6), slice(0, 0), torch.tensor([7, 0, 3, 5])):
        out, lse = random(8, 3, 20), random(8, 3)
        out[:4], lse[:4] = 0, float("-inf")
        count = len(out[rows])
        part, part_lse = random(count, 3, 20, dtype=dtype), random(3, count).T
        mine, theirs = (out.clone(), lse.clone()), (out.clone(), lse.clone())
        first, indices = (rows.start, None) if isinstance(rows, slice) else (0, rows)
        triton_merge.merge(*mine, first, indices, part, part_lse)
        merge.merge_plain(*theirs, rows, part, part_lse)
        for one, other in zip(mine, theirs):
            check("merge", one, other, 1e-5)


for dtype, allowed in DTYPES.items():
    for agrees in (rotary_agrees, softmax_agrees, swiglu_agrees, merge_agrees):
        agrees(dtype, allowed)
print("all agree")
"""


def test_kernels_agree_with_their_twins() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: NO KERNEL OF megascale/fused IS TESTED")
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "all agree" in done.stdout, done.stderr[-3000:]


def test_rotary_turns_pairs_and_its_gradient_turns_back() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(6, n, 10, generator=generator, dtype=torch.float64) for n in (4, 2))
    angle = torch.randn(6, 1, 5, generator=generator, dtype=torch.float64)
    table = angle.cos(), angle.sin()
    turned = rotate(q, k, table)
    for x, y in zip((q, k), turned):
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(y, torch.cat([pairs.real, pairs.imag], dim=-1))
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, table), (q, k))


def test_rotary_in_bf16_computes_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(6, 2, 8, generator=generator).bfloat16() for _ in range(2))
    angle = torch.randn(6, 1, 4, generator=generator)
    table = angle.cos(), angle.sin()
    exact = rotate(q.float(), k.float(), table)
    for rounded, full in zip(rotate(q, k, table), exact):
        assert torch.equal(rounded, full.bfloat16())


@pytest.mark.parametrize("is_weighted", [False, True])
def test_swiglu_and_its_gradients(is_weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = None
    if is_weighted:
        weights = torch.rand(5, generator=generator, dtype=torch.float64, requires_grad=True)
    first, second = x.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(first) * second
    expected = expected if weights is None else expected * weights[:, None]
    torch.testing.assert_close(swiglu(x, weights), expected)
    given = (x,) if weights is None else (x, weights)
    assert torch.autograd.gradcheck(swiglu, given)


def test_merged_parts_are_the_softmax_over_all_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(4, 9, generator=generator), torch.randn(9, 5, generator=generator)
    out, lse = torch.zeros(4, 1, 5), torch.full((4, 1), float("-inf"))
    for keys in (slice(0, 2), slice(2, 9)):
        part = scores[:, keys].softmax(dim=-1) @ values[keys]
        merge_plain(out, lse, slice(0, 4), part[:, None], scores[:, keys].logsumexp(-1)[:, None])
    torch.testing.assert_close(out[:, 0], scores.softmax(dim=-1) @ values)
    torch.testing.assert_close(lse[:, 0], scores.logsumexp(dim=-1))


COMPILED = """
import os, re, subprocess
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megascale.fused import triton_merge, triton_rotary, triton_softmax, triton_swiglu


KERNELS = [
    (triton_rotary._turn, "q query k key", "cos sin", dict(HALF=64, HEADS=8, BACK=True)),
    (triton_softmax._summarise, "logits", "most total target", dict(BLOCK=4096)),
    (triton_softmax._differentiate, "logits", "most scale", dict(BLOCK=4096)),
    *((triton_swiglu._gate, "x output", "weights", dict(WEIGHTED=weighted, BLOCK=1024))
      for weighted in (False, True)),
    *((triton_swiglu._gate_backward, "gradient x for_x", "weights for_weights",
       dict(WEIGHTED=weighted, BLOCK=1024)) for weighted in (False, True)),
    *((triton_merge._merge, "part", "out lse part_lse", dict(INDEXED=indexed, SIZE=128))
      for indexed in (False, True)),
]
tool = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")
for kernel, halves, floats, constants in KERNELS:
    kinds = {**dict.fromkeys(kernel.arg_names, "i32"), "rows": "*i64"}
    kinds |= dict.fromkeys(halves.split(), "*bf16") | dict.fromkeys(floats.split(), "*fp32")
    kinds |= dict.fromkeys(constants, "constexpr")
    kinds = {name: kinds[name] for name in kernel.arg_names}
    made = compile(ASTSource(kernel, kinds, constants), target=GPUTarget("cuda", 90, 32))
    with open("kernel.cubin", "wb") as file:
        file.write(made.asm["cubin"])
    used = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\\d+)", used.stdout))
    assert int(numbers["REG"]) <= 128 and numbers["STACK"] == numbers["LOCAL"] == "0", (
        kernel.fn.__name__, numbers)
print("all compiled")
"""


def test_kernels_compile_for_hopper_without_spills(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: NO KERNEL OF megascale/fused IS COMPILED")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "all compiled" in done.stdout, done.stderr[-3000:]
