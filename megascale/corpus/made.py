"""What earlier prepares have made: whether it is up to date, and whether it may be replaced."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megascale.corpus.inputs import input_files
from megascale.corpus.recipe import Recipe
from megascale.corpus.sources import (
    CORPUS_FILE,
    FORMAT,
    PARTS,
    SET_FILE,
    TOKENIZER_FOLDER,
    describe,
    read_corpus_file,
)
from megascale.errors import UserError
from megascale.parsing import is_path, read_json
from megascale.runtime.files import real_path

CORPUS_NAMES = frozenset(
    {CORPUS_FILE, TOKENIZER_FOLDER, "cache", "heldout.bytes.npy"}
    | {f"{part}{ending}" for part in PARTS for ending in (".bin", ".idx")}
)
"""All that a corpus folder holds, with what readers keep beside its shards."""
PLOTS, LENGTHS_PICTURE = "plots", "lengths.png"
"""In a corpus folder, the folder of pictures and the picture that `megascale data check` draws."""


@dataclass(frozen=True)
class Prepared:
    """A corpus folder and how it came to be."""

    folder: Path
    facts: dict[str, Any]
    """The content of corpus.json."""
    reused: bool
    """It was there already, made from the same recipe and inputs."""


@dataclass(frozen=True)
class Made:
    """What became of a recipe."""

    out: Path
    """The folder of its corpus, or of its corpora."""
    corpora: tuple[Prepared, ...]
    several: bool
    """Whether `out` holds a folder for each corpus, and is no corpus itself."""
    left_out: Mapping[str, str]
    """Sources that have no corpus, and why."""


def fingerprint(recipe: Recipe) -> str:
    """What corpora depend on: the recipe, and name, size and time of change of its inputs."""
    names = [name for _, place in recipe.named_inputs for name in input_files(place)]
    path = recipe.tokenizer.path
    if path is not None and Path(path).exists():
        here = Path(path)
        names += sorted(str(file) for file in here.iterdir()) if here.is_dir() else [path]
    stats = [(name, os.stat(name)) for name in names]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return _digest([FORMAT, _plain(recipe), files])


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what says nothing of its bytes, and without options that it does not use.

    So a corpus of before an option has the same fingerprint.
    """
    plain = asdict(replace(recipe, description="", licence=""))
    if recipe.tokenizer.kind != "hf":
        del plain["tokenizer"]["bos"]
    if not recipe.outputs:
        del plain["outputs"]
    for output in plain.get("outputs", {}).values():
        del output["description"], output["licence"]
    for holder in (plain, *plain.get("outputs", {}).values()):
        for place in holder["inputs"]:
            if place["source_column"] is None:
                del place["source_column"]
    return plain


def fingerprints(recipes: Sequence[Recipe]) -> list[str]:
    """The fingerprint of each of the recipes that are prepared together.

    A tokenizer that is trained on the text of all makes each depend on all.
    """
    own = [fingerprint(recipe) for recipe in recipes]
    if len(recipes) == 1 or recipes[0].tokenizer.kind != "bpe":
        return own
    return [_digest([identity, own]) for identity in own]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def set_content(recipe: Recipe, identity: str, made: Made) -> str:
    """The content of corpora.json, in the folder of several corpora."""
    facts = {
        "format": FORMAT,
        "name": recipe.name,
        "source_fingerprint": identity,
        "corpora": [corpus.folder.name for corpus in made.corpora],
        "left_out": dict(made.left_out),
    }
    return json.dumps(facts, indent=1) + "\n"


def find_made(recipe: Recipe, out: Path, identity: str, force: bool) -> Made | None:
    """What lies at `out` where it was made as it is asked for now; None where nothing is there.

    None too where it may be replaced, by `force`. Raises UserError where anything else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    facts = _set_facts(out)
    if facts is None and not (out / CORPUS_FILE).is_file():
        raise UserError(f"{out}: exists and is no corpus; give another folder with --out")
    members = [out] if facts is None else [out / name for name in facts["corpora"]]
    if force:
        _require_replaceable(out, members)
        _require_inputs_elsewhere(recipe, out)
        return None
    corpora = tuple(map(_read, members))
    _require_same(out, corpora, identity)
    left_out = {} if facts is None else facts["left_out"]
    return Made(out, corpora, facts is not None, left_out)


def _set_facts(out: Path) -> dict[str, Any] | None:
    """The content of corpora.json; None where `out` has none. Raises UserError for another."""
    path = out / SET_FILE
    if not path.is_file():
        return None
    facts = read_json(path)
    try:
        names, left_out = facts["corpora"], facts["left_out"]
        good = facts["format"] == FORMAT and bool(names)
        good &= all(is_path(name) and "/" not in name and name not in (".", "..") for name in names)
        good &= all(isinstance(text, str) for text in left_out.values())
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(
            f"{path}: not a file of format {FORMAT} of prepare; move the folder away or give "
            "another with --out"
        )
    return dict(facts)


def _read(folder: Path) -> Prepared:
    """A corpus that is whole. Raises UserError for any other."""
    try:
        describe(str(folder))
        return Prepared(folder, dict(read_corpus_file(folder)), reused=True)
    except UserError as error:
        raise UserError(f"{error} with --force") from None


def _require_same(out: Path, corpora: Sequence[Prepared], identity: str) -> None:
    """Raise UserError where corpora were made from another recipe or other inputs."""
    others = [corpus for corpus in corpora if corpus.facts.get("source_fingerprint") != identity]
    if not others:
        return
    tokenizer = others[0].facts["tokenizer"]
    if tokenizer["kind"] == "hf" and "bos_id" not in tokenizer:
        raise UserError(
            f"{out}: an earlier version made this corpus, without the token that begins a document "
            "(tokenizer.bos); train on it as it is, or make it anew with --force"
        )
    raise UserError(
        f"{out}: holds a corpus from another recipe or other inputs; replace it with --force or "
        "give another folder with --out"
    )


def _require_replaceable(out: Path, members: Sequence[Path]) -> None:
    """Raise UserError where --force would delete anything but corpora."""
    problem = "would be deleted by --force"
    if out not in members:
        require_only(out, {SET_FILE, *(folder.name for folder in members)}, problem)
    for folder in members:
        require_only(folder, {*CORPUS_NAMES, PLOTS}, problem)
        require_only(folder / PLOTS, {LENGTHS_PICTURE}, problem)


def require_only(folder: Path, names: Collection[str], problem: str) -> None:
    """Raise UserError where a folder, if there is one, holds anything but `names`."""
    if folder.is_symlink() or not folder.is_dir():
        return  # nothing, or what no prepare deletes
    others = sorted({path.name for path in folder.iterdir()} - {*names})
    if others:
        raise UserError(
            f"{folder / others[0]} {problem}, and is no file of a corpus; move it away or give "
            "another folder with --out"
        )


def _require_inputs_elsewhere(recipe: Recipe, out: Path) -> None:
    for name in (name for _, place in recipe.named_inputs for name in input_files(place)):
        if real_path(name).is_relative_to(real_path(out)):
            raise UserError(f"{name}: an input below {out}, which --force replaces; move it away")
