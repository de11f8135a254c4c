"""Launches and bytes of kernels, counted on tensors without storage."""

import importlib.util
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.fused import rotary, softmax
from megascale.model import linear_cross_entropy as loss

VIEWS = set(
    "detach device slice t permute unsqueeze select expand alias empty empty_like "
    "new_empty_strided".split()
)
PRODUCTS = {"mm", "addmm"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: NO KERNEL OF megascale/fused IS COUNTED",
)


class Counted(TorchDispatchMode):
    """Launches by name, and the bytes that all but matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name not in VIEWS:
            self.launches[name] += 1
        if name not in VIEWS | PRODUCTS:
            read = () if name.startswith(("zeros", "ones")) else (*args, *(kwargs or {}).values())
            if name == "copy_":
                read = args[1:]
            written = list(made) if isinstance(made, tuple) else [made]
            if name == "differentiate":  # in place, and it returns nothing
                written.append(args[0])
            # an expanded tensor has fewer bytes than elements
            self.bytes += sum(
                min(x.nbytes, x.untyped_storage().nbytes())
                for x in (*read, *written)
                if isinstance(x, torch.Tensor)
            )
        return made


def product_in_one(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def test_the_loss_moves_less_than_18_gb_beside_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 8K tokens and 128K ids in bf16. Adding the gradient of the weights to the buffer is
    counted too."""
    monkeypatch.setattr(softmax, "use_kernel", lambda _: True)
    monkeypatch.setattr(loss, "add_product", product_in_one)
    with FakeTensorMode(), Counted() as counted:
        weight = torch.empty(128256, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight.main_grad, weight.grad_added_to_main_grad = torch.empty(128256, 4096), False
        hidden = torch.empty(8192, 4096, dtype=torch.bfloat16, requires_grad=True)
        targets, mask = torch.empty(8192, dtype=torch.int64), torch.empty(8192)
        part = loss.VocabularyPart(128256, 128256)
        loss.linear_cross_entropy(hidden, weight, targets, mask, part).backward()
    assert counted.launches["mm"] == 8 and counted.launches["addmm"] == 4
    assert counted.launches["summarise"] == counted.launches["differentiate"] == 4
    assert 8e9 < counted.bytes < 18e9, counted.launches


def test_rotary_embedding_is_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward and one backward, for queries and keys together."""
    monkeypatch.setattr(rotary, "use_kernel", lambda _: True)
    with FakeTensorMode():
        q = torch.empty(64, 32, 128, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(64, 8, 128, dtype=torch.bfloat16, requires_grad=True)
        table = torch.empty(64, 1, 64), torch.empty(64, 1, 64)
        with Counted() as counted:
            query, key = rotary.rotate(q, k, table)
            gradients = torch.autograd.grad((query, key), (q, k), (query, key))
    assert counted.launches == {"turn": 2}
    assert [x.shape for x in gradients] == [q.shape, k.shape]
