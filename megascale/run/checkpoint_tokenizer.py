"""The tokenizer that the model of a checkpoint was trained with, and how it frames a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megascale.checkpoint.load import Found
from megascale.config import RunConfig, SourceConfig
from megascale.convert.huggingface.kept import KEPT
from megascale.convert.huggingface.model_folder import SPECIAL_IDS, load_theirs, require_known
from megascale.convert.huggingface.tokenizer_folder import has_tokenizer, relation
from megascale.convert.score_text import TextTokens
from megascale.corpus.sources import CORPUS_FILE, TOKENIZER_FOLDER, SourceInfo, identity
from megascale.corpus.tokenizers import load_hf, load_tokenizer
from megascale.errors import UserError
from megascale.infowindow.tokenizer import InfoWindowTokenizer
from megascale.run.origin import home_of, kept_of
from megascale.run.replay import part_seen

NO_SETTINGS = (*SPECIAL_IDS, "transformers_version", "_from_model_config")
"""What a generation_config.json says besides how text is generated."""


def tokenizer_folder(found: Found, config: RunConfig, given: str | None) -> Path | None:
    """The corpus or Hugging Face folder whose tokenizer a checkpoint's model was trained with.

    Raises UserError for a corpus of the run that is not what the run has read.
    """
    if given is not None:
        return Path(given)
    if (found.folder / TOKENIZER_FOLDER).is_dir():
        return found.folder / TOKENIZER_FOLDER
    for name, source in config.data.sources.items():
        if (Path(source.path) / CORPUS_FILE).is_file():
            held = found.manifest.position.cursor.get("sources", {}).get(name)
            if held is not None:
                _require_same(name, source, held)
            return Path(source.path)
    kept = home_of(found.folder.resolve()) / KEPT
    return kept if has_tokenizer(kept) else None


def _require_same(name: str, source: SourceConfig, held: str) -> None:

    try:
        now = identity(part_seen(SourceInfo.of(source), source))
    except UserError as error:
        now = str(error)
    if now != held:
        raise UserError(
            f"source '{name}' held {held} when the checkpoint was written, now: {now}; if its "
            f"tokenizer is still the same, give --tokenizer {source.path}"
        )


def text_tokens(found: Found, config: Any, given: str | None) -> TextTokens:
    """The tokenizer of a checkpoint; see `tokenizer_folder`.

    A text begins with the token that stood before documents in training. With a Hugging Face
    tokenizer that is what it puts before a text itself, else its beginning of sequence, or its end
    where it has none. It ends with the id that ends documents, or with an `eos_token_id` that an
    import has kept. Raises UserError.
    """
    folder = tokenizer_folder(found, config, given)
    if folder is None:
        raise UserError(f"{found.folder} names no tokenizer; give --tokenizer FOLDER")
    if (folder / CORPUS_FILE).is_file():
        ours = load_tokenizer(folder)
        first_id, end_id = ours.bos_id, ours.eod_id
    else:
        ours = load_hf(str(folder))
        theirs, end_id = load_theirs(folder), ours.eod_id
        first_id = theirs.bos_token_id if ours.bos_id is None else ours.bos_id
    require_known(ours.vocab_size, config.model.vocab_size, folder)
    return TextTokens(
        lambda text: ours.encode(text).tolist(),
        ours.decode,
        end_id if first_id is None else first_id,
        frozenset({end_id, *_kept_ends(found, folder, config.model.vocab_size)}),
        unsettled=ours.window_tokens if isinstance(ours, InfoWindowTokenizer) else 0,
    )


def _kept_ends(found: Found, folder: Path, vocab_size: int) -> Iterator[int]:
    """The ids that end a text by what an import has kept, unless `folder` has another tokenizer."""

    kept = kept_of(found)
    if kept is None or relation(folder, kept.folder) == "other":
        return
    for document in (kept.config, kept.generation or {}):
        ends = document.get("eos_token_id")
        for token_id in ends if isinstance(ends, list) else [ends]:
            if isinstance(token_id, int) and token_id < vocab_size:
                yield token_id


def settings_without_effect(found: Found) -> Iterator[str]:
    """A line that names the settings of an import's generation_config.json that `megascale eval`
    has no use for, where there are any."""
    kept = kept_of(found)
    settings = {} if kept is None else kept.generation or {}
    unused = [
        f"{name} = {value}"
        for name, value in settings.items()
        if value is not None and name not in NO_SETTINGS
    ]
    if unused:
        yield (
            "generation is greedy; of the generation_config.json of the import these settings "
            f"have no effect here: {', '.join(unused)}"
        )
