"""Faults of a corpus that cost less to find now than on a thousand GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Integers
from megascale.corpus.cache import read_numbers
from megascale.corpus.overlap import document_digest
from megascale.corpus.round_trip import LOSSY, losses
from megascale.corpus.shards import Shard
from megascale.corpus.sources import SourceInfo, read_corpus_file, sha256_of
from megascale.corpus.special_tokens import Refused
from megascale.corpus.tokenizers import FastTokenizer, Tokenizer, encode_each, load_tokenizer
from megascale.errors import UserError
from megascale.runtime.progress import announced

DECODED_DOCUMENTS = 2000
"""Documents that are decoded and encoded again, spread evenly; the rest is checked as ids."""
SAMPLED_ENDS = 256
"""Documents whose last token is looked at when a run begins."""
NO_END = "do not end in the end-of-document id"
ONE_TOKEN = "documents of one token (their end)"
DAMAGED_BEFORE = "documents that spell U+FFFD, which stands where text was damaged earlier"
OTHER_SIZE = "documents that decode to another number of bytes than their text had"
UNKNOWN = "documents with the tokenizer's unknown token"
NOTES = (ONE_TOKEN, DAMAGED_BEFORE, LOSSY, UNKNOWN)
"""What speaks not against training: the rest are faults."""


@dataclass
class Findings:
    """What a check found; faults speak against training on it, notes do not."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lengths: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Stored tokens of each document, by part: train, heldout."""

    @property
    def verdict(self) -> str:
        """One line."""
        return f"{len(self.faults)} kind(s) of fault" if self.faults else "good"

    def count(self, number: int, what: str, first: str, is_fault: bool = True) -> None:
        """Note that something was met `number` times, where it was."""
        if number:
            line = f"{number:,} {what}; the first is {first}"
            (self.faults if is_fault else self.notes).append(line)


def missing_ends(info: SourceInfo) -> str | None:
    """A line where documents of a source do not end as they should, by their last tokens alone.

    Looks at SAMPLED_ENDS documents of each part, spread evenly. None where all is well.
    """
    for part, prefix in (("train", info.train), ("heldout", info.heldout)):
        if prefix is None:
            continue
        shard = Shard.open(prefix)
        count = min(SAMPLED_ENDS, shard.num_documents)
        sampled = [shard.num_documents * place // count for place in range(count)]
        without = [one for one in sampled if not _has_end(shard, one, info.eod_id)]
        if without:
            return (
                f"{len(without)} of {count} documents of {part} that were looked at "
                f"{NO_END} {info.eod_id}; the first is document {without[0]}"
            )
    return None


def _has_end(shard: Shard, document: int, eod_id: int) -> bool:
    length = int(shard.lengths[document])
    return length > 0 and int(shard.read(document, length - 1)[0]) == eod_id


def check_source(info: SourceInfo) -> Findings:
    """Read every token of a source once, a document at a time.

    Looks at: ids outside the vocabulary, documents without an end, special tokens inside, empty
    documents and such of one token, exact duplicates within and between train and held-out, text
    that is no UTF-8, what prepare found of text that does not come back, and whether tokenizer and
    shards agree. Files of a prepared folder must be those that were written.
    """
    findings = Findings()
    if info.tokenizer is not None:
        changed = _changed_files(Path(info.tokenizer))
        findings.count(len(changed), "files changed after they were prepared", "".join(changed[:1]))
    tokenizer = load_tokenizer(info.tokenizer) if info.tokenizer else None
    if info.tokenizer is not None:
        findings.notes += losses(read_corpus_file(Path(info.tokenizer)))
        findings.notes += _other_begin(info, tokenizer)
    digests = {}
    for part, prefix in (("train", info.train), ("heldout", info.heldout)):
        if prefix is None:
            findings.notes.append("no held-out documents: this source cannot be evaluated")
            continue
        shard = Shard.open(prefix)
        findings.lengths[part] = np.asarray(shard.lengths)
        digests[part] = _check_part(part, shard, info, tokenizer, findings)
    if "heldout" in digests:
        shared = np.flatnonzero(np.isin(digests["heldout"], digests["train"]))
        first = f"heldout document {shared[0]}" if len(shared) else ""
        findings.count(len(shared), "held-out documents stand in train too", first)
    return findings


def _other_begin(info: SourceInfo, tokenizer: Tokenizer | None) -> Iterator[str]:
    """A note where a tokenizer puts another token before a text than documents begin with."""
    own = tokenizer.own_bos_id() if isinstance(tokenizer, FastTokenizer) else None
    if own is not None and own != info.first_id:
        yield (
            f"the tokenizer puts id {own} before a text, and documents here begin after id "
            f"{info.first_id}; prepare again with tokenizer.bos=auto to train with it"
        )


def _changed_files(folder: Path) -> list[str]:
    """Files of a prepared folder that do not have the checksum of corpus.json."""
    facts = read_corpus_file(folder)["files"]
    return [name for name, one in facts.items() if sha256_of(folder / name) != one["sha256"]]


def _check_part(
    part: str, shard: Shard, info: SourceInfo, tokenizer: Tokenizer | None, findings: Findings
) -> NDArray[np.uint64]:
    """Check one shard; returns a digest of each document."""
    digests = np.zeros(shard.num_documents, dtype=np.uint64)
    sizes = _sizes(info.heldout_bytes, shard) if part == "heldout" and info.heldout_bytes else None
    met: dict[str, list[int]] = {}
    decoded, stride = 0, max(1, shard.num_documents // DECODED_DOCUMENTS)
    for document, tokens in _documents(part, shard):
        digests[document] = document_digest(tokens)
        problems = _id_problems(tokens, info, tokenizer)
        if tokenizer is not None and document % stride == 0 and not problems:
            size = None if sizes is None else int(sizes[document])
            problems = _text_problems(tokens, tokenizer, size)
            decoded += 1
        for problem in problems:
            met.setdefault(problem, []).append(document)
    for problem, documents in met.items():
        first = f"{part} document {documents[0]}"
        findings.count(len(documents), problem, first, problem not in NOTES)
    if 0 < decoded < shard.num_documents:
        findings.notes.append(f"{decoded:,} documents of {part} were decoded, spread evenly")
    _, firsts, counts = np.unique(digests, return_index=True, return_counts=True)
    again = int((counts - 1).sum())
    example = f"of {part} document {firsts[counts > 1].min()}" if again else ""
    findings.count(again, f"exact duplicates within {part}", example)
    return digests


def _sizes(path: str, shard: Shard) -> Integers:
    """Bytes of the text of each held-out document."""
    sizes = read_numbers(path, shard.num_documents)
    if sizes is None:
        raise UserError(f"{path}: not the sizes of {shard.num_documents:,} texts; prepare it again")
    return sizes


def _id_problems(tokens: NDArray[Any], info: SourceInfo, tokenizer: Tokenizer | None) -> list[str]:
    if not len(tokens):
        return ["empty documents, without even an end"]
    problems = []
    if int(tokens.max()) >= info.vocab_size or int(tokens.min()) < 0:
        problems.append(f"documents with ids outside the vocabulary of {info.vocab_size:,}")
    ends = np.flatnonzero(tokens == info.eod_id)
    if not len(ends) or ends[-1] != len(tokens) - 1:
        problems.append(f"documents that {NO_END} {info.eod_id}")
    if len(ends) and ends[0] < len(tokens) - 1:
        problems.append("documents with an end-of-document id inside")
    special = (info.bos_id,) if tokenizer is None else tokenizer.special_ids
    others = [i for i in special if i is not None and i != info.eod_id]
    if others and np.isin(tokens, others).any():
        problems.append("documents with another special token inside, as if text had spelled it")
    if len(tokens) == 1:
        problems.append(ONE_TOKEN)
    return problems


def _text_problems(tokens: NDArray[Any], tokenizer: Tokenizer, size: int | None) -> list[str]:
    """Faults of a document's text, whose UTF-8 had `size` bytes where that is known.

    Encoding the decoded text again often gives the same ids under another BPE of the same size;
    the number of bytes tells them apart.
    """
    if tokenizer.unknown_id is not None and (tokens == tokenizer.unknown_id).any():
        return [UNKNOWN]  # what it stood for is gone, so its text has other ids and another size
    text = tokenizer.decode(tokens[:-1])
    (again,) = encode_each(tokenizer, [text])
    problems = []
    if not isinstance(again, Refused) and np.array_equal(again, tokens[:-1]):
        problems += [DAMAGED_BEFORE] if "\ufffd" in text else []
    elif "\ufffd" in text:  # decoding put it there; where the text itself holds it, ids agree
        problems.append("documents that are not clean UTF-8 text")
    else:
        problems.append("documents that the tokenizer encodes to other ids than are stored")
    if size is not None and len(text.encode()) != size:
        problems.append(LOSSY if tokenizer.kind == "hf" else OTHER_SIZE)
    return problems


def _documents(part: str, shard: Shard) -> Iterator[tuple[int, NDArray[Any]]]:
    """Every document, with progress on stderr when it takes long."""
    every = ((document, shard.read(document)) for document in range(shard.num_documents))
    return announced(every, shard.num_documents, f"checking {part}")
