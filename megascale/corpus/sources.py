"""What a source of tokens is, before anything of it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megascale.config.schema import SourceConfig
from megascale.corpus.fim import BlockRule, FimReader, Sentinels
from megascale.corpus.pieces import documents_in_range, documents_of
from megascale.corpus.shards import Shard
from megascale.errors import MissingInput, UserError
from megascale.parsing import is_path, read_json
from megascale.reading import open_regular

CORPUS_FILE = "corpus.json"
SET_FILE = "corpora.json"
"""In a folder of several corpora of one recipe."""
FORMAT = 1
PARTS = ("train", "heldout")
SAMPLED_BLOCKS, BLOCK_BYTES = 32, 4096
RETURNED = "returned_bytes"
"""Bytes of a part that its ids give back; counted, or estimated where a sample was decoded."""
ROUND_TRIP = ("documents", "changed", "bytes", "returned_bytes", "unknown_tokens")
"""What prepare counts of text that it decodes again."""
TOKENIZER_KINDS = ("bytes", "bpe", "hf", "infowindow")
TOKENIZER_FOLDER = "tokenizer"
"""In a corpus, and in an imported checkpoint."""


@dataclass(frozen=True)
class SourceInfo:
    """A prepared corpus, or a bare Megatron `.bin` / `.idx` pair."""

    train: str
    """Prefix of the training shard."""
    heldout: str | None
    """Prefix of the held-out shard."""
    heldout_bytes: str | None
    """`.npy` of the UTF-8 bytes of each held-out document that its ids give back: a tokenizer that
    drops or changes text must not improve bits per byte."""
    vocab_size: int
    eod_id: int
    bos_id: int | None
    """Id of the beginning of a text, where there is one besides `eod_id`."""
    train_tokens: int
    train_documents: int
    train_bytes: int | None
    """Those that the ids give back, about, where the tokenizer drops or changes text."""
    unigram_bits_per_byte: float | None
    """Entropy of single tokens, in bits per byte of text."""
    content: str
    """Digest of samples of the training shard."""
    tokenizer: str | None
    """Folder of the corpus, from which `load_tokenizer` loads."""

    @staticmethod
    def of(source: SourceConfig) -> SourceInfo:
        """Look at a source that a config names, and at the documents that it reads.

        Raises UserError as `describe` does, and where no document has a length that it reads.
        """
        info = describe(
            source.path, source.heldout, source.vocab_size, source.eod_id, source.bos_id
        )
        return _of_documents_read(info, source)

    @property
    def first_id(self) -> int:
        """The input before the first token of a document, which is stored nowhere."""
        return self.eod_id if self.bos_id is None else self.bos_id


def training_documents(source: SourceConfig, info: SourceInfo) -> Shard | FimReader:
    """The training documents of a source of a finalized config, which read as the run reads them.

    Raises UserError for files that are damaged.
    """
    shard = Shard.open(info.train)
    if source.fim is None:
        return shard
    return FimReader(shard, BlockRule.of(source.fim), Sentinels.of(source.fim), info.eod_id)


def identity(info: SourceInfo) -> str:
    """What a source holds, in words; a resumed run must find the same."""
    bos = "" if info.bos_id is None else f", each after token {info.bos_id}"
    return (
        f"{info.train_documents} documents of {info.train_tokens} tokens{bos}, content "
        f"{info.content}"
    )


def _of_documents_read(info: SourceInfo, source: SourceConfig) -> SourceInfo:
    """`info` of the documents alone that a source reads, by their lengths, as it reads them.

    Raises UserError where no document has a length that it reads.
    """
    info = _of_range(info, source)
    if source.fim is None:
        return info
    documents = documents_of(Shard.open(info.train), source)
    tokens = int(np.asarray(documents.lengths).sum(dtype=np.int64))
    mark = BlockRule.of(source.fim).mark
    return replace(info, train_tokens=tokens, content=f"{info.content} ({mark})")


def _of_range(info: SourceInfo, source: SourceConfig) -> SourceInfo:
    shortest, longest = source.min_document_tokens, source.max_document_tokens
    if not shortest and longest is None:
        return info
    shard = Shard.open(info.train)
    lengths = documents_in_range(shard, source).lengths
    tokens = int(lengths.sum())
    limits = f"{shortest} to {'any number of' if longest is None else longest}"
    if not tokens:
        raise UserError(
            f"source {source.path}: no document has {limits} tokens (min_document_tokens, "
            f"max_document_tokens); its documents have {int(shard.lengths.min())} to "
            f"{int(shard.lengths.max())}"
        )
    size = info.train_bytes
    return replace(
        info,
        train_tokens=tokens,
        train_documents=int(np.count_nonzero(lengths)),
        train_bytes=None if size is None else round(size * tokens / max(1, info.train_tokens)),
        content=f"{info.content} (documents of {limits} tokens)",
    )


def describe(
    path: str,
    heldout: str | None = None,
    vocab_size: int | None = None,
    eod_id: int | None = None,
    bos_id: int | None = None,
) -> SourceInfo:
    """Look at a prepared folder, or at a bare prefix with its `vocab_size` and `eod_id`.

    A bare prefix whose documents begin with another token than `eod_id` has a `bos_id` too.
    Raises UserError for a source that is missing, empty, damaged, or was changed after it was
    prepared.
    """
    if (Path(path) / CORPUS_FILE).is_file():
        info = _prepared(Path(path))
        _refuse_other(path, info, heldout, vocab_size, eod_id, bos_id)
        return info
    if not Path(f"{path}.idx").exists():
        raise MissingInput(f"source {path}: {_nothing_there(Path(path))}")
    for name, value in (("vocab_size", vocab_size), ("eod_id", eod_id)):
        if value is None:
            raise UserError(f"source {path}: a bare Megatron prefix needs {name} in data.sources")
    assert vocab_size is not None and eod_id is not None
    for name, value in (("eod_id", eod_id), ("bos_id", bos_id)):
        if value is not None and not 0 <= value < vocab_size:
            raise UserError(f"source {path}: {name} = {value} is outside vocab_size = {vocab_size}")
    shard = _not_empty(Shard.open(path), path)
    if heldout is not None:
        if not Path(f"{heldout}.idx").exists():
            raise UserError(f"source {path}: heldout {heldout}: {_nothing_there(Path(heldout))}")
        Shard.open(heldout)
    return SourceInfo(
        train=path,
        heldout=heldout,
        heldout_bytes=None,
        vocab_size=vocab_size,
        eod_id=eod_id,
        bos_id=None if bos_id == eod_id else bos_id,
        train_tokens=shard.num_tokens,
        train_documents=shard.num_documents,
        train_bytes=None,
        content=_content(path),
        unigram_bits_per_byte=None,
        tokenizer=None,
    )


def _nothing_there(path: Path) -> str:
    """Why a path is no corpus, and what would be."""
    prefix = path.with_suffix("") if path.name else path
    if path.suffix in (".bin", ".idx") and prefix.with_name(f"{prefix.name}.idx").exists():
        return f"leave out the ending {path.suffix}: a pair of files is named {prefix}"
    if path.name == CORPUS_FILE and path.is_file():
        return f"give the folder of the corpus, {path.parent}"
    corpora = sorted(str(one.parent) for one in path.glob(f"*/{CORPUS_FILE}"))
    if corpora:
        return f"a folder of {len(corpora)} corpora; give one of them, such as {corpora[0]}"
    prefixes = sorted(str(one.with_suffix("")) for one in path.glob("*.idx"))
    if prefixes:
        return f"a folder without {CORPUS_FILE}; give a pair of its files, such as {prefixes[0]}"
    return "no corpus there; make one, e.g. megascale prepare data/python_stdlib.yaml"


def _content(prefix: str) -> str:
    """Digest of blocks that lie evenly in a shard's tokens: cheap, and other for another text."""
    digest = hashlib.sha256()
    with open_regular(f"{prefix}.bin") as file:
        size = os.fstat(file.fileno()).st_size
        for block in range(SAMPLED_BLOCKS):
            file.seek(size * block // SAMPLED_BLOCKS)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:12]


def _refuse_other(
    path: str,
    info: SourceInfo,
    heldout: str | None,
    vocab_size: int | None,
    eod_id: int | None,
    bos_id: int | None,
) -> None:
    """What is said about a prepared folder must be what it knows itself."""
    if heldout is not None:
        raise UserError(
            f"source {path}: a prepared folder brings its own held-out shards; remove "
            f"heldout = {heldout}"
        )
    for name, said, known in (
        ("vocab_size", vocab_size, info.vocab_size),
        ("eod_id", eod_id, info.eod_id),
        ("bos_id", bos_id, info.bos_id),
    ):
        if said is not None and said != known:
            raise UserError(
                f"source {path}: {name} = {said} is said of a corpus prepared with {known}; "
                "leave it out"
            )


def _prepared(folder: Path) -> SourceInfo:
    facts = read_corpus_file(folder)
    for name, size in facts["files"].items():
        actual = (folder / name).stat().st_size if (folder / name).exists() else None
        if actual != size["bytes"]:
            raise UserError(
                f"corpus {folder}: {name} has {actual} bytes where corpus.json speaks of "
                f"{size['bytes']}; it was changed after it was prepared, prepare it again"
            )
    shard = _not_empty(Shard.open(folder / "train"), str(folder))
    if shard.num_tokens != facts["train"]["tokens"]:
        raise UserError(
            f"corpus {folder}: its shard has {shard.num_tokens:,} tokens where corpus.json speaks "
            f"of {facts['train']['tokens']:,}; prepare it again"
        )
    has_heldout = facts["heldout"]["documents"] > 0
    return SourceInfo(
        train=str(folder / "train"),
        heldout=str(folder / "heldout") if has_heldout else None,
        heldout_bytes=str(folder / "heldout.bytes.npy") if has_heldout else None,
        vocab_size=facts["tokenizer"]["vocab_size"],
        eod_id=facts["tokenizer"]["eod_id"],
        bos_id=facts["tokenizer"].get("bos_id"),
        train_tokens=shard.num_tokens,
        train_documents=shard.num_documents,
        train_bytes=returned_bytes(facts, "train"),
        content=_content(str(folder / "train")),
        unigram_bits_per_byte=facts["unigram_bits_per_byte"],
        tokenizer=str(folder),
    )


def read_corpus_file(folder: Path) -> Mapping[str, Any]:
    """The content of corpus.json. Raises UserError where it is not one."""
    path = folder / CORPUS_FILE
    try:
        facts = read_json(path)
        complete = facts["format"] == FORMAT and _is_complete(facts)
    except OSError as error:
        raise UserError(
            f"{path}: {(error.strerror or str(error)).lower()}; give the folder of a corpus that "
            "megascale prepare made"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path}: not a corpus file of format {FORMAT}; prepare the corpus again")
    return dict(facts)


def returned_bytes(facts: Mapping[str, Any], part: str) -> int:
    """Bytes of the text of a part that its ids give back, by what prepare has decoded.

    `facts` are the content of corpus.json.
    """
    if RETURNED in facts[part]:
        return int(facts[part][RETURNED])
    size, trip = int(facts[part]["bytes"]), facts.get("round_trip")
    if not trip or not trip["bytes"]:
        return size
    compared = int(trip["bytes"])  # an earlier version made the corpus, and measured a sample
    return (size * int(trip["returned_bytes"]) + compared // 2) // compared


def _is_complete(facts: Mapping[str, Any]) -> bool:
    """Whether every number is one that `prepare` could have written, and every file is named."""
    tokenizer, files, bits = facts["tokenizer"], facts["files"], facts["unigram_bits_per_byte"]
    whole = [facts[part][key] for part in PARTS for key in ("documents", "tokens", "bytes")]
    trip = facts.get("round_trip", {})  # earlier versions wrote none, and no bos_id
    whole += [trip[key] for key in ROUND_TRIP if trip]
    whole += [facts[part][RETURNED] for part in PARTS if RETURNED in facts[part]]
    special = tokenizer.get("special_ids", [])
    whole += special if tokenizer.get("bos_id") is None else [*special, tokenizer["bos_id"]]
    whole += [tokenizer["vocab_size"], tokenizer["eod_id"], *(f["bytes"] for f in files.values())]
    return (
        all(map(is_path, files))
        and all(type(number) is int and number >= 0 for number in whole)
        and tokenizer["kind"] in TOKENIZER_KINDS
        and max(tokenizer["eod_id"], *special, tokenizer.get("bos_id") or 0)
        < tokenizer["vocab_size"]
        and (not trip or _is_possible(trip))
        and all(returned_bytes(facts, part) <= facts[part]["bytes"] for part in PARTS)
        and returned_bytes(facts, "train") > 0
        and isinstance(bits, float)
        and 0 <= bits < float("inf")
        and {f"{part}.{ending}" for part in PARTS for ending in ("bin", "idx")} <= set(files)
        and all(isinstance(file["sha256"], str) for file in files.values())
        and all(map(_is_inside, files))
    )


def _is_inside(name: str) -> bool:
    """Whether it names a file of the corpus folder or of a folder in it, and nothing outside."""
    return all(part not in ("", ".", "..") and "\0" not in part for part in name.split("/"))


def _is_possible(trip: Mapping[str, Any]) -> bool:
    shown = {"document", "character", "text", "decoded", "cause"}
    return min(1, trip["bytes"]) <= trip["returned_bytes"] <= trip["bytes"] and (
        not trip["changed"] or shown <= set(trip["first_changed"])
    )


def sha256_of(path: Path) -> str:
    """Checksum of a file's content, as hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_empty(shard: Shard, path: str) -> Shard:
    if not shard.num_tokens:
        raise UserError(f"source {path}: holds no tokens; prepare it again from more text")
    return shard
