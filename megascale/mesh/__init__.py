"""How a plan runs on the ranks: packing, and attention over packed sequences on any ranks.

`micro_batches` makes tensors of a plan and sequences in memory; `attend` is the attention that they
need. `HdpAxis` says how the ranks that share sequences reach one another. `use_in_transformers`
gives models of `transformers` that attention.
"""

from typing import TYPE_CHECKING

from megascale.exports import lazily

if TYPE_CHECKING:
    from megascale.mesh.in_memory import micro_batches as micro_batches
    from megascale.mesh.packed_attention import attend as attend
    from megascale.mesh.packing import MicroBatch as MicroBatch
    from megascale.mesh.packing import Segments as Segments
    from megascale.mesh.packing import TokenSequence as TokenSequence
    from megascale.mesh.packing import pack as pack
    from megascale.mesh.transformers import use_in_transformers as use_in_transformers
    from megascale.runtime.distributed import HdpAxis as HdpAxis

_MODULES = {
    "HdpAxis": "megascale.runtime.distributed",
    "MicroBatch": "megascale.mesh.packing",
    "Segments": "megascale.mesh.packing",
    "TokenSequence": "megascale.mesh.packing",
    "attend": "megascale.mesh.packed_attention",
    "micro_batches": "megascale.mesh.in_memory",
    "pack": "megascale.mesh.packing",
    "use_in_transformers": "megascale.mesh.transformers",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazily(__name__, _MODULES)
