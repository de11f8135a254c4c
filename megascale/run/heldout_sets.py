"""Which held-out sets a run scores, how much of them, and what it has recorded; without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megascale.config import RunConfig
from megascale.corpus.heldout import HeldoutPart, spans_of
from megascale.corpus.shards import Shard
from megascale.corpus.sources import SourceInfo
from megascale.monitor.metrics import METRICS_FILE, read_rows
from megascale.run.earlier_runs import PREFIX


def scored_sources(
    config: RunConfig, sources: Mapping[str, SourceInfo]
) -> Iterator[tuple[str, SourceInfo]]:
    """The sources whose held-out sets are scored. Each set is scored once, as that of the first
    source that reads its corpus, or else of the first that replays it."""
    if not config.eval.tokens:
        return
    scored: set[str] = set()
    for name in sorted(sources, key=lambda name: name.startswith(PREFIX)):
        heldout = sources[name].heldout
        if heldout is not None and heldout not in scored:
            scored.add(heldout)
            yield name, sources[name]


def foreseen(config: RunConfig, sources: Mapping[str, SourceInfo]) -> Iterator[tuple[str, str]]:
    """Each source that is scored, and how much of its held-out set will be, in words."""
    for name, info in scored_sources(config, sources):
        shard = Shard.open(info.heldout or "")
        spans_n3 = spans_of(shard, config.data.context_tokens, config.eval.tokens)
        part = HeldoutPart(spans_n3, None, shard.num_tokens, shard.num_documents)
        about = "about " if info.tokenizer is not None and part.tokens < part.set_tokens else ""
        yield name, f"{about}{in_words(part)}"


def in_words(part: HeldoutPart) -> str:
    """How much of a held-out set is scored."""
    return (
        f"{part.tokens:,} of {part.set_tokens:,} tokens, in {part.documents:,} of "
        f"{part.set_documents:,} documents"
    )


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    """The held-out scores of each evaluation that a run has recorded, by source."""
    try:
        rows = read_rows(run_dir / METRICS_FILE)
    except OSError:
        return []
    return [row["eval"] for row in rows if "eval" in row]


def first_scores(
    evaluations: Sequence[Mapping[str, Any]], parts: Mapping[str, HeldoutPart]
) -> dict[str, float]:
    """The first held-out loss of each source that was of the same part of its set.

    One that was not finite, which a record says as null, is left out.
    """
    first = {}
    for name, part in parts.items():
        losses = [
            row[name]["loss"] for row in evaluations if name in row and _is_of(row[name], part)
        ]
        if losses and losses[0] is not None:
            first[name] = losses[0]
    return first


def changed(name: str, part: HeldoutPart, evaluations: Sequence[Mapping[str, Any]]) -> str | None:
    """A warning where the last evaluation of a source did not score `part`."""
    before = next((row[name] for row in reversed(evaluations) if name in row), None)
    if before is None or _is_of(before, part):
        return None
    return (
        f"evaluations of '{name}' so far scored another part of its held-out set "
        f"({before['tokens']:,} tokens); their losses do not compare with those from here on"
    )


def _is_of(score: Mapping[str, Any], part: HeldoutPart) -> bool:
    """Whether a recorded score is of `part`; by its tokens where an older version recorded it."""
    if "part" in score:
        return bool(score["part"] == part.mark)
    return bool(score["tokens"] == part.tokens)
