"""Tokenizer files beside weights: those of Hugging Face copied, ours written in their format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megascale.corpus.describe import CORPUS_FILE
from megascale.corpus.tokenizers import EOD_TEXT, TOKENIZER_FILE, Tokenizer, load_tokenizer
from megascale.errors import UserError
from megascale.infowindow import tokenizer as tokenizer_module
from megascale.infowindow.tokenizer import InfoWindowTokenizer

INFOWINDOW_CLASS = Path(tokenizer_module.__file__).with_name("tokenization_infowindow.py")
"""Copied beside an exported model."""
CONFIG = "tokenizer_config.json"
FILES = (
    TOKENIZER_FILE,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_tokenizer(source: Path, out: Path) -> bool:
    """Copy the tokenizer of a model folder into `out`; whether there was one.

    Raises UserError for a link that leads out of the folder, OSError.
    """
    found = [name for name in FILES if (source / name).is_file()]
    for name in found:
        _require_inside(source, source / name)
        out.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    return bool(found)


def _require_inside(source: Path, file: Path) -> None:
    """What is copied may be published, so it must be no file from elsewhere by a link. In a
    cache of Hugging Face, files are links to the `blobs` beside `snapshots`."""
    source, real = source.resolve(), file.resolve()
    places = [source]
    if source.parent.name == "snapshots":
        places.append(source.parents[1] / "blobs")
    if not any(real.is_relative_to(place) for place in places):
        raise UserError(f"{file} is a link to {real}, outside its folder; copy the file there")


def write_tokenizer(source: Path, out: Path, context_tokens: int) -> None:
    """Write the tokenizer of `source`, a prepared corpus or a Hugging Face folder, into `out`.

    A tokenizer of ours puts the end-of-document token before every text, as training did.
    Raises UserError where there is none, OSError.
    """
    if not (source / CORPUS_FILE).is_file():
        if not copy_tokenizer(source, out):
            raise UserError(
                f"--tokenizer {source}: no tokenizer there; give a prepared corpus or a folder "
                f"with a {TOKENIZER_FILE}"
            )
        return
    tokenizer = load_tokenizer(source)
    if isinstance(tokenizer, InfoWindowTokenizer):
        _write_infowindow(tokenizer, out, context_tokens)
        return
    backend = _byte_backend(tokenizer) if tokenizer.kind == "bytes" else _backend(tokenizer, out)
    end = backend.id_to_token(tokenizer.eod_id)
    if tokenizer.kind != "hf":
        _begin_with(backend, end, tokenizer.eod_id)
    backend.save(str(out / TOKENIZER_FILE))
    document = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": context_tokens,
        "clean_up_tokenization_spaces": False,
    }
    (out / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _write_infowindow(tokenizer: InfoWindowTokenizer, out: Path, context_tokens: int) -> None:
    """The codebook, and the class that reads it, which `trust_remote_code=True` lets run.

    Raises UserError for a code without a dictionary.
    """
    if not tokenizer.book.is_compiled:
        raise UserError(
            "only codes with a dictionary (windows of 16 bits) can be exported as a tokenizer; "
            "give another with --tokenizer"
        )
    tokenizer.save(out)
    shutil.copyfile(INFOWINDOW_CLASS, out / INFOWINDOW_CLASS.name)
    name = "InfoWindowTokenizer"
    document = {
        "tokenizer_class": name,
        "auto_map": {"AutoTokenizer": [f"{INFOWINDOW_CLASS.stem}.{name}", None]},
        "vocabulary": tokenizer.eod_id,
        "model_max_length": context_tokens,
    }
    (out / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _backend(tokenizer: Tokenizer, out: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    tokenizer.save(out)
    return Backend.from_file(str(out / TOKENIZER_FILE))


def _byte_backend(tokenizer: Tokenizer) -> Any:
    """Bytes as their own ids: a byte-level BPE without merges."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    # the printable characters stand for themselves, the others for 256 and up, in order
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    names = {byte: chr(byte) for byte in visible}
    names |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    backend: Any = Backend(models.BPE(vocab={names[b]: b for b in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOD_TEXT, special=True)])
    assert backend.token_to_id(EOD_TEXT) == tokenizer.eod_id
    return backend


def _begin_with(backend: Any, token: str, token_id: int) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )
