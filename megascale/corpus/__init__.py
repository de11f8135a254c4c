"""Text to token shards, and from shards to the batches of a step.

For training loops of others: `SourceInfo` says what a prepared corpus holds, `training_documents`
reads its documents as a run does and `Shard` as they are stored, and `GlobalBatches` deals the
batches of a run, each a function of a `Cursor`.
"""

from typing import TYPE_CHECKING

from megascale.exports import lazily

if TYPE_CHECKING:
    from megascale.corpus.batches import Cursor as Cursor
    from megascale.corpus.batches import GlobalBatch as GlobalBatch
    from megascale.corpus.batches import GlobalBatches as GlobalBatches
    from megascale.corpus.shards import Shard as Shard
    from megascale.corpus.shards import ShardWriter as ShardWriter
    from megascale.corpus.sources import SourceInfo as SourceInfo
    from megascale.corpus.sources import training_documents as training_documents
    from megascale.corpus.tokenizers import load_tokenizer as load_tokenizer

_MODULES = {
    "Cursor": "megascale.corpus.batches",
    "GlobalBatch": "megascale.corpus.batches",
    "GlobalBatches": "megascale.corpus.batches",
    "Shard": "megascale.corpus.shards",
    "ShardWriter": "megascale.corpus.shards",
    "SourceInfo": "megascale.corpus.sources",
    "load_tokenizer": "megascale.corpus.tokenizers",
    "training_documents": "megascale.corpus.sources",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazily(__name__, _MODULES)
