"""Names that megatron-core needs on every device and does not always have."""

from __future__ import annotations


def fill_gaps() -> None:
    """Give megatron-core the names that it misses without Transformer Engine.

    0.16.1 reads `te_general_gemm` in the router of every mixture of experts. It compares it with
    None, but imports it from Transformer Engine only.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
