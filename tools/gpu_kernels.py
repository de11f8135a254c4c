"""The ceilings of a GPU, and our kernels against fp64 there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpu_rows import Rows
from gpu_scene import device_of, half, seconds

from megascale.fused import merge as merging
from megascale.fused import rotary as rotating
from megascale.fused import swiglu as gating
from megascale.model.linear_cross_entropy import VocabularyPart, linear_cross_entropy

ROUNDING = 2**-7
"""Largest error that is allowed, relative to the norm of the exact result: bf16 has 8 bits."""


def matrix_product(rows: Rows) -> None:
    """Matrix product."""
    size, device = (64 if rows.small else 8192), device_of()
    a, b = (torch.randn(size, size, device=device, dtype=half(device)) for _ in range(2))
    taken = seconds(lambda: a @ b, device, repeats=10, warm_ups=3)
    rows.add(f"product of {size}^3, bf16", 2 * size**3 / taken / 1e12, "TFLOP/s", 700, None, True)


def copy(rows: Rows) -> None:
    """Copy on the device."""
    device = device_of()
    source = torch.ones(1 << (16 if rows.small else 32), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = seconds(lambda: target.copy_(source), device, repeats=10, warm_ups=3)
    moved = 2 * len(source)  # read and written
    rows.add("copy on the device", moved / taken / 1e12, "TB/s", 3.9, None, True)


def rotary(rows: Rows) -> None:
    """Rotary embedding."""
    tokens = num_tokens(rows)
    q, k = random(tokens, 32, 128), random(tokens, 8, 128)
    angle = torch.rand(tokens, 1, 64, generator=DRAWN).double() * 1000
    table = angle.cos(), angle.sin()
    given = [placed(x).requires_grad_() for x in (q, k)]
    turned = rotating.rotate(given[0], given[1], (on_device(table[0]), on_device(table[1])))
    grads = torch.autograd.grad(turned, given, [x.detach() for x in given])
    exact = [rotating.turn_plain(x.double(), *table) for x in (q, k)]
    back = [rotating.turn_plain(x.double(), table[0], -table[1]) for x in (q, k)]
    compare(rows, "rotary embedding", [*turned, *grads], [*exact, *back])


def swiglu(rows: Rows) -> None:
    """SwiGLU."""
    tokens = num_tokens(rows)
    x, gradient = random(tokens, 2 * 1024), random(tokens, 1024)
    for what, weights in (("SwiGLU", None), ("SwiGLU of experts", random(tokens).abs())):
        wanted = [placed(x).requires_grad_()]
        if weights is not None:
            wanted.append(on_device(weights).requires_grad_())
        output = gating.swiglu(*wanted)
        grads = torch.autograd.grad(output, wanted, placed(gradient))
        scale = None if weights is None else weights.double()
        exact = [gating.gate_plain(x.double(), scale)]
        exact += gating.gate_backward_plain(gradient.double(), x.double(), scale)[: len(wanted)]
        compare(rows, what, [output, *grads], exact)


def merge(rows: Rows) -> None:
    """Merge of partial attention by log-sum-exps, of a slice and of rows by number."""
    tokens = num_tokens(rows)
    some = torch.randperm(tokens, generator=DRAWN)[: tokens // 2]
    for what, where in (("a slice", slice(0, tokens // 2)), ("rows by number", some)):
        whole = [random(tokens, 32, 128).float(), random(tokens, 32).float()]
        part = [random(tokens // 2, 32, 128), random(tokens // 2, 32).float()]
        mine = [on_device(x) for x in whole]
        chosen = where if isinstance(where, slice) else where.to(device_of())
        merging.merge(*mine, chosen, placed(part[0]), on_device(part[1]))
        exact = [x.double() for x in whole]
        merging.merge_plain(*exact, where, part[0].double(), part[1].double())
        compare(rows, f"merge of log-sum-exps, {what}", mine, exact)


def loss(rows: Rows) -> None:
    """Loss without logits."""
    tokens, width, ids = (64, 32, 500) if rows.small else (4096, 1024, 32000)
    hidden, weight = random(tokens, width), random(ids, width) / width**0.5
    weight = weight.to(half(device_of())).float()
    targets = torch.randint(0, ids, (tokens,), generator=DRAWN)
    mask = (torch.rand(tokens, generator=DRAWN) < 0.8).float()
    given = [placed(x).requires_grad_() for x in (hidden, weight)]
    part = VocabularyPart(ids, ids)
    total = linear_cross_entropy(*given, targets.to(device_of()), on_device(mask), part)
    grads = torch.autograd.grad(total, given)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    losses = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
    right = (losses * mask).sum()
    right_grads = torch.autograd.grad(right, exact)
    compare(rows, "loss without logits", [total, *grads], [right, *right_grads])


def compare(
    rows: Rows, what: str, found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> None:
    """A row with the largest error of several tensors, each relative to the exact one's norm."""
    errors = [
        float((mine.detach().cpu().double() - right.detach()).norm() / right.detach().norm())
        for mine, right in zip(found, exact, strict=True)
    ]
    rows.add(f"{what}: error against fp64", max(errors), "", None, ROUNDING)


DRAWN = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    """Normal numbers that the precision of training holds exactly, in fp32 on the host."""
    return torch.randn(shape, generator=DRAWN).to(half(device_of())).float()


def placed(x: torch.Tensor) -> torch.Tensor:
    """A copy on the device, in the precision of training."""
    return x.to(device_of(), half(device_of()), copy=True)


def on_device(x: torch.Tensor) -> torch.Tensor:
    """A copy on the device in fp32."""
    return x.to(device_of(), torch.float32, copy=True)


def num_tokens(rows: Rows) -> int:
    """Of the inputs of a kernel."""
    return 64 if rows.small else 4096
