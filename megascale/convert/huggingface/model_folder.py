"""The files of an exported model folder other than its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megascale.config import RunConfig
from megascale.convert.huggingface.config import config_of, write_config
from megascale.convert.huggingface.documents import CONFIG, GENERATION, write_document
from megascale.convert.huggingface.families import kind_of
from megascale.convert.huggingface.kept import POSITIONS, Kept, without_unknown_ids
from megascale.convert.huggingface.merge import merged_config
from megascale.convert.huggingface.tokenizer_folder import (
    INFOWINDOW_CLASS,
    has_same_settings,
    raise_max_length,
    relation,
    write_related,
    write_tokenizer,
)
from megascale.corpus.sources import CORPUS_FILE
from megascale.corpus.tokenizers import load_tokenizer
from megascale.errors import UserError

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_settings(
    kept: Kept | None, config: RunConfig, dtype: str, source: Path | None, out: Path
) -> tuple[str, list[str]]:
    """Write the files of a model folder other than its weights; returns its family, and notes for
    the user.

    `kept` is what an import has kept. `source` is where the tokenizer comes from. Raises UserError
    if no family has such a model, or if the tokenizer has ids that the model lacks.
    """
    context_tokens = config.data.context_tokens
    if kept is not None:
        document = merged_config(kept, config.model, context_tokens, dtype)
        return kind_of(document), write_kept(kept, document, source, out)
    theirs = config_of(config.model, context_tokens, dtype)
    if source is not None:
        write_tokenizer(source, out, context_tokens)
        raise_max_length(out, context_tokens)
    write_configs(theirs, out, source)
    return theirs.model_type, []


def require_known(num_ids: int, model_ids: int, folder: Path) -> None:
    """Raises UserError where the tokenizer of a folder has ids that the model lacks."""
    if num_ids > model_ids:
        raise UserError(
            f"tokenizer of {folder}: it has {num_ids:,} ids, the model knows {model_ids:,}; give "
            "the one that the model was trained with, --tokenizer FOLDER"
        )


def load_theirs(folder: Path, runs_code: bool = False) -> Any:
    """The tokenizer of a Hugging Face folder. `runs_code`: Python files there may be executed.

    Raises UserError where it cannot be loaded, also for want of that code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=runs_code
        )
    except Exception as error:  # it raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer of {folder}: transformers cannot load it: {reason}") from None


def write_configs(theirs: Any, out: Path, source: Path | None) -> None:
    """Write config.json and generation_config.json, with the ids that begin and end a text.

    `source` is where the tokenizer in `out` comes from. Raises UserError where it has ids that
    the model lacks.
    """
    from transformers import GenerationConfig

    if source is not None:
        ids = _ids_of(out, theirs.vocab_size, source)
        theirs.bos_token_id, theirs.eos_token_id = ids["bos_token_id"], ids["eos_token_id"]
    write_config(theirs, out)
    GenerationConfig.from_model_config(theirs).save_pretrained(out)


def write_kept(kept: Kept, document: dict[str, Any], source: Path | None, out: Path) -> list[str]:
    """Write config.json (`document`), what an import has kept beside it, and the tokenizer of
    `source`; what there is to say.

    Ids that begin and end a text are those of the import, unless `source` has another tokenizer.
    Raises UserError where it has ids that the model lacks.
    """

    vocab_size, generation, notes = document["vocab_size"], kept.generation, []
    if source is not None:
        related, positions = relation(source, kept.folder), document[POSITIONS]
        write_related(source, kept.folder, related, out, positions)
        if positions > kept.config[POSITIONS] or not has_same_settings(out, kept.folder):
            raise_max_length(out, positions)
        if related == "other":
            ids = _ids_of(out, vocab_size, source)
            document |= ids
            generation = None if generation is None else {**generation, **ids}
            notes.append(
                f"the tokenizer of {source} is another than the imported one, so ids that begin "
                "and end a text are its own, and the imported chat template is left out"
            )
        elif related == "larger":
            _ids_of(out, vocab_size, source)
    document, lost = without_unknown_ids(document, vocab_size)
    write_document(document, out / CONFIG)
    if generation is not None:
        generation, more = without_unknown_ids(generation, vocab_size)
        lost += [f"{option} of {GENERATION}" for option in more]
        write_document(generation, out / GENERATION)
    known = f"the model knows {vocab_size:,} ids, so what is above them was left out of"
    notes += [f"{known} {option}" for option in lost]
    return [*notes, *_notes_on_end(source, {**document, **(generation or {})})]


def _notes_on_end(source: Path | None, settings: Mapping[str, Any]) -> Iterator[str]:
    """What there is to say where generation does not stop at what ended documents in training."""

    if source is None or not (source / CORPUS_FILE).is_file():
        return
    ends, eod_id = settings.get("eos_token_id"), load_tokenizer(source).eod_id
    if eod_id not in (ends if isinstance(ends, list) else [ends]):
        yield (
            f"documents ended with id {eod_id} in training, and eos_token_id = {ends} of the "
            "import does not have it; add it where generation is to stop there"
        )


def _ids_of(out: Path, model_ids: int, source: Path) -> dict[str, Any]:
    """The ids that begin, end and pad a text by the tokenizer in `out`, which is that of `source`.

    Raises UserError where it cannot be loaded or has ids that the model lacks.
    """

    # the only code there is our own, which was just written
    tokenizer = load_theirs(out, runs_code=(out / INFOWINDOW_CLASS.name).is_file())
    require_known(max(tokenizer.get_vocab().values()) + 1, model_ids, source)
    return {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
