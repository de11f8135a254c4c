"""The loss without logits on a CUDA device, with Triton kernels, against fp64."""

import pytest
import torch

from megascale.model import counts
from megascale.model.linear_cross_entropy import VocabularyPart, linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_loss_and_gradients_agree_with_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of 5,000 ids, of which the last 40 rows have none, in bf16."""
    monkeypatch.setattr(counts, "LOSS_CHUNK_BYTES", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).bfloat16()
    weight = torch.randn(5056, 64, generator=generator).bfloat16()
    targets = torch.randint(0, 5016, (300,), generator=generator)
    mask = (torch.rand(300, generator=generator) < 0.8).float()
    exact = [x.double().requires_grad_() for x in (hidden, weight[:5016])]
    losses = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
    (losses * mask).sum().backward()
    given = [x.cuda().requires_grad_() for x in (hidden, weight)]
    part = VocabularyPart(5056, 5016)
    loss = linear_cross_entropy(*given, targets.cuda(), mask.cuda(), part)
    loss.backward()
    assert loss.item() == pytest.approx((losses * mask).sum().item(), rel=2e-3)
    for mine, true in zip(given, exact, strict=True):
        assert mine.grad is not None and true.grad is not None
        off = mine.grad[: len(true)].cpu().double() - true.grad
        assert off.norm() < 1e-2 * true.grad.norm()
    assert not given[1].grad[5016:].any()
