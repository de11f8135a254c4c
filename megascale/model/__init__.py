"""The network: megatron-core GPT and MoE from the config, and what it costs (`counts`).

`with_packed_attention` gives layers of megatron-core the attention that plans need.
"""

from typing import TYPE_CHECKING

from megascale.exports import lazily

if TYPE_CHECKING:
    from megascale.model.layers import with_packed_attention as with_packed_attention

__all__ = ["with_packed_attention"]

__getattr__, __dir__ = lazily(__name__, {"with_packed_attention": "megascale.model.layers"})
