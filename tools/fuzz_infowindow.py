"""Equal-Info Windows under atheris: `python tools/fuzz_infowindow.py CODEBOOK... [-runs=N]`.

What begins with a dash is for libFuzzer, such as -max_total_time=3600. Under each codebook any
bytes must come back as a document, any bytes must decode as a stream or be refused with a
UserError, in memory and as a file, and a codebook that was changed must be refused. Needs
`pip install atheris`.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["megascale.infowindow"]):
    from megascale.errors import UserError
    from megascale.infowindow.codebook import Codebook
    from megascale.infowindow.direct import PlainCoder
    from megascale.infowindow.stream import HEADER, MAGIC, VERSION, decode_file, encode_file


def main() -> None:
    """Fuzz until libFuzzer is told to stop."""
    files = [Path(word) for word in sys.argv[1:] if not word.startswith("-")]
    if not files:
        raise SystemExit(__doc__)
    books = [Codebook.open(path) for path in files]
    for book in books:  # what is made once would otherwise count as new code of the first input
        book.coder.decode(book.coder.encode([b"text"]))
    whole = files[0].read_bytes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def one(data: bytes) -> None:
            given = atheris.FuzzedDataProvider(data)
            book, kind = given.PickValueInList(books), given.ConsumeIntInRange(0, 3)
            if kind == 3:
                changed_codebook(given, whole, books[0].digest, folder)
            else:
                (round_trip, any_stream, any_file)[kind](given, book, folder)

        atheris.Setup([word for word in sys.argv if word[0] == "-" or word == sys.argv[0]], one)
        atheris.Fuzz()


def round_trip(given: atheris.FuzzedDataProvider, book: Codebook, folder: Path) -> None:
    """A document, in memory, as a file, and in two parts."""
    cut = given.ConsumeIntInRange(0, 64)
    text = given.ConsumeBytes(_most(book))
    (stream,) = book.coder.encode([text])
    assert book.coder.decode([stream]) == [text]
    if isinstance(book.coder, PlainCoder):
        return
    coder = book.windows
    first, held = coder.encode_part(text[:cut], False)
    rest, more = coder.encode_part(text[held:], True)
    assert np.array_equal(np.concatenate([first, rest]), stream) and held + more == len(text)
    (folder / "in").write_bytes(text)
    encode_file(folder / "in", folder / "coded", book, coder, bool)
    assert (folder / "coded").read_bytes()[HEADER.size :] == stream.tobytes()
    decode_file(folder / "coded", folder / "out", book, bool)
    assert (folder / "out").read_bytes() == text


def any_stream(given: atheris.FuzzedDataProvider, book: Codebook, folder: Path) -> None:
    """Bytes that nobody coded."""
    with suppress(UserError):
        book.coder.decode([np.frombuffer(given.ConsumeBytes(_most(book)), np.uint8)])


def any_file(given: atheris.FuzzedDataProvider, book: Codebook, folder: Path) -> None:
    """Bytes behind a header, which may be right."""
    numbers = [given.ConsumeIntInRange(0, 40), given.ConsumeIntInRange(0, 9)]
    checksum = given.ConsumeBytes(16).ljust(16, b"\0")
    digest = bytes.fromhex(book.digest)
    header = HEADER.pack(MAGIC, VERSION, book.bits, *numbers, digest, checksum)
    kept = given.ConsumeIntInRange(0, HEADER.size)
    raw = header[:kept] + given.ConsumeBytes(_most(book))
    (folder / "any").write_bytes(raw)
    with suppress(UserError):
        decode_file(folder / "any", folder / "none", book, bool)


def changed_codebook(
    given: atheris.FuzzedDataProvider, whole: bytes, digest: str, folder: Path
) -> None:
    """A codebook with some bytes more, less or others."""
    changed, begin = bytearray(whole), given.ConsumeIntInRange(0, 2000)
    end = begin + given.ConsumeIntInRange(0, 8)
    changed[begin:end] = given.ConsumeBytes(8)
    (folder / "book").write_bytes(changed)
    with suppress(UserError):
        assert Codebook.open(folder / "book").digest == digest


def _most(book: Codebook) -> int:
    """Bytes of a document or stream; few where M1 is asked for each."""
    return 4096 if book.is_compiled else 12


if __name__ == "__main__":
    main()
