"""`megascale data check`: read a corpus, or those of a run, once and give a verdict."""

from __future__ import annotations

import argparse
from pathlib import Path

from megascale.config.load import whole_number
from megascale.corpus.check import Findings, check_source
from megascale.corpus.document_lengths import length_histogram, plot_lengths
from megascale.corpus.made import LENGTHS_PICTURE, PLOTS
from megascale.corpus.sources import describe
from megascale.errors import UserError
from megascale.run.blend_check import check_blend
from megascale.run.resolve import read_run
from megascale.runtime.files import real_path
from megascale.runtime.outputs import Output, picture, require_outputs

CONTEXT_TOKENS = 4096
_OF_A_CORPUS = ("heldout", "vocab_size", "eod_id", "bos_id", "context", "plots")


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale data check`."""
    parser.add_argument(
        "corpus",
        metavar="CORPUS|CONFIG",
        help="prepared folder or Megatron prefix; or the YAML file of a run, whose sources are "
        "checked together",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="with CONFIG: options to set otherwise"
    )
    parser.add_argument("--heldout", metavar="PREFIX", help="held-out shards of a bare prefix")
    parser.add_argument("--vocab-size", type=int, help="vocabulary of a bare prefix")
    parser.add_argument("--eod-id", type=int, help="end-of-document id of a bare prefix")
    parser.add_argument(
        "--bos-id", type=int, help="id before the documents of a bare prefix, if not that"
    )
    parser.add_argument(
        "--context", metavar="TOKENS", help=f"to compare lengths with; default: {CONTEXT_TOKENS}"
    )
    parser.add_argument(
        "--plots", metavar="DIR", help="folder of lengths.png; default: CORPUS/plots"
    )


def _context(text: str | None) -> int:
    return CONTEXT_TOKENS if text is None else whole_number(text, "--context", 1)


def run_check(args: argparse.Namespace) -> int:
    """Print what was found; returns 0 where all is good, 2 where there are faults."""
    if _is_config(args.corpus):
        return _check_config(args)
    if args.overrides:
        raise UserError(
            f"{args.overrides[0]}: options go with the config of a run, and {args.corpus} is none; "
            "leave it out"
        )
    context = _context(args.context)
    info = describe(args.corpus, args.heldout, args.vocab_size, args.eod_id, args.bos_id)
    findings = check_source(info)
    print(f"{args.corpus}: {info.train_documents:,} documents, {info.train_tokens:,} tokens")
    if info.unigram_bits_per_byte is not None:
        print(f"unigram entropy: {info.unigram_bits_per_byte:.3f} bits per byte")
    for part, lengths in findings.lengths.items():
        print(f"lengths, {part}:\n{length_histogram(lengths, context)}")
    file = (Path(args.plots) if args.plots else _beside(args.corpus)) / LENGTHS_PICTURE
    try:
        require_outputs([Output("--plots", file, picture(".png"), makes_folders=True)])
        name = real_path(args.corpus).name
        plot_lengths(findings.lengths["train"], context, name, file)
        print(f"wrote {file}")
    except (OSError, UserError) as error:  # a verdict is worth more than a picture
        said = getattr(error, "strerror", None) or error
        findings.notes.append(f"no picture: {file}: {said}")
    return _verdict(findings)


def _is_config(path: str) -> bool:
    """Whether a path is that of a YAML file, and not the prefix of shards."""
    return Path(path).suffix.lower() in (".yaml", ".yml") and not Path(f"{path}.idx").exists()


def _check_config(args: argparse.Namespace) -> int:
    """Check the sources of a run together."""
    for option in _OF_A_CORPUS:
        if getattr(args, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise UserError(
                f"{flag} goes with a corpus, not with the config of a run; leave it out"
            )
    run = read_run(args.corpus, args.overrides)
    text, findings = check_blend(run)
    print(f"{args.corpus}: {len(run.sources)} sources\n{text}")
    return _verdict(findings)


def _verdict(findings: Findings) -> int:
    for note in findings.notes:
        print(f"note: {note}")
    for fault in findings.faults:
        print(f"fault: {fault}")
    print(f"verdict: {findings.verdict}")
    return 2 if findings.faults else 0


def _beside(corpus: str) -> Path:
    path = Path(corpus)
    return (path if path.is_dir() else path.parent) / PLOTS
