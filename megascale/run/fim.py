"""Fill-in-the-middle of a run's sources: the values that were left out, and what cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megascale.config import RunConfig, SourceConfig
from megascale.config.schema import FillInMiddleConfig
from megascale.corpus.fim import FEWEST_TOKENS, SENTINELS, Sentinels
from megascale.corpus.sources import CORPUS_FILE, SourceInfo
from megascale.errors import UserError

SPELLINGS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|fim\u2581begin|>", "<|fim\u2581hole|>", "<|fim\u2581end|>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
)
"""How tokenizers spell the sentinels before prefix, suffix and middle. DeepSeek's mark the begin of
the text, the hole in it and its end; what follows them is the prefix, the suffix and the middle."""


def with_fim(config: RunConfig) -> RunConfig:
    """`config` with all values of `data.sources.NAME.fim`.

    Raises UserError for a value that cannot work, and for a tokenizer without sentinels.
    """
    context = config.data.context_tokens
    sources = {
        name: source if source.fim is None else _with_fim(name, source, source.fim, context)
        for name, source in config.data.sources.items()
    }
    return replace(config, data=replace(config.data, sources=sources))


def require_usable_sentinels(config: RunConfig, infos: Mapping[str, SourceInfo]) -> None:
    """Raise UserError for a sentinel that a finalized config's model has no row for, or that
    begins or ends the documents of its source (`infos`)."""
    known = config.model.vocab_size or 0
    for name, source in config.data.sources.items():
        if source.fim is None:
            continue
        ids = Sentinels.of(source.fim)
        if taken := {infos[name].eod_id, infos[name].first_id} & set(ids):
            raise UserError(
                f"data.sources.{name}.fim: id {min(taken)} of a sentinel begins or ends the "
                "documents of the source; give an id that its text does not have"
            )
        if (largest := max(ids)) >= known:
            raise UserError(
                f"data.sources.{name}.fim: id {largest} of a sentinel is outside model.vocab_size "
                f"= {known}; set model.vocab_size={largest + 1}, or give ids of the tokenizer"
            )


def _with_fim(
    name: str, source: SourceConfig, fim: FillInMiddleConfig, context: int
) -> SourceConfig:
    where = f"data.sources.{name}.fim"
    for option in ("rate", "spm"):
        if not 0 <= (share := getattr(fim, option)) <= 1:
            raise UserError(f"{where}.{option} = {share} must be a share from 0 to 1, such as 0.5")
    tokens = context if fim.block_tokens is None else fim.block_tokens
    least = SENTINELS + FEWEST_TOKENS
    if tokens < least or context % tokens:
        raise UserError(
            f"{where}.block_tokens = {tokens} must be at least {least} and divide "
            f"data.context_tokens = {context}, so that no block is cut; leave it out for {context}"
        )
    return replace(source, fim=replace(fim, block_tokens=tokens, **_ids(where, source, fim)))


def _ids(where: str, source: SourceConfig, fim: FillInMiddleConfig) -> Mapping[str, int]:
    given = {part: getattr(fim, f"{part}_id") for part in Sentinels._fields}
    missing = [part for part, token_id in given.items() if token_id is None]
    if missing and len(missing) < len(given):
        raise UserError(f"{where}: {missing[0]}_id is missing; give all three ids, or none of them")
    ids = _of_tokenizer(where, source) if missing else Sentinels(**given)
    if len(set(ids)) < len(ids) or min(ids) < 0:
        raise UserError(
            f"{where}: the ids {', '.join(map(str, ids))} of prefix, suffix and middle must be "
            "three different ones, at least 0"
        )
    return {f"{part}_id": token_id for part, token_id in zip(Sentinels._fields, ids, strict=True)}


def _of_tokenizer(where: str, source: SourceConfig) -> Sentinels:
    """The ids that the tokenizer of a prepared corpus has for the sentinels."""
    from megascale.corpus.tokenizers import FastTokenizer, load_tokenizer

    give = f"give {where}.prefix_id, suffix_id and middle_id"
    if not (Path(source.path) / CORPUS_FILE).is_file():
        raise UserError(f"{where}: {source.path} is no prepared corpus with a tokenizer; {give}")
    tokenizer = load_tokenizer(source.path)
    if isinstance(tokenizer, FastTokenizer):
        for spellings in SPELLINGS:
            ids = [tokenizer.token_id(spelling) for spelling in spellings]
            known = [token_id for token_id in ids if token_id is not None]
            if len(known) == len(spellings):
                return Sentinels(*known)
    raise UserError(
        f"{where}: the tokenizer of {source.path} has no sentinels such as "
        f"{', '.join(SPELLINGS[0])}; {give}, with model.vocab_size above them"
    )
