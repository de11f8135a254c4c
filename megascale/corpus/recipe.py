"""What a corpus is made of: recipes in YAML, as frozen dataclasses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from megascale.config import RunConfig
from megascale.config.load import build_as, read_tree
from megascale.errors import UserError
from megascale.installation import given_or_example
from megascale.parsing import is_plain_name, read_yaml_text

CONFIG_KEYS = {field.name for field in fields(RunConfig)}


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """One place that documents come from."""

    kind: Literal["python_stdlib", "files", "jsonl", "parquet", "dataset"]
    """python_stdlib: the interpreter's own *.py files. files: one document per file. jsonl,
    parquet: one per row. dataset: of Hugging Face `datasets`. files and jsonl are unpacked where
    their first bytes are those of gzip, zstd, bzip2 or xz."""
    paths: tuple[str, ...] = ()
    """Files or globs (`**` descends), relative to the working directory; their matches are read
    in sorted order. For files, jsonl and parquet."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths to leave out, as in `*/tests/*`; `*` also matches `/`."""
    text_column: str = "text"
    """Key or column of the text, for jsonl, parquet and dataset; `a.b` is b in a nested a, for
    jsonl and parquet. null counts as an empty document."""
    name: str | None = None
    """For dataset: its name on the hub, or a local folder."""
    config: str | None = None
    """For dataset: its configuration, where it has several."""
    split: str = "train"
    """For dataset: which split."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What turns text into ids."""

    kind: Literal["bytes", "bpe", "hf", "infowindow"] = "bytes"
    """bytes: UTF-8, nothing to download. bpe: trained on the corpus. hf: one of Hugging Face.
    infowindow: Equal-Info Windows, by a codebook of `megascale infowindow compile`."""
    vocab_size: int | None = None
    """For bpe: how many ids, the end of a document included. For infowindow: 256 or 65536, tokens
    of 8 or 16 bits, to which the end of a document is added. None there: 65536 where windows can
    be cut so."""
    path: str | None = None
    """For hf: local folder, tokenizer.json, or name on the hub. For infowindow: the codebook."""
    eod_token: str | None = None
    """For hf: the token that ends a document; None: the tokenizer's end of sequence."""
    bos: str | None = "auto"
    """For hf: the token that begins a document. It is the input before a document's first token,
    in place of the end-of-document token; it is not stored and is no target. `auto`: the token
    that the tokenizer itself puts before a text, where it puts one (of several the last), as its
    post-processor or `add_bos_token` of its config says. `none`: no such token."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A corpus, and how it is read."""

    name: str
    """Name of the corpus, and of its folder below corpora/ where none is given."""
    inputs: tuple[InputConfig, ...]
    """Read one after another, in this order."""
    description: str = ""
    """What the text is."""
    licence: str = ""
    """Under which terms it may be used."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How it becomes ids."""
    heldout_fraction: float = 0.01
    """Part of the documents kept for evaluation, chosen by a hash of the text: a document is
    held out or not wherever it lies and however many others there are."""
    min_characters: int = 1
    """Documents with fewer characters, not counting white space at the ends, are left out."""
    deduplicate: bool = True
    """Of documents with the very same text keep the first alone."""
    invalid_utf8: Literal["skip", "error"] = "skip"
    """Documents that are no UTF-8: left out and counted, or an error."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `a.b=c` overrides.

    Raises UserError for an unreadable file, an unknown key, and what cannot work.
    """
    try:
        text = read_yaml_text(given_or_example(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(
            f"recipe {path}: {reason}; give one, e.g. data/python_stdlib.yaml"
        ) from None
    tree = read_tree(text, str(path))
    if "inputs" not in tree and tree.keys() & CONFIG_KEYS:
        raise UserError(
            f"{path} is the config of a run, not the recipe of a corpus; 'megascale plan {path}' "
            f"shows the run, 'megascale train {path}' trains; give a recipe, e.g. "
            "data/python_stdlib.yaml"
        )
    return _recipe_of(tree, overrides, str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Like `load_recipe`, from YAML text; `where` names it in errors."""
    return _recipe_of(read_tree(text, where), overrides, where)


def _recipe_of(tree: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    recipe = build_as(Recipe, tree, overrides, where)
    problem = _problem(recipe)
    if problem is not None:
        raise UserError(f"{where}: {problem}")
    # here, so that whoever looks sees one file and one word for no token
    path = recipe.tokenizer.path and os.path.expanduser(recipe.tokenizer.path)
    bos = None if recipe.tokenizer.bos == "none" else recipe.tokenizer.bos
    return replace(recipe, tokenizer=replace(recipe.tokenizer, path=path, bos=bos))


def _problem(recipe: Recipe) -> str | None:
    is_plain = is_plain_name(recipe.name) and not set(recipe.name) & set("/\\")
    if not is_plain or recipe.name in (".", ".."):
        return f"name '{recipe.name}' must do as the name of a folder"
    if not recipe.inputs:
        return "inputs is empty; give one, e.g. inputs: [{kind: python_stdlib}]"
    if not 0.0 <= recipe.heldout_fraction < 1.0:
        return f"heldout_fraction = {recipe.heldout_fraction} must be from 0 to below 1"
    if recipe.min_characters < 1:
        return f"min_characters = {recipe.min_characters} must be at least 1"
    problems = [_input_problem(i, one) for i, one in enumerate(recipe.inputs)]
    problems.append(_tokenizer_problem(recipe.tokenizer))
    return next((problem for problem in problems if problem is not None), None)


_INPUT_OPTIONS = {
    "python_stdlib": {"exclude"},
    "files": {"paths", "exclude"},
    "jsonl": {"paths", "exclude", "text_column"},
    "parquet": {"paths", "exclude", "text_column"},
    "dataset": {"name", "config", "split", "text_column"},
}


def _input_problem(index: int, one: InputConfig) -> str | None:
    where, used = f"inputs[{index}]", _INPUT_OPTIONS[one.kind]
    if "paths" in used and not one.paths:
        return f"{where}: kind {one.kind} needs paths, e.g. paths: [texts/**/*.txt]"
    if one.kind == "dataset" and one.name is None:
        return f"{where}: kind dataset needs name, e.g. name: roneneldan/TinyStories"
    defaults = InputConfig(kind=one.kind)
    for option in ("paths", "exclude", "text_column", "name", "config", "split"):
        if option not in used and getattr(one, option) != getattr(defaults, option):
            return f"{where}.{option} means nothing for kind {one.kind}; leave it out"
    return None


_TOKENIZER_OPTIONS: dict[str, set[str]] = {
    "bytes": set(),
    "bpe": {"vocab_size"},
    "hf": {"path", "eod_token", "bos"},
    "infowindow": {"path", "vocab_size"},
}


def _tokenizer_problem(tokenizer: TokenizerConfig) -> str | None:
    kind, defaults = tokenizer.kind, TokenizerConfig()
    for option in ("vocab_size", "path", "eod_token", "bos"):
        is_set = getattr(tokenizer, option) != getattr(defaults, option)
        if option not in _TOKENIZER_OPTIONS[kind] and is_set:
            return f"tokenizer.{option} means nothing for kind {kind}; leave it out"
    if kind == "bpe" and (tokenizer.vocab_size is None or tokenizer.vocab_size < 257):
        return "tokenizer.vocab_size must be 257 or more for kind bpe, e.g. 8192"
    if kind == "hf" and tokenizer.path is None:
        return "tokenizer.path is needed for kind hf: a local folder or a name on the hub"
    if kind == "infowindow" and tokenizer.path is None:
        return "tokenizer.path is needed for kind infowindow: a codebook"
    if kind == "infowindow" and tokenizer.vocab_size not in (None, 256, 65536):
        return "tokenizer.vocab_size must be 256 or 65536 for kind infowindow"
    return None
