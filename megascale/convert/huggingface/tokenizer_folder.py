"""Tokenizer files beside weights: those of Hugging Face copied, ours written in their format."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any, Literal

from megascale.convert.huggingface.documents import read_document, write_document
from megascale.corpus.hugging_face import TOKENIZER_FILE, read_backend
from megascale.corpus.sources import CORPUS_FILE, TOKENIZER_FOLDER
from megascale.corpus.tokenizers import EOD_TEXT, Tokenizer, load_tokenizer
from megascale.errors import UserError
from megascale.infowindow import tokenizer as tokenizer_module
from megascale.infowindow.tokenizer import InfoWindowTokenizer

MAX_LENGTH = "model_max_length"
INFOWINDOW_CLASS = Path(tokenizer_module.__file__).with_name("tokenization_infowindow.py")
"""Copied beside an exported model."""
CONFIG = "tokenizer_config.json"
SETTINGS = (
    CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Files that say how a vocabulary is used."""
FILES = (
    *SETTINGS,
    TOKENIZER_FILE,
    "added_tokens.json",
    "tokenizer.model",
    "tokenizer.model.v[0-9]*",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""All files of a tokenizer, those of sentencepiece and tiktoken included."""
Relation = Literal["same", "larger", "other"]


def copy_tokenizer(source: Path, out: Path, files: tuple[str, ...] = FILES) -> bool:
    """Copy the tokenizer of a model folder, or some of its files, into `out`; whether any is there.

    Raises UserError for a link that leads out of the folder, OSError.
    """
    found = _files_of(source, files)
    for path in found:
        _require_inside(source, source / path)
        target = out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target)
    return bool(found)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a Hugging Face tokenizer."""
    return bool(_files_of(folder, FILES))


def _files_of(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files of a tokenizer, from `folder` on."""
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return sorted(path.relative_to(folder) for path in found)


def relation(source: Path, kept: Path) -> Relation:
    """How the tokenizer of `source`, a corpus or a model folder, is related to that of `kept`.

    `same`: text becomes the same ids. `larger`: the ids of `kept` mean the same, and there may be
    more. Where nothing is known of that of `kept`, it is taken to be the same.
    Raises UserError where a tokenizer cannot be read.
    """
    files = _files_of(kept, FILES)
    if all(_is_equal(source / path, kept / path) for path in files):
        return "same"  # or not known
    ours = _corpus_backend(source) if (source / CORPUS_FILE).is_file() else _hf_backend(source)
    theirs = _hf_backend(kept)
    if ours is None or theirs is None:
        return "other"
    if _encoding(ours) == _encoding(theirs):
        return "same"
    known = ours.get_vocab(with_added_tokens=True)
    former = theirs.get_vocab(with_added_tokens=True)
    keeps_all = all(known.get(token) == number for token, number in former.items())
    return "larger" if keeps_all else "other"


def _is_equal(ours: Path, theirs: Path) -> bool:
    """Whether two files of a tokenizer say the same, but for `model_max_length`."""
    if not (ours.is_file() and theirs.is_file()):
        return False
    if filecmp.cmp(ours, theirs, False) or theirs.name != CONFIG:
        return filecmp.cmp(ours, theirs, False)
    first, second = ({**read_document(path), MAX_LENGTH: None} for path in (ours, theirs))
    return first == second


def has_same_settings(folder: Path, kept: Path) -> bool:
    """Whether two folders have the same tokenizer_config.json."""
    paths = folder / CONFIG, kept / CONFIG
    return all(path.is_file() for path in paths) and filecmp.cmp(*paths, False)


def raise_max_length(folder: Path, context_tokens: int) -> None:
    """Let the tokenizer of a folder take texts of `context_tokens`, where it has a smaller limit.

    Raises UserError where its settings cannot be read, OSError.
    """
    path = folder / CONFIG
    document = read_document(path) if path.is_file() else {}
    length = document.get(MAX_LENGTH)
    if isinstance(length, int | float) and length < context_tokens:
        write_document({**document, MAX_LENGTH: context_tokens}, path)


def _corpus_backend(source: Path) -> Any:
    """Of the `tokenizers` library; None for Equal-Info Windows, which it cannot be."""
    tokenizer = load_tokenizer(source)
    if isinstance(tokenizer, InfoWindowTokenizer):
        return None
    if tokenizer.kind == "bytes":
        return _byte_backend(tokenizer)
    return read_backend(source / TOKENIZER_FOLDER / TOKENIZER_FILE)


def _hf_backend(folder: Path) -> Any:
    """Of the `tokenizers` library; None where a folder's tokenizer is not made of its parts."""
    if (folder / TOKENIZER_FILE).is_file():
        return read_backend(folder / TOKENIZER_FILE)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # it raises many kinds
        return None
    return tokenizer.backend_tokenizer if tokenizer.is_fast else None


def _encoding(backend: Any) -> dict[str, Any]:
    """The parts of a tokenizer by which text becomes ids, special tokens around it aside."""
    document = json.loads(backend.to_str())
    return {
        part: document[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")
    }


def first_id(source: Path) -> int:
    """The id that stands before the first token of every document of a corpus in training."""
    tokenizer = load_tokenizer(source)
    return tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id


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

    That of a corpus puts the token before every text that stood there in training; see
    `first_id`. Raises UserError where there is none, OSError.
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
    backend, begin = _corpus_backend(source), first_id(source)
    first, end = backend.id_to_token(begin), backend.id_to_token(tokenizer.eod_id)
    _begin_with(backend, first, begin)
    backend.save(str(out / TOKENIZER_FILE))
    document = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": first,
        "eos_token": end,
        MAX_LENGTH: context_tokens,
        "clean_up_tokenization_spaces": False,
    }
    write_document(document, out / CONFIG)


def write_related(
    source: Path, kept: Path, related: Relation, out: Path, context_tokens: int
) -> None:
    """Write the tokenizer of `source` into `out`, as what it is to that which an import has kept.

    A corpus has the vocabulary alone, so files and settings are those of `kept` where they suit.
    Raises UserError where one cannot be read, OSError.
    """
    is_corpus = (source / CORPUS_FILE).is_file()
    if related == "other" or not is_corpus or not has_tokenizer(kept):
        write_tokenizer(source, out, context_tokens)
        return
    copy_tokenizer(kept, out, FILES if related == "same" else SETTINGS)
    if related == "larger":
        _corpus_backend(source).save(str(out / TOKENIZER_FILE))


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
        MAX_LENGTH: context_tokens,
    }
    write_document(document, out / CONFIG)


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
