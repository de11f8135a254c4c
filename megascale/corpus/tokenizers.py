"""Text to token ids and back: bytes, a BPE trained on the corpus, one of Hugging Face, or
Equal-Info Windows.

Text never becomes the end-of-document token: a document that spells a special token out is
encoded as the characters it is made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megascale.corpus.describe import TOKENIZER_FOLDER, read_corpus_file
from megascale.errors import UserError
from megascale.infowindow.tokenizer import InfoWindowTokenizer

TOKENIZER_FILE = "tokenizer.json"
EOD_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257
"""256 byte values and the end-of-document token."""

Tokens = NDArray[Any]


class Tokenizer(Protocol):
    """Text to ids and back."""

    kind: str
    """Its name in recipes: bytes, bpe, hf or infowindow."""
    vocab_size: int
    """The largest id is below this."""
    eod_id: int
    """Id of the end of a document; `encode` does not append it."""

    def encode(self, text: str) -> Tokens:
        """The ids of a text, without an end-of-document token."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The ids of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; U+FFFD stands where they are no valid UTF-8."""

    def save(self, folder: Path) -> None:
        """Write what `open_tokenizer` needs into an existing folder."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How ids are stored: megatron-core's choice for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class ByteTokenizer:
    """The bytes of UTF-8 are the ids; 256 ends a document. Nothing to train or download."""

    kind = "bytes"
    vocab_size = 257
    eod_id = 256

    def encode(self, text: str) -> Tokens:
        """The UTF-8 bytes of a text."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The UTF-8 bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of bytes; ids that are no bytes are left out."""
        array = np.fromiter(ids, dtype=np.int64)
        text = array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes()
        return text.decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing to write."""


class FastTokenizer:
    """A tokenizer of the `tokenizers` library: our BPE, or any of Hugging Face's."""

    def __init__(self, kind: str, backend: Any, eod_id: int) -> None:
        self.kind = kind
        self.eod_id = eod_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._backend = backend
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()

    def encode(self, text: str) -> Tokens:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The ids of each text, without special tokens."""
        kind = token_dtype(self.vocab_size)
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=kind) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self._backend.save(str(folder / TOKENIZER_FILE))


def train_bpe(texts: Iterable[str], vocab_size: int) -> FastTokenizer:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Source: Sennrich et al. 2016, over bytes as in GPT-2. Ends with fewer ids where the texts
    have no more pairs to merge. Raises UserError for a vocabulary smaller than the bytes.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_BPE:
        raise UserError(
            f"tokenizer.vocab_size = {vocab_size} leaves no room for the 256 bytes and the end of "
            f"a document; give {SMALLEST_BPE} or more"
        )
    backend: Any = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return FastTokenizer("bpe", backend, backend.token_to_id(EOD_TEXT))


def load_hf(path: str, eod_token: str | None = None) -> FastTokenizer:
    """A Hugging Face tokenizer from a local folder, a tokenizer.json, or the hub by name.

    `eod_token` ends a document; None takes the tokenizer's own end of sequence. Raises UserError
    where there is none, and where the tokenizer cannot be read or reached.
    """
    backend, own_eos = _hf_backend(path)
    token = eod_token or own_eos
    if token is None:
        raise UserError(
            f"tokenizer {path}: it has no end-of-sequence token; name the token that ends a "
            "document in tokenizer.eod_token"
        )
    eod_id = backend.token_to_id(token)
    if eod_id is None:
        raise UserError(f"tokenizer {path}: it has no token '{token}'; choose another eod_token")
    return FastTokenizer("hf", backend, int(eod_id))


def _hf_backend(path: str) -> tuple[Any, str | None]:
    local = Path(path)
    if local.is_file():
        return _read_backend(local), _eos_of(local.parent)
    if (local / TOKENIZER_FILE).is_file():
        return _read_backend(local / TOKENIZER_FILE), _eos_of(local)
    if path.startswith((".", "/", "~")) and not local.is_dir():
        raise UserError(f"tokenizer.path {path}: no such folder; give one with a {TOKENIZER_FILE}")
    return _through_transformers(str(local) if local.is_dir() else path)


def _through_transformers(path: str) -> tuple[Any, str | None]:
    """Hub names, and folders of other formats, which transformers turns into fast ones."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        return tokenizer.backend_tokenizer, tokenizer.eos_token
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"tokenizer.path {path}: neither a readable local folder nor a tokenizer of the hub "
            f"that can be reached; copy its {TOKENIZER_FILE} here and give that path ({reason})"
        ) from None


def _read_backend(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer: {error}; copy or prepare it again") from None


def _eos_of(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        token = config.get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def open_tokenizer(kind: str, folder: Path, eod_id: int) -> Tokenizer:
    """A tokenizer that was saved into `folder`."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "infowindow":
        return InfoWindowTokenizer.load(folder, vocabulary=eod_id)
    return FastTokenizer(kind, _read_backend(folder / TOKENIZER_FILE), eod_id)


def load_tokenizer(corpus_folder: str | Path) -> Tokenizer:
    """The tokenizer that a corpus was prepared with.

    Raises UserError where it is missing or is another than corpus.json speaks of.
    """
    folder = Path(corpus_folder)
    facts = read_corpus_file(folder)["tokenizer"]
    tokenizer = open_tokenizer(facts["kind"], folder / TOKENIZER_FOLDER, facts["eod_id"])
    if (tokenizer.vocab_size, tokenizer.eod_id) != (facts["vocab_size"], facts["eod_id"]):
        raise UserError(
            f"corpus {folder}: its tokenizer has {tokenizer.vocab_size} ids where corpus.json "
            f"speaks of {facts['vocab_size']}; tokenizer and shards disagree, prepare it again"
        )
    return tokenizer
