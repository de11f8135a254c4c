"""What corpora are made of: recipes in YAML, as frozen dataclasses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from megascale.config import RunConfig
from megascale.config.load import build_as, read_tree
from megascale.corpus.sources import SET_FILE
from megascale.errors import UserError
from megascale.installation import given_or_example
from megascale.parsing import is_plain_name, read_yaml_text

CONFIG_KEYS = {field.name for field in fields(RunConfig)}
RECIPE_KEYS = {"inputs", "outputs"}
"""A file with one of them is a recipe."""
MOST_CORPORA = 256
"""Of a recipe."""
MOST_BPE_IDS = 1 << 22
"""Of a BPE that is trained here. The library takes memory for all ids at once, and ends the process
where there is none."""
MOST_NAME_BYTES = 200
"""Of the name of an output, which is that of a folder."""
_OVERRIDE = re.compile(r"[A-Za-z_][^/=]*=")
"""Begins a word of the command line that is an override; a path with such a name needs `./`."""


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
    source_column: str | None = None
    """Key or column that names the source of a document, for jsonl, parquet and dataset; `a.b` as
    for `text_column`. The documents of each source become a corpus of their own, in a folder with
    the name of the source. Every input of the recipe must have one, or none."""
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
class OutputConfig:
    """One of several corpora that a recipe makes."""

    inputs: tuple[InputConfig, ...]
    """Read one after another, in this order."""
    description: str | None = None
    """What the text is. None: that of the recipe."""
    licence: str | None = None
    """Under which terms it may be used. None: that of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One corpus or several with one tokenizer, and how they are read."""

    name: str
    """Name of the corpus, and of its folder below corpora/ where none is given. Several corpora lie
    in that folder, each in a folder of its own."""
    inputs: tuple[InputConfig, ...] = ()
    """Read one after another, in this order. With `source_column` they make several corpora."""
    outputs: dict[str, OutputConfig] = field(default_factory=dict)
    """Several corpora by name, in place of `inputs`. Read one after another, in this order."""
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
    """Of documents with the very same text keep the first alone, in all corpora of the recipe."""
    invalid_utf8: Literal["skip", "error"] = "skip"
    """Documents that are no UTF-8: left out and counted, or an error."""

    @property
    def named_inputs(self) -> list[tuple[str | None, InputConfig]]:
        """Every input in the order of reading, with the name of its output, where it has one."""
        inputs: list[tuple[str | None, InputConfig]] = [(None, one) for one in self.inputs]
        return inputs + [(name, one) for name, out in self.outputs.items() for one in out.inputs]

    @property
    def is_split(self) -> bool:
        """Whether documents name their source, and each source becomes a corpus."""
        return any(one.source_column is not None for one in self.inputs)

    @property
    def makes_several(self) -> bool:
        """Whether its folder holds corpora, and is none itself."""
        return self.is_split or bool(self.outputs)


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
    if not RECIPE_KEYS & tree.keys() and tree.keys() & CONFIG_KEYS:
        raise UserError(
            f"{path} is the config of a run, not the recipe of a corpus; 'megascale plan {path}' "
            f"shows the run, 'megascale train {path}' trains; give a recipe, e.g. "
            "data/python_stdlib.yaml"
        )
    return _recipe_of(tree, overrides, str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Like `load_recipe`, from YAML text; `where` names it in errors."""
    return _recipe_of(read_tree(text, where), overrides, where)


def load_recipes(path: str, words: Sequence[str]) -> list[Recipe]:
    """The recipes of a command line, with the overrides of all: the one at `path`, and of `words`.

    A word such as `a.b=c` is an override, any other is a path. Raises UserError as `load_recipe`
    does, and where the recipes have different tokenizers or the same name.
    """
    overrides = [word for word in words if _OVERRIDE.match(word)]
    paths = [path, *(word for word in words if not _OVERRIDE.match(word))]
    recipes = [load_recipe(path, overrides) for path in paths]
    for path, recipe in zip(paths[1:], recipes[1:], strict=True):
        if recipe.tokenizer != recipes[0].tokenizer:
            raise UserError(
                f"recipes {paths[0]} and {path} have different tokenizers; give all recipes one, "
                "e.g. --tokenizer bytes or 'tokenizer={kind: bpe, vocab_size: 8192}'"
            )
    names = [recipe.name for recipe in recipes]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(
                f"recipes {paths[names.index(name)]} and {paths[place]} are both named '{name}', "
                "so they would make the same folder; give one of them another name"
            )
    return recipes


def _recipe_of(tree: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    recipe = build_as(Recipe, tree, overrides, where)
    problem = _problem(recipe)
    if problem is not None:
        raise UserError(f"{where}: {problem}")
    # here, so that whoever looks sees one file and one word for no token
    path = recipe.tokenizer.path and os.path.expanduser(recipe.tokenizer.path)
    bos = None if recipe.tokenizer.bos == "none" else recipe.tokenizer.bos
    return replace(recipe, tokenizer=replace(recipe.tokenizer, path=path, bos=bos))


def _is_folder_name(name: str) -> bool:
    is_plain = is_plain_name(name) and not set(name) & set("/\\")
    return is_plain and name not in (".", "..")


def _problem(recipe: Recipe) -> str | None:
    if not _is_folder_name(recipe.name):
        return f"name '{recipe.name}' must do as the name of a folder"
    if recipe.inputs and recipe.outputs:
        return "inputs and outputs are both given; put the inputs into one of the outputs"
    if not recipe.inputs and not recipe.outputs:
        return "inputs is empty; give one, e.g. inputs: [{kind: python_stdlib}]"
    if not 0.0 <= recipe.heldout_fraction < 1.0:
        return f"heldout_fraction = {recipe.heldout_fraction} must be from 0 to below 1"
    if recipe.min_characters < 1:
        return f"min_characters = {recipe.min_characters} must be at least 1"
    problems = [_input_problem(f"inputs[{i}]", one) for i, one in enumerate(recipe.inputs)]
    problems += _output_problems(recipe)
    problems += [_split_problem(recipe), _tokenizer_problem(recipe.tokenizer)]
    return next((problem for problem in problems if problem is not None), None)


def _output_problems(recipe: Recipe) -> Iterator[str | None]:
    if len(recipe.outputs) > MOST_CORPORA:
        yield f"outputs has {len(recipe.outputs)} names; a recipe makes at most {MOST_CORPORA}"
    for name, output in recipe.outputs.items():
        where = f"outputs.{name}"
        is_free = len(os.fsencode(name)) <= MOST_NAME_BYTES and name.casefold() != SET_FILE
        if not _is_folder_name(name) or name.startswith(".") or not is_free:
            yield f"outputs: the name '{name}' must do as the name of a folder, without a dot first"
        if not output.inputs:
            yield f"{where}.inputs is empty; give one, e.g. inputs: [{{kind: python_stdlib}}]"
        for i, one in enumerate(output.inputs):
            yield _input_problem(f"{where}.inputs[{i}]", one)
            if one.source_column is not None:
                yield (
                    f"{where}.inputs[{i}].source_column splits inputs into corpora, and this one "
                    f"is of output '{name}'; leave it out, or give inputs in place of outputs"
                )


def _split_problem(recipe: Recipe) -> str | None:
    without = [i for i, one in enumerate(recipe.inputs) if one.source_column is None]
    if not recipe.is_split or not without:
        return None
    return (
        f"inputs[{without[0]}] has no source_column and others have one, so nothing says of which "
        "source its documents are; give it one, or make it a recipe of its own"
    )


_INPUT_OPTIONS = {
    "python_stdlib": {"exclude"},
    "files": {"paths", "exclude"},
    "jsonl": {"paths", "exclude", "text_column", "source_column"},
    "parquet": {"paths", "exclude", "text_column", "source_column"},
    "dataset": {"name", "config", "split", "text_column", "source_column"},
}
_NOT_OF_ALL = ("paths", "exclude", "text_column", "source_column", "name", "config", "split")


def _input_problem(where: str, one: InputConfig) -> str | None:
    used = _INPUT_OPTIONS[one.kind]
    if "paths" in used and not one.paths:
        return f"{where}: kind {one.kind} needs paths, e.g. paths: [texts/**/*.txt]"
    if one.kind == "dataset" and one.name is None:
        return f"{where}: kind dataset needs name, e.g. name: roneneldan/TinyStories"
    defaults = InputConfig(kind=one.kind)
    for option in _NOT_OF_ALL:
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
    if kind == "bpe" and not 257 <= (tokenizer.vocab_size or 0) <= MOST_BPE_IDS:
        return f"tokenizer.vocab_size must be 257 to {MOST_BPE_IDS} for kind bpe, e.g. 8192"
    if kind == "hf" and tokenizer.path is None:
        return "tokenizer.path is needed for kind hf: a local folder or a name on the hub"
    if kind == "infowindow" and tokenizer.path is None:
        return "tokenizer.path is needed for kind infowindow: a codebook"
    if kind == "infowindow" and tokenizer.vocab_size not in (None, 256, 65536):
        return "tokenizer.vocab_size must be 256 or 65536 for kind infowindow"
    return None
