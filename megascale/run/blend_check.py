"""What the sources of a run give it: tokens, epochs, tokenizers, and documents that they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from megascale.corpus.batches import used_sources
from megascale.corpus.check import Findings
from megascale.corpus.overlap import FEWEST_TOKENS, Overlap, Part, find_overlap
from megascale.corpus.pieces import documents_in_range
from megascale.corpus.run_length import RunLength
from megascale.corpus.shards import Shard
from megascale.corpus.sources import SourceInfo
from megascale.corpus.tokenizer_mark import TokenizerMark, mark_of
from megascale.errors import UserError
from megascale.run.describe import expected_lengths
from megascale.run.resolve import ResolvedRun, check_epochs, epochs_read, source_tokens
from megascale.run.same_tokenizer import tokenizer_differences
from megascale.run.warnings import data_warnings


@dataclass(frozen=True)
class BlendPart:
    """Documents of a source that are compared with those of others."""

    source: str
    is_heldout: bool
    part: Part
    mark: TokenizerMark

    @property
    def documents(self) -> int:
        """Documents that are compared."""
        return int(np.count_nonzero(np.asarray(self.part.lengths) >= FEWEST_TOKENS))

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(np.asarray(self.part.lengths).sum(dtype=np.int64))


def check_blend(run: ResolvedRun) -> tuple[str, Findings]:
    """What the sources of a run give it, as text of several lines, and what speaks against it.

    Reads every token of every source once, unless the digests of an earlier check are there.
    """
    config, sources = run.config, run.sources
    findings = Findings()
    unlimited = replace(config, data=replace(config.data, max_epochs=None))
    lengths = expected_lengths(unlimited, sources)
    read = dict(sum((Counter(length.read) for length in lengths), Counter()))
    epochs = epochs_read(config, read, source_tokens(sources))
    try:
        check_epochs(config, source_tokens(sources))
    except UserError as error:
        findings.faults.append(str(error))
    has_heldout = {name: info.heldout is not None for name, info in sources.items()}
    findings.notes += data_warnings(config, epochs, has_heldout)
    lines = _table(sources, lengths, read, epochs)
    lines += _tokenizers(run, findings)
    lines += _overlaps(run, findings)
    return "\n".join(lines), findings


def _table(
    sources: Mapping[str, SourceInfo],
    lengths: list[RunLength],
    read: Mapping[str, int],
    epochs: Mapping[str, float],
) -> list[str]:
    """Tokens of the run by source, and how often each source is read."""
    total = max(1, sum(read.values()))
    about = "about " * any(length.end is None for length in lengths)
    steps = sum(length.num_steps for length in lengths)
    width = max(map(len, [*epochs, "source"]))
    lines = [
        f"{about}{total:,} tokens of the run in {steps:,} steps, by the weights of the blend",
        f"  {'source':<{width}}  {'documents':>13}  {'its tokens':>18}  {'of the run':>18}  "
        f"{'share':>7}  {'epochs':>8}",
    ]
    for name, passes in epochs.items():
        info, count = sources[name], read.get(name, 0)
        lines.append(
            f"  {name:<{width}}  {info.train_documents:>13,}  {info.train_tokens:>18,}  "
            f"{count:>18,}  {count / total:>7.2%}  {passes:>8.2f}"
        )
    return lines


def _tokenizers(run: ResolvedRun, findings: Findings) -> list[str]:
    """Whether all sources have one tokenizer."""
    allowed = run.config.data.allow_different_tokenizers
    differences = [
        f"sources '{first}' and '{name}' were made by different tokenizers ({difference}): the "
        "same ids mean other text"
        for first, name, difference in tokenizer_differences(run.config, run.sources)
    ]
    (findings.notes if allowed else findings.faults).extend(differences)
    unknown = [name for name, info in run.sources.items() if mark_of(info).content is None]
    if unknown:
        findings.notes.append(
            f"the tokenizer of {_quoted(unknown)} is not known, only the ids around documents are"
        )
    count = len(run.sources)
    if differences:
        return [f"tokenizers: {len(differences)} of {count} sources differ from one before them"]
    what = "nothing that is known of them differs" if unknown else "all are the same"
    return [f"tokenizers: {count} sources, {what}"]


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _overlaps(run: ResolvedRun, findings: Findings) -> list[str]:
    """Compare the documents of all parts."""
    parts = list(_parts(run))
    found = find_overlap([part.part for part in parts])
    heldout = [i for i, part in enumerate(parts) if part.is_heldout]
    train = [i for i, part in enumerate(parts) if not part.is_heldout]
    pairs = [*product(heldout, train), *combinations(train, 2)]
    same = [pair for pair in pairs if _same_tokenizer(*(parts[place] for place in pair))]
    for i, j in same:
        if parts[i].is_heldout:
            _count_leaks(parts[i], parts[j], found, (i, j), findings)
    for i in train:
        findings.notes += _repeats(parts[i], found, i)
    for i, j in same:
        if not parts[i].is_heldout:
            findings.notes += _shared(parts[i], parts[j], found, (i, j))
    if len(same) < len(pairs):
        findings.notes.append("documents of sources of different tokenizers were not compared")
    counts = [sum(parts[i].documents for i in places) for places in (train, heldout)]
    return [
        f"overlap: {counts[0]:,} documents of {len(train)} training sets and {counts[1]:,} of "
        f"{len(heldout)} held-out sets were compared",
        "  counted are exact duplicates: documents whose ids are all the same, by a hash of 64 "
        f"bits, with {FEWEST_TOKENS} tokens or more",
    ]


def _parts(run: ResolvedRun) -> Iterator[BlendPart]:
    """The training sets that are read and all held-out sets, each once.

    Sources of replay read the documents of other sources again, and are left out.
    """
    used = used_sources(run.config.data.stages)
    trained: set[tuple[str, int, int | None]] = set()
    evaluated: set[str] = set()
    for name, info in run.sources.items():
        source = run.config.data.sources[name]
        limits = (info.train, source.min_document_tokens, source.max_document_tokens)
        if name in used and not source.replay and limits not in trained:
            trained.add(limits)
            shard = Shard.open(info.train)
            part = Part(f"train of {name}", shard, documents_in_range(shard, source).lengths)
            yield BlendPart(name, False, part, mark_of(info))
        if info.heldout is not None and info.heldout not in evaluated:
            evaluated.add(info.heldout)
            shard = Shard.open(info.heldout)
            part = Part(f"held-out of {name}", shard, shard.lengths)
            yield BlendPart(name, True, part, mark_of(info, info.heldout))


def _same_tokenizer(first: BlendPart, second: BlendPart) -> bool:
    return first.mark.difference(second.mark) is None


def _count_leaks(
    heldout: BlendPart,
    train: BlendPart,
    found: Overlap,
    place: tuple[int, int],
    findings: Findings,
) -> None:
    """Held-out documents that are trained on are a fault."""
    findings.count(
        int(found.documents_pp[place]),
        f"of {heldout.documents:,} held-out documents of '{heldout.source}' "
        f"({_share(found.tokens_pp[place], heldout)} of their tokens) stand in train of "
        f"'{train.source}' too",
        f"held-out document {found.first_pp[place]}",
    )


def _repeats(train: BlendPart, found: Overlap, place: int) -> Iterator[str]:
    count = int(found.documents_pp[place, place])
    if count:
        yield (
            f"{count:,} of {train.documents:,} documents of '{train.source}' repeat one before "
            f"them ({_share(found.tokens_pp[place, place], train)} of its tokens)"
        )


def _shared(
    first: BlendPart, second: BlendPart, found: Overlap, place: tuple[int, int]
) -> Iterator[str]:
    """A note on the documents that two training sets share."""
    back = place[::-1]
    if found.documents_pp[place]:
        yield (
            f"{found.documents_pp[place]:,} of {first.documents:,} documents of '{first.source}' "
            f"({_share(found.tokens_pp[place], first)} of its tokens) are in '{second.source}' "
            f"too, as {found.documents_pp[back]:,} of its {second.documents:,} "
            f"({_share(found.tokens_pp[back], second)}); the first is document "
            f"{found.first_pp[place]} of '{first.source}'"
        )


def _share(tokens: int, part: BlendPart) -> str:
    return f"{int(tokens) / max(1, part.tokens):.1%}"
