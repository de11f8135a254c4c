"""Sources whose ids mean other text to one another, or to the model that a run continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from megascale.checkpoint.load import read_manifest
from megascale.config import RunConfig, parse_config
from megascale.corpus.batches import used_sources
from megascale.corpus.hugging_face import find_tokenizer
from megascale.corpus.sources import TOKENIZER_FOLDER, SourceInfo
from megascale.corpus.tokenizer_mark import TokenizerMark, mark_of, tokenizer_mark
from megascale.errors import UserError


def require_same_tokenizer(config: RunConfig, sources: Mapping[str, SourceInfo]) -> None:
    """Raise UserError where sources of a finalized config were made by different tokenizers.

    Sources that are only evaluated count too, but for what earlier runs have read: that a model
    goes on with another tokenizer is a warning.
    """
    if config.data.allow_different_tokenizers:
        return
    for first, name, difference in tokenizer_differences(config, sources):
        raise UserError(
            f"sources '{first}' and '{name}' were made by different tokenizers ({difference}): the "
            "same ids mean other text; prepare one of them again with the other's tokenizer, or "
            "set data.allow_different_tokenizers=true if that is meant"
        )


def warn_if_tokenizers_differ(
    config: RunConfig, sources: Mapping[str, SourceInfo]
) -> Iterator[str]:
    """Warnings, where sources, or they and the checkpoint's, were made by different tokenizers.

    Of a checkpoint only what is still there can be compared.
    """
    for first, name, difference in tokenizer_differences(config, sources):
        yield (
            f"sources '{first}' and '{name}' were made by different tokenizers ({difference}), as "
            "data.allow_different_tokenizers allows: the same ids mean other text"
        )
    before = list(_marks_of_start(config))
    plain = [name for name, one in config.data.sources.items() if not one.replay]
    for name in plain if before else []:
        differences = [one.difference(mark_of(sources[name])) for one in before]
        if None not in differences:
            yield (
                f"the model of {config.start.checkpoint} was trained with another tokenizer than "
                f"source '{name}' was made by ({differences[0]}): ids mean other text to it; "
                "prepare the source with the tokenizer of the model"
            )


def tokenizer_differences(
    config: RunConfig, sources: Mapping[str, SourceInfo]
) -> Iterator[tuple[str, str, str]]:
    """Pairs of sources that differ, and in what: each once, beside the first that it differs from.

    A source of which little is known may agree with two that differ.
    """
    blended, chosen = used_sources(config.data.stages), config.data.sources
    names = [name for name, one in chosen.items() if not one.replay or name in blended]
    shards = {name: (sources[name], sources[name].train) for name in names}
    for name in names:
        info = sources[name]
        if info.tokenizer is None and info.heldout is not None:  # it may be of another corpus
            shards[f"{name} (heldout)"] = info, info.heldout
    marks = {label: mark_of(*shard) for label, shard in shards.items()} if len(shards) > 1 else {}
    for place, name in enumerate(marks):
        before = [*marks][:place]
        if any(marks[first] == marks[name] for first in before):
            continue
        for first in before:
            difference = marks[first].difference(marks[name])
            if difference is not None:
                yield first, name, difference
                break


def _marks_of_start(config: RunConfig) -> Iterator[TokenizerMark]:
    """The tokenizers of what a checkpoint's run has read, or the one that an import brings."""
    start = config.start.checkpoint
    try:
        parent = read_manifest(start).position if start is not None else None
    except UserError:
        return  # a run that has begun does without its parent
    if parent is None:
        return
    imported = _mark_of_import(Path(start or ""))
    if imported is not None:
        yield imported
    for one in parse_config(parent.config).data.sources.values():
        try:
            yield mark_of(SourceInfo.of(one))
        except (OSError, UserError):
            continue


def _mark_of_import(checkpoint: Path) -> TokenizerMark | None:
    folder = checkpoint / TOKENIZER_FOLDER
    if not folder.is_dir():
        return None
    try:
        content = tokenizer_mark(checkpoint)
        bos_id = find_tokenizer(str(folder)).own_bos_id() if content is not None else None
    except (OSError, UserError):
        return None
    return TokenizerMark(content, first_id=bos_id)
