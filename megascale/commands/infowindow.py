"""`megascale infowindow compile | encode | decode | inspect`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.errors import UserError
from megascale.reading import MOST_FILE_BYTES, read_whole
from megascale.runtime.outputs import Kind, Output, picture, require_outputs
from megascale.runtime.progress import progress

if TYPE_CHECKING:
    from megascale.infowindow.codebook import Codebook, PartCoder
    from megascale.infowindow.reference import ReferenceCoder

TEXT = Kind("a text", lambda path: True)
"""What `decode` writes, of which any file is one."""


def add_compile_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale infowindow compile`."""
    add = parser.add_argument
    add("m1", metavar="M1", help="file of a frozen M1, as train-m1 writes it")
    add("--out", required=True, metavar="FILE", help="codebook to write")
    add(
        "--code",
        choices=["ac", "tunstall", "plain"],
        default="ac",
        help="ac: windows of arithmetic coding (default); tunstall: the most probable strings; "
        "plain: arithmetic coding of whole documents, a baseline",
    )
    add(
        "--bits",
        type=int,
        metavar="B",
        help="of a window: 16 (default), or 24, 32, 64, 128, whose coder runs M1 all the time",
    )


def run_compile(args: argparse.Namespace) -> int:
    """Run M1 once and write the codebook; the exit status. Raises UserError."""
    from megascale.infowindow.checked_files import files_of, make_place
    from megascale.infowindow.codebook import KIND, Codebook
    from megascale.infowindow.expand import NUM_CODES
    from megascale.infowindow.m1 import M1

    out = Path(args.out)
    bits = args.bits if args.bits is not None else 0 if args.code == "plain" else 16
    require_outputs([Output("--out", out, files_of(KIND), makes_folders=True)], [args.m1])
    model, began = M1.open(Path(args.m1)), time.monotonic()
    make_place(out)  # before minutes of work
    with progress(NUM_CODES, "compiling", " codes") as bar:
        book = Codebook.compile(model, args.code, bits, bar.update)
    book.save(out)
    print(f"{out}: {described(out)}")
    print(f"  M1 of {model.num_parameters:,} parameters, {time.monotonic() - began:.1f} s")
    return 0


def described(path: Path) -> str:
    """A codebook in a line. Raises UserError."""
    from megascale.infowindow.codebook import Codebook

    book = Codebook.open(path)
    name = f"code {book.code}" + (f", windows of {book.bits} bits" if book.bits else "")
    if not book.is_compiled:
        return f"{name}, by M1 while coding; {book.digest[:12]}"
    return (
        f"{name}, {len(book.strings):,} strings up to {book.facts['longest']} bytes, "
        f"{book.facts['expected_bytes']:.2f} bytes in a window by M1; {book.digest[:12]}"
    )


def add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale infowindow encode`."""
    _add_files(parser)
    add = parser.add_argument
    add("--reference", action="store_true", help="by the slow reference coder, which asks M1")
    add(
        "--m1",
        metavar="FILE",
        help="for --reference: the M1 of the codebook; default: m1.safetensors beside it",
    )


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale infowindow decode`."""
    _add_files(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="IN", help="file to read")
    add("target", metavar="OUT", help="file to write")
    add("--codebook", required=True, metavar="FILE", help="as `megascale infowindow compile` makes")


def run_encode(args: argparse.Namespace) -> int:
    """Code any file as one document; the exit status. Raises UserError."""
    from megascale.infowindow.codebook import Codebook
    from megascale.infowindow.stream import CODED, encode_file

    if args.m1 and not args.reference:
        raise UserError("--m1 is for --reference; a codebook needs no M1 to code")
    source, target, codebook = Path(args.source), Path(args.target), Path(args.codebook)
    m1 = Path(args.m1) if args.m1 else codebook.parent / "m1.safetensors"
    reads = [source, codebook, m1] if args.reference else [source, codebook]
    require_outputs([Output("OUT", target, CODED)], reads)
    book = Codebook.open(codebook)
    coder: PartCoder = book.windows
    if args.reference:
        coder = _reference(book, m1)
    with progress(_size(source), "encoding", "B") as bar:
        sizes = encode_file(source, target, book, coder, bar.update)
    each = f", {sizes.text_bytes / sizes.windows:.3f} bytes each" if sizes.windows else ""
    print(f"{target}: {sizes.text_bytes:,} bytes in {sizes.windows:,} windows{each}")
    return 0


def _reference(book: Codebook, where: Path) -> ReferenceCoder:
    """The reference coder of a codebook. Raises UserError where M1 is missing or another."""
    from megascale.infowindow.m1 import M1
    from megascale.infowindow.reference import ReferenceCoder

    if book.code != "ac":
        raise UserError(f"--reference is a coder of ac, and this codebook is of {book.code}")
    model = M1.open(where)
    book.require_m1(model, where)
    return ReferenceCoder(model, book.bits)


def run_decode(args: argparse.Namespace) -> int:
    """Decode a file of `encode`; the exit status. Raises UserError."""
    from megascale.infowindow.codebook import Codebook
    from megascale.infowindow.stream import HEADER, decode_file

    source, target, codebook = Path(args.source), Path(args.target), Path(args.codebook)
    require_outputs([Output("OUT", target, TEXT)], [source, codebook])
    book = Codebook.open(codebook)
    with progress(max(0, _size(source) - HEADER.size), "decoding", "B") as bar:
        sizes = decode_file(source, target, book, bar.update)
    print(f"{target}: {sizes.text_bytes:,} bytes from {sizes.windows:,} windows")
    return 0


def _size(path: Path) -> int:
    """Bytes of a file; 0 for pipes, and for what cannot be opened, which is said where it is."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale infowindow inspect`."""
    add = parser.add_argument
    add("codebook", metavar="CODEBOOK", help="as `megascale infowindow compile` makes")
    add("--text", metavar="FILE", help="text to look at through it; default: Python's argparse.py")
    add("--rows", type=int, default=20, metavar="N", help="windows in the table; default: 20")
    add("--picture", metavar="FILE", help="where to draw; default: CODEBOOK.png")


def run_inspect(args: argparse.Namespace) -> int:
    """Print and draw what windows hold; the exit status. Raises UserError."""
    from megascale.infowindow.codebook import Codebook
    from megascale.infowindow.inspect import draw, look, table

    path = Path(args.codebook)
    if args.rows < 1:
        raise UserError(f"--rows {args.rows} must be at least 1")
    book = Codebook.open(path)
    source = Path(args.text) if args.text else Path(argparse.__file__)
    drawn = Path(args.picture) if args.picture else path.with_suffix(".png")
    require_outputs([Output("--picture", drawn, picture())], [path, source])
    try:
        text = read_whole(source, MOST_FILE_BYTES, or_stream=True)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}; give the path of a text") from None
    found = look(book, text)
    print(f"{path}: {described(path)}")
    print(*table(found, args.rows), sep="\n")
    draw(found, source.name, drawn)
    print(f"written: {drawn}")
    return 0
