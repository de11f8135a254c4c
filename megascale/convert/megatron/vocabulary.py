"""How many ids a tokenizer has, whichever kind of folder holds it."""

from __future__ import annotations

from pathlib import Path

from megascale.convert.huggingface.model_folder import load_theirs
from megascale.corpus.sources import CORPUS_FILE
from megascale.corpus.tokenizers import load_tokenizer


def ids_of(folder: Path) -> int:
    """The largest id of a prepared corpus's or a Hugging Face folder's tokenizer, plus one.

    Raises UserError where there is no tokenizer.
    """
    if (folder / CORPUS_FILE).is_file():
        return load_tokenizer(folder).vocab_size
    return int(max(load_theirs(folder).get_vocab().values())) + 1
