"""`megascale prepare`: turn text into corpora of indexed shards."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megascale.corpus.made import Made, Prepared
from megascale.corpus.mpi_processes import Team, launched_rank
from megascale.corpus.prepare import prepare_all
from megascale.corpus.recipe import Recipe, load_recipes
from megascale.corpus.round_trip import losses
from megascale.errors import UserError
from megascale.parsing import dump_yaml


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale prepare`."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, e.g. of the folder data/")
    parser.add_argument(
        "words",
        metavar="RECIPE|a.b=c",
        nargs="*",
        help="more recipes, of one tokenizer with it; options of all recipes to set otherwise",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder to make; default: corpora/NAME, with the recipe's name. Of several recipes: "
        "the folder that gets the folder NAME of each",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="KIND[:PATH]",
        help="in place of the recipe's: bytes, hf:PATH or infowindow:CODEBOOK",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes that tokenize; default: one per core, under mpiexec one per rank",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a corpus made from other inputs"
    )


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare the corpora and print what they hold; returns the exit status."""
    try:
        team = Team()
        words = [*tokenizer_override(args.tokenizer), *args.words]
        recipes = team.lead(lambda: load_recipes(args.recipe, words))
        wanted = [(recipe, _folder(recipe, args.out, len(recipes))) for recipe in recipes]
        made = prepare_all(wanted, args.processes, args.force)
    except UserError:
        if launched_rank() == 0:
            raise
        return 2  # every rank meets the same error; one speaks
    if team.rank == 0:
        print("\n".join(map(recipe_summary, made)), flush=True)
    return 0


def _folder(recipe: Recipe, out: str | None, num_recipes: int) -> Path:
    """The folder to make of one of the recipes."""
    if out is None:
        return Path("corpora") / recipe.name
    return Path(out) if num_recipes == 1 else Path(out) / recipe.name


def tokenizer_override(given: str | None) -> list[str]:
    """`--tokenizer KIND[:PATH]` as an override, which replaces the recipe's tokenizer."""
    if given is None:
        return []
    kind, _, path = given.partition(":")
    wanted = {"kind": kind} | ({"path": path} if path else {})
    return [f"tokenizer={json.dumps(wanted)}"]


def recipe_summary(made: Made) -> str:
    """What became of a recipe, as text: its corpora, and how a config names several."""
    lines = [summary(corpus) for corpus in made.corpora]
    lines += [f"warning: source {name!r}: {why}" for name, why in made.left_out.items()]
    if made.several:
        sources = {corpus.folder.name: {"path": str(corpus.folder)} for corpus in made.corpora}
        lines += ["for the config of a run:", dump_yaml({"data": {"sources": sources}}).rstrip()]
    return "\n".join(lines)


def summary(prepared: Prepared) -> str:
    """What a corpus holds and what was left out, as text of a few lines."""
    facts, skipped = prepared.facts, prepared.facts["skipped"]
    tokenizer, how = facts["tokenizer"], "is up to date" if prepared.reused else "prepared"
    lines = [
        f"{prepared.folder} {how}: tokenizer {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids"
    ]
    for part in ("train", "heldout"):
        size = facts[part]
        lines.append(
            f"  {part:<8} {size['documents']:>12,} documents {size['tokens']:>16,} tokens "
            f"{size['bytes']:>16,} bytes"
        )
    lines += [f"  {line}" for line in _begin_of_documents(tokenizer)]
    left_out = [f"{skipped[key]:,} {what}" for key, what in _SKIPPED.items() if skipped[key]]
    if left_out:
        lines.append(f"  left out: {', '.join(left_out)}")
    if skipped["first_invalid_utf8"]:
        lines.append(f"  the first that is not UTF-8: {skipped['first_invalid_utf8']}")
    if not facts["heldout"]["documents"]:
        lines.append("  warning: nothing is held out, so runs on it are not evaluated")
    lines += [f"  warning: {line}" for line in losses(facts)]
    lines.append(f"  unigram entropy {facts['unigram_bits_per_byte']:.3f} bits per byte")
    return "\n".join(lines)


def _begin_of_documents(tokenizer: Mapping[str, Any]) -> Iterator[str]:
    """What the model sees before a document's first token, where a tokenizer has a choice."""
    if tokenizer["kind"] != "hf":
        return
    if tokenizer.get("bos_id") is None:
        yield (
            f"before the first token of a document the model sees the end-of-document id "
            f"{tokenizer['eod_id']} (tokenizer.bos: none)"
        )
    else:
        yield (
            f"before the first token of a document the model sees {tokenizer['bos_token']}, id "
            f"{tokenizer['bos_id']} (tokenizer.bos)"
        )


_SKIPPED = {
    "empty": "empty",
    "duplicates": "duplicates of others",
    "invalid_utf8": "not UTF-8",
}
