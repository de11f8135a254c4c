"""Which sources were made by one tokenizer: by what it is, wherever its folder lies."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megascale.corpus.hugging_face import TOKENIZER_FILE, reading_tokenizer
from megascale.corpus.sources import CORPUS_FILE, TOKENIZER_FOLDER, SourceInfo, read_corpus_file
from megascale.errors import UserError
from megascale.infowindow.tokenizer import CODEBOOK_FILE
from megascale.reading import MOST_FILE_BYTES, read_whole

DECIDES_IDS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
"""Of a tokenizer.json: vocabulary, merges, what is done before them, special tokens. What is put
around a text, where it is cut and how ids are joined to text do not count."""


@dataclass(frozen=True)
class TokenizerMark:
    """What tells tokenizers apart; None where it is not known."""

    content: str | None
    """Digest of all that decides the ids of a text."""
    eod_id: int | None = None
    first_id: int | None = None
    """The input before a document's first token."""

    def difference(self, other: TokenizerMark) -> str | None:
        """What differs, in words; None where nothing that both know does."""
        for name, one, two in (
            ("vocabularies", self.content, other.content),
            ("end-of-document ids", self.eod_id, other.eod_id),
            ("ids before a document's first token", self.first_id, other.first_id),
        ):
            if one is not None and two is not None and one != two:
                return f"{name} {one} and {two}"
        return None


def mark_of(info: SourceInfo, shard: str | None = None) -> TokenizerMark:
    """The mark of a source, or of one of its shards; the default is the training shard.

    Of a bare Megatron shard only the ids around documents are known, unless it is part of a
    prepared corpus.
    """
    folder = _corpus_of(shard or info.train) if info.tokenizer is None else Path(info.tokenizer)
    return TokenizerMark(
        None if folder is None else tokenizer_mark(folder), info.eod_id, info.first_id
    )


def _corpus_of(prefix: str) -> Path | None:
    """The prepared corpus that a shard is part of, also through a link; None: of none."""
    path = Path(f"{prefix}.bin").resolve()
    try:
        files = read_corpus_file(path.parent)["files"]
    except UserError:
        return None  # no corpus.json, or one of another program
    return path.parent if path.name in files else None


def tokenizer_mark(folder: Path) -> str | None:
    """Digest of the tokenizer of a corpus, or of another folder with a `tokenizer`.

    None where there is none whose ids are known.
    """
    facts = read_corpus_file(folder)["tokenizer"] if (folder / CORPUS_FILE).is_file() else None
    if facts is not None and facts["path"] is None:
        return "bytes"
    inside = folder / TOKENIZER_FOLDER
    if (inside / TOKENIZER_FILE).is_file():
        return _digest_of_ids(read_whole(inside / TOKENIZER_FILE, MOST_FILE_BYTES), str(inside))
    if not (inside / CODEBOOK_FILE).is_file():
        return None
    digest = hashlib.sha256(read_whole(inside / CODEBOOK_FILE, MOST_FILE_BYTES))
    if facts is not None:  # a codebook does not say into which tokens its codes are cut
        digest.update(str(facts["vocab_size"]).encode())
    return digest.hexdigest()[:12]


def _digest_of_ids(raw: bytes, folder: str) -> str:
    with reading_tokenizer(folder):
        return _digest(raw)


@functools.lru_cache(maxsize=4)
def _digest(raw: bytes) -> str:
    """The same for files that differ in form alone, as those of several versions of the library."""
    from tokenizers import Tokenizer as Backend

    tree = json.loads(Backend.from_buffer(raw).to_str())
    chosen = json.dumps([tree.get(name) for name in DECIDES_IDS], sort_keys=True)
    return hashlib.sha256(chosen.encode()).hexdigest()[:12]
