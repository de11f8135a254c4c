"""What corpus.json says of a prepared corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megascale.arrays import Integers
from megascale.corpus.outcomes import Fates, returned_train_bytes
from megascale.corpus.outputs import Output
from megascale.corpus.shards import Shard
from megascale.corpus.sources import FORMAT, RETURNED, TOKENIZER_FOLDER, sha256_of
from megascale.corpus.tokenizers import FastTokenizer, Tokenizer, token_dtype

_COUNT_TOKENS = 1 << 22


def corpus_facts(
    output: Output,
    folder: Path,
    tokenizer: Tokenizer,
    fates: Fates,
    trip: dict[str, Any],
    skipped: dict[str, Any],
    identity: str,
) -> dict[str, Any]:
    """The content of corpus.json for the shards and files in `folder`.

    `trip` is what `round_trip` found, and gets the number of unknown tokens; `skipped` is what
    `skipped_of` counted; `identity` is the recipe's fingerprint.
    """
    parts = {"train": fates.keep & ~fates.heldout, "heldout": fates.heldout}
    counts = _token_counts(folder / "train", tokenizer.vocab_size)
    unknown_id = tokenizer.unknown_id
    trip["unknown_tokens"] = 0 if unknown_id is None else int(counts[unknown_id])
    returned = {
        "train": returned_train_bytes(fates),
        "heldout": int(fates.returned[fates.heldout].sum()),
    }
    return {
        "format": FORMAT,
        "name": output.name,
        **({} if output.source is None else {"source": output.source}),
        "description": output.description,
        "licence": output.licence,
        "tokenizer": _tokenizer_facts(tokenizer),
        **{
            name: {
                "documents": int(chosen.sum()),
                "tokens": Shard.open(folder / name).num_tokens,
                "bytes": int(fates.num_bytes[chosen].sum()),
                RETURNED: returned[name],
            }
            for name, chosen in parts.items()
        },
        "unigram_bits_per_byte": unigram_bits(counts) / returned["train"],
        "round_trip": trip,
        "skipped": skipped,
        "source_fingerprint": identity,
        "files": {
            str(path.relative_to(folder)): {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }


def _tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    bos_id, bos_token = tokenizer.bos_id, None
    if bos_id is not None and isinstance(tokenizer, FastTokenizer):
        bos_token = tokenizer.token_text(bos_id)
    return {
        "kind": tokenizer.kind,
        "path": None if tokenizer.kind == "bytes" else TOKENIZER_FOLDER,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "bos_id": bos_id,
        "bos_token": bos_token,
        "special_ids": list(tokenizer.special_ids),
    }


def _token_counts(prefix: Path, vocab_size: int) -> Integers:
    counts = np.zeros(vocab_size, dtype=np.int64)
    tokens = np.memmap(f"{prefix}.bin", dtype=token_dtype(vocab_size), mode="r")
    for begin in range(0, len(tokens), _COUNT_TOKENS):
        counts += np.bincount(tokens[begin : begin + _COUNT_TOKENS], minlength=vocab_size)
    return counts


def unigram_bits(counts: Integers) -> float:
    """Bits that all tokens take under their own unigram distribution: n * entropy(counts / n)."""
    met = counts[counts > 0].astype(np.float64)
    return float((met * np.log2(met.sum() / met)).sum())
