"""`megascale data check`: read a corpus once and give a verdict."""

from __future__ import annotations

import argparse
from pathlib import Path

from megascale.corpus.check import check_source
from megascale.corpus.document_lengths import length_histogram, plot_lengths
from megascale.corpus.sources import describe
from megascale.errors import UserError
from megascale.runtime.files import real_path
from megascale.runtime.outputs import Output, picture, require_outputs


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale data check`."""
    parser.add_argument("corpus", metavar="CORPUS", help="prepared folder or Megatron prefix")
    parser.add_argument("--heldout", metavar="PREFIX", help="held-out shards of a bare prefix")
    parser.add_argument("--vocab-size", type=int, help="vocabulary of a bare prefix")
    parser.add_argument("--eod-id", type=int, help="end-of-document id of a bare prefix")
    parser.add_argument(
        "--bos-id", type=int, help="id before the documents of a bare prefix, if not that"
    )
    parser.add_argument(
        "--context", type=int, default=4096, help="context to compare lengths with (4096)"
    )
    parser.add_argument(
        "--plots", metavar="DIR", help="folder of lengths.png; default: CORPUS/plots"
    )


def run_check(args: argparse.Namespace) -> int:
    """Print what was found; returns 0 for a good corpus, 2 for one with faults."""
    info = describe(args.corpus, args.heldout, args.vocab_size, args.eod_id, args.bos_id)
    findings = check_source(info)
    print(f"{args.corpus}: {info.train_documents:,} documents, {info.train_tokens:,} tokens")
    if info.unigram_bits_per_byte is not None:
        print(f"unigram entropy: {info.unigram_bits_per_byte:.3f} bits per byte")
    for part, lengths in findings.lengths.items():
        print(f"lengths, {part}:\n{length_histogram(lengths, args.context)}")
    file = (Path(args.plots) if args.plots else _beside(args.corpus)) / "lengths.png"
    try:
        require_outputs([Output("--plots", file, picture(".png"), makes_folders=True)])
        name = real_path(args.corpus).name
        plot_lengths(findings.lengths["train"], args.context, name, file)
        print(f"wrote {file}")
    except (OSError, UserError) as error:  # a verdict is worth more than a picture
        said = getattr(error, "strerror", None) or error
        findings.notes.append(f"no picture: {file}: {said}")
    for note in findings.notes:
        print(f"note: {note}")
    for fault in findings.faults:
        print(f"fault: {fault}")
    print(f"verdict: {findings.verdict}")
    return 2 if findings.faults else 0


def _beside(corpus: str) -> Path:
    path = Path(corpus)
    return (path if path.is_dir() else path.parent) / "plots"
