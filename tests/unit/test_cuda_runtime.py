"""What a run sets on CUDA, as far as a machine without it can tell."""

import os

import pytest
import torch

from megascale.config import finalize, parse_config, validate_on_cuda
from megascale.errors import UserError
from megascale.run.warnings import cuda_warnings
from megascale.runtime import cuda, distributed

distributed.prepare_device("auto")  # before megatron-core is imported


@pytest.fixture
def with_cuda(monkeypatch):
    """A machine where torch finds a device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in cuda.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_experts_need_no_transformer_engine_on_cuda(with_cuda, monkeypatch):
    """megatron-core 0.16.1 lacks a name that its router reads."""
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    assert distributed.prepare_device("auto")[0] == "cuda"
    x, weight = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    logits = moe_utils.router_gating_linear(x, weight, None, torch.float32)
    torch.testing.assert_close(logits, x @ weight.T)
    logits.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(dim=0).expand(3, 4))


def test_segments_of_the_allocator_grow_unless_the_user_chose(with_cuda, monkeypatch):
    distributed.prepare_device("cuda")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    distributed.prepare_device("cuda")
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_deterministic_work_needs_work_spaces_of_one_size(monkeypatch):
    monkeypatch.delenv(cuda.WORKSPACE_VARIABLE, raising=False)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        cuda.compute_deterministically()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ[cuda.WORKSPACE_VARIABLE] == ":4096:8"
        monkeypatch.setenv(cuda.WORKSPACE_VARIABLE, ":16:8")
        cuda.compute_deterministically()
        assert os.environ[cuda.WORKSPACE_VARIABLE] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


SMALL = """
model: {num_layers: 2, hidden_size: 96, num_heads: 4, head_dim: 24}
data: {sources: {a: {path: none}}, context_tokens: 4096}
"""


def finalized(*overrides):
    return finalize(parse_config(SMALL, overrides), {"a": 10**6}, 100)


@pytest.mark.parametrize("size, works", [(20, 24), (10, 16), (258, 256), (512, 256)])
def test_a_head_size_that_flash_attention_does_not_take_is_named(size, works):
    config = finalized(f"model.head_dim={size}")  # it runs on CPU
    line = f"model.head_dim = {size} must be a multiple of 8 up to 256, .*; {works} works"
    with pytest.raises(UserError, match=line):
        validate_on_cuda(config)
    with pytest.raises(UserError, match=line):
        finalized(f"model.head_dim={size}", "device=cuda")
    finalized(f"model.head_dim={size}", "device=cuda", "train.precision=fp32")
    finalized(f"model.head_dim={works}", "device=cuda")


def test_fp32_on_cuda_says_what_it_costs():
    assert not list(cuda_warnings(finalized()))
    (line,) = cuda_warnings(finalized("train.precision=fp32", "planner.capacity_tokens=2048"))
    assert "0.06 GiB in each layer for 2,048 tokens" in line  # 4 heads * 2048^2 * 4 bytes


@pytest.mark.parametrize(
    "major, installed, head_dim, windowed, taken",
    [
        (9, ["flash_attn_interface"], 128, True, "FA3"),
        (9, ["flash_attn_interface", "flash_attn.cute"], 256, False, "FA3"),
        (9, ["flash_attn.cute"], 128, False, "FA4"),
        (10, ["flash_attn_interface", "flash_attn.cute"], 64, False, "FA4"),
        (10, ["flash_attn.cute"], 64, True, None),
        (10, ["flash_attn.cute"], 192, False, None),
        (8, ["flash_attn_interface", "flash_attn.cute"], 64, False, None),
        (9, [], 64, False, None),
    ],
)
def test_an_installed_flash_attention_that_fits_is_taken(
    monkeypatch, major, installed, head_dim, windowed, taken
):
    from torch.nn import attention

    activated = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(cuda, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activated.append)
    device = torch.device("cuda", 0)
    assert cuda.use_fastest_attention(device, head_dim, windowed) == taken
    assert activated == ([taken] if taken else [])


def test_a_flash_attention_that_cannot_be_loaded_is_left_out(monkeypatch, caplog):
    """By torch's own switch, which imports the package; here it has no kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "find_spec", lambda name: name == "flash_attn_interface" or None)
    assert cuda.use_fastest_attention(torch.device("cuda", 0), 128, False) is None
    assert "FA3 is not used: " in caplog.text
