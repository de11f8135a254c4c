"""Text to token ids and back: bytes, a BPE trained on the corpus, one of Hugging Face, or
Equal-Info Windows.

Text never becomes the end-of-document token or another special one: a document that spells one
out gets other ids for the same characters, or is refused. The ids that come out are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megascale.arrays import Tokens
from megascale.corpus.hugging_face import (
    TOKENIZER_FILE,
    find_tokenizer,
    put_before_text,
    read_backend,
)
from megascale.corpus.sources import TOKENIZER_FOLDER, read_corpus_file
from megascale.corpus.special_tokens import (
    Refused,
    first_lost,
    refused_at,
    special_ids,
    unknown_id_of,
    without_ids,
)
from megascale.errors import UserError
from megascale.infowindow.tokenizer import InfoWindowTokenizer

EOD_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257
"""256 byte values and the end-of-document token."""


class Tokenizer(Protocol):
    """Text to ids and back."""

    kind: str
    """Its name in recipes: bytes, bpe, hf or infowindow."""
    vocab_size: int
    """The largest id is below this."""
    eod_id: int
    """Id of the end of a document; `encode` does not append it."""
    bos_id: int | None
    """Id of the beginning of a text, the input before a document's first token; None: `eod_id`."""
    special_ids: tuple[int, ...]
    """Ids that no text becomes: `eod_id`, `bos_id` and other special tokens."""
    unknown_id: int | None
    """Id of text that has no other; None: there is none."""

    def encode(self, text: str) -> Tokens:
        """The ids of a text, without an end-of-document token. Raises UserError; see below."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The ids of each text.

        Raises UserError for a text that spells a special token and has no other ids.
        """

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
    bos_id: int | None = None
    special_ids: tuple[int, ...] = (256,)
    unknown_id: int | None = None

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

    def __init__(
        self,
        kind: str,
        backend: Any,
        eod_id: int,
        bos_id: int | None = None,
        others: Iterable[int] = (),
    ) -> None:
        """`others` are special tokens that the tokenizer itself does not flag as such."""
        self.kind = kind
        self.eod_id = eod_id
        self.bos_id = None if bos_id == eod_id else bos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.unknown_id = unknown_id_of(backend)
        named = {eod_id, *others} | ({bos_id} if bos_id is not None else set())
        self.special_ids = special_ids(backend, named, self.unknown_id)
        size = max(self.vocab_size, *(i + 1 for i in self.special_ids))
        self._is_special = np.zeros(size, dtype=np.bool_)
        self._is_special[list(self.special_ids)] = True
        self._backend = backend
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()

    def encode(self, text: str) -> Tokens:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The ids of each text, without special tokens."""
        return list(map(_require_ids, self.encode_each(texts)))

    def encode_each(self, texts: Sequence[str]) -> list[Tokens | Refused]:
        """The ids of each text, without special tokens, or why it has none."""
        kind = token_dtype(self.vocab_size)
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids: list[Tokens | Refused] = [np.array(one.ids, dtype=kind) for one in encoded]
        for i, text in enumerate(texts):
            if self._spells_special(text, ids[i]):
                ids[i] = self._around_special(text)
        return ids

    def _spells_special(self, text: str, ids: Any) -> bool:
        if self._is_special[ids].any():
            return True
        # the unknown token: only where the text spells it
        return self._unknown_text in text and bool((ids == self.unknown_id).any())

    @cached_property
    def _unknown_text(self) -> str:
        """How the unknown token is spelled; U+FFFF, which is no character, without one."""
        unknown = self.unknown_id
        return "\uffff" if unknown is None else str(self._backend.id_to_token(unknown))

    @cached_property
    def _plain(self) -> Any:
        """The same tokenizer, unable to yield special tokens, made when a text spells one."""
        unknown = set() if self.unknown_id is None else {self.unknown_id}
        return without_ids(self._backend, {*self.special_ids, *unknown})

    def _around_special(self, text: str) -> Tokens | Refused:
        """Other ids for a text that spells a special token."""
        before = self._backend.encode(text, add_special_tokens=False)
        after = self._plain.encode(text, add_special_tokens=False)
        ids = np.array(after.ids, dtype=token_dtype(self.vocab_size))
        for i in np.flatnonzero(self._is_special[ids])[:1]:
            return refused_at(text, after.offsets[i][0])
        lost = first_lost(before, after, len(text), self.unknown_id)
        return ids if lost is None else refused_at(text, lost)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""
        array = np.fromiter(ids, dtype=np.int64)
        array = array[(array >= 0) & (array < self.vocab_size)]
        kept = array[~self._is_special[array]].tolist()
        return str(self._backend.decode(kept, skip_special_tokens=True))

    def normalize(self, text: str) -> str:
        """What the tokenizer makes of a text before it looks for ids."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def own_bos_id(self) -> int | None:
        """The id that the tokenizer's post-processor puts before a text, where it puts one."""
        return put_before_text(self._backend)

    def token_id(self, spelling: str) -> int | None:
        """The id of the token that is spelled so; None: there is none."""
        token_id = self._backend.token_to_id(spelling)
        return None if token_id is None else int(token_id)

    def token_text(self, token_id: int) -> str:
        """How an id is spelled."""
        return str(self._backend.id_to_token(token_id))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self._backend.save(str(folder / TOKENIZER_FILE))


def _require_ids(encoded: Tokens | Refused) -> Tokens:
    if isinstance(encoded, Refused):
        raise UserError(
            f"text spells a special token of the tokenizer, {encoded}, and the tokenizer has no "
            "other ids for it; leave this text out or choose another tokenizer"
        )
    return encoded


def encode_each(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Tokens | Refused]:
    """The ids of each text by a tokenizer of any kind, or why it has none.

    Whatever the kind, the ids are looked at: no special token is among them.
    """
    is_special = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
    is_special[list(tokenizer.special_ids)] = True
    encoded: Sequence[Tokens | Refused] = (
        tokenizer.encode_each(texts)
        if isinstance(tokenizer, FastTokenizer)
        else tokenizer.encode_batch(texts)
    )
    for text, ids in zip(texts, encoded, strict=True):
        if isinstance(ids, Refused) or not is_special[ids].any():
            yield ids
        else:
            yield refused_at(text, len(tokenizer.decode(ids[: is_special[ids].argmax()])))


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


def load_hf(path: str, eod_token: str | None = None, bos: str | None = "auto") -> FastTokenizer:
    """A Hugging Face tokenizer from a local folder, a tokenizer.json, or the hub by name.

    `eod_token` ends a document; None takes the tokenizer's own end of sequence. `bos` begins one:
    a token, `auto` for what the tokenizer itself puts before a text, None for nothing. Raises
    UserError where it lacks these, and where the tokenizer cannot be read or reached.
    """
    found = find_tokenizer(path)
    token = eod_token or found.named.get("eos_token")
    if token is None:
        raise UserError(
            f"tokenizer {path}: it has no end-of-sequence token; name the token that ends a "
            "document in tokenizer.eod_token"
        )
    eod_id = found.backend.token_to_id(token)
    if eod_id is None:
        raise UserError(f"tokenizer {path}: it has no token '{token}'; choose another eod_token")
    bos_id = found.own_bos_id() if bos == "auto" else None
    if bos not in (None, "auto"):
        bos_id = found.backend.token_to_id(bos)
        if bos_id is None:
            raise UserError(
                f"tokenizer {path}: it has no token '{bos}'; set tokenizer.bos to one that it has, "
                "to auto or to none"
            )
    return FastTokenizer("hf", found.backend, int(eod_id), bos_id, found.named_ids())


def open_tokenizer(
    kind: str, folder: Path, eod_id: int, bos_id: int | None = None, others: Sequence[int] = ()
) -> Tokenizer:
    """A tokenizer that was saved into `folder`; `others` are further ids that no text becomes."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "infowindow":
        return InfoWindowTokenizer.load(folder, vocabulary=eod_id)
    return FastTokenizer(kind, read_backend(folder / TOKENIZER_FILE), eod_id, bos_id, others)


def load_tokenizer(corpus_folder: str | Path) -> Tokenizer:
    """The tokenizer that a corpus was prepared with.

    Raises UserError where it is missing or is another than corpus.json speaks of.
    """
    folder = Path(corpus_folder)
    facts = read_corpus_file(folder)["tokenizer"]
    tokenizer = open_tokenizer(
        facts["kind"],
        folder / TOKENIZER_FOLDER,
        facts["eod_id"],
        facts.get("bos_id"),
        facts.get("special_ids", ()),
    )
    if (tokenizer.vocab_size, tokenizer.eod_id) != (facts["vocab_size"], facts["eod_id"]):
        raise UserError(
            f"corpus {folder}: its tokenizer has {tokenizer.vocab_size} ids where corpus.json "
            f"speaks of {facts['vocab_size']}; tokenizer and shards disagree, prepare it again"
        )
    return tokenizer
