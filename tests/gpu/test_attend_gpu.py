"""Packed attention on CUDA; the twin of tests/unit/test_attend.py."""

import pytest
import torch

from megascale.mesh.packed_attention import attend
from megascale.mesh.packing import Segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (300, 1, 129, 70)


@pytest.mark.parametrize("window", [None, 64])
def test_bf16_varlen_follows_fp32_dense(window):
    torch.manual_seed(0)
    device = torch.device("cuda")
    q = torch.randn(sum(LENGTHS), 8, 64, device=device, requires_grad=True)
    k, v = (torch.randn(sum(LENGTHS), 2, 64, device=device, requires_grad=True) for _ in range(2))
    segments = Segments.of(LENGTHS, device)
    exact, exact_lse = attend(q, k, v, segments, window=window)
    weights = torch.randn_like(exact)
    exact_grads = torch.autograd.grad((exact * weights).sum(), (q, k, v))

    halves = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*halves, segments, window=window)
    grads = torch.autograd.grad((out.float() * weights).sum(), halves)
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(lse.float(), exact_lse, rtol=0.02, atol=0.02)
    for grad, exact_grad in zip(grads, exact_grads):
        scale = exact_grad.abs().max()
        assert (grad.float() - exact_grad).abs().max() < 0.05 * scale
