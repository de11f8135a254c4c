"""The tokenizer face of a codebook: text to ids and back, as `corpus.tokenizers` wants it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megascale.arrays import Bytes, Integers, Tokens
from megascale.errors import UserError
from megascale.infowindow.codebook import Codebook, TreeCoder
from megascale.infowindow.direct import PlainCoder
from megascale.infowindow.reference import VOCABULARIES, token_bits

CODEBOOK_FILE = "codebook.safetensors"
LARGEST = VOCABULARIES[-1]


class InfoWindowTokenizer:
    """Codes of a codebook, cut into tokens of 8 or 16 bits; one more id ends a document."""

    kind = "infowindow"

    def __init__(self, book: Codebook, vocabulary: int) -> None:
        """Raises UserError where windows cannot be cut into such tokens."""
        token_bits(book.bits or LARGEST.bit_length() - 1, vocabulary)
        self.book = book
        self.eod_id = vocabulary
        self.vocab_size = vocabulary + 1
        self.bos_id: int | None = None
        self.special_ids: tuple[int, ...] = (vocabulary,)
        self.unknown_id: int | None = None

    @staticmethod
    def load(path: Path, vocabulary: int | None = None) -> InfoWindowTokenizer:
        """From a codebook file, or a folder that holds one.

        `vocabulary` is 256 or 65536; None: 65536 where windows can be cut into such tokens.
        Raises UserError.
        """
        book = Codebook.open(path / CODEBOOK_FILE if path.is_dir() else path)
        if vocabulary is None:
            vocabulary = 256 if book.bits % 16 else LARGEST
        return InfoWindowTokenizer(book, vocabulary)

    @property
    def window_tokens(self) -> int | None:
        """Tokens of a window; None for codes without windows."""
        bits = self.book.bits
        return bits // token_bits(bits, self.eod_id) if bits else None

    def encode(self, text: str) -> Tokens:
        """The ids of a text, without an end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The ids of each text."""
        streams = self.book.coder.encode([text.encode("utf-8") for text in texts])
        return [self._tokens(stream) for stream in streams]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids.

        The end of a document, other ids that are no part of a code, and the beginning of a window
        that they or the end cut off are left out; U+FFFD stands where bytes are no UTF-8.
        """
        array: Tokens = ids if isinstance(ids, np.ndarray) else np.array([*ids], dtype=np.int64)
        coder = self.book.coder
        if isinstance(coder, TreeCoder) and self.eod_id == LARGEST:
            text = coder.tree.decode(array).tobytes()
        else:
            is_code = (array >= 0) & (array < self.eod_id)
            runs = np.split(array, np.flatnonzero(np.diff(is_code)) + 1)
            streams = [self._stream(run) for run in runs if len(run) and 0 <= run[0] < self.eod_id]
            if isinstance(coder, PlainCoder):
                text = b"".join(map(coder.decode_beginning, streams))
            else:
                text = b"".join(coder.decode(streams))
        return text.decode("utf-8", errors="replace")

    def encode_with_offsets(self, text: str) -> tuple[Tokens, Integers]:
        """Ids, and for each the first character of its window and the one after its last, (n, 2).

        All tokens of a window have its characters; one that a window ends within belongs to both.
        Raises UserError for codes without a dictionary.
        """
        coder, raw = self.book.coder, text.encode("utf-8")
        if not isinstance(coder, TreeCoder):
            raise UserError("offsets are known for codes with a dictionary; compile with --bits 16")
        (stream,) = coder.encode([raw])
        lengths = coder.tree.lengths[coder.codes(stream)]
        ends = np.cumsum(lengths)
        starts_here = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80
        begun = np.concatenate([[0], np.cumsum(starts_here)])
        begins = np.minimum(begun[ends - lengths], begun[ends - lengths + 1] - 1)
        offsets = np.stack([begins, begun[ends]], axis=1).astype(np.int64)
        each = 16 // token_bits(self.book.bits, self.eod_id)
        return self._tokens(stream), np.repeat(offsets, each, axis=0)

    def save(self, folder: Path) -> None:
        """Write the codebook into a folder."""
        self.book.save(folder / CODEBOOK_FILE)

    def _tokens(self, stream: Bytes) -> Tokens:
        if self.eod_id == LARGEST:
            return np.ascontiguousarray(stream).view(">u2").astype(np.int32)
        return stream.astype(np.uint16)

    def _stream(self, ids: Tokens) -> Bytes:
        """The bytes of whole windows."""
        stream = ids.astype(">u2" if self.eod_id == LARGEST else np.uint8).view(np.uint8)
        size = self.book.bits // 8 or 1
        return stream[: len(stream) // size * size]
