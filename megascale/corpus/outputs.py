"""The corpora of a recipe: which documents each has, and their shards.

A recipe with one corpus is the case of one output that has all documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Booleans
from megascale.corpus.inputs import Table
from megascale.corpus.outcomes import Fates
from megascale.corpus.recipe import Recipe
from megascale.corpus.shards import writing
from megascale.corpus.source_names import folder_names, require_few
from megascale.corpus.sources import PARTS
from megascale.runtime.files import whole_file
from megascale.runtime.progress import progress

OPEN_CORPORA = 32
"""Corpora that are written at a time, so that a process has few files open."""


@dataclass(frozen=True)
class Output:
    """One corpus of a recipe."""

    name: str
    """That of the corpus, and of its folder where the recipe makes several."""
    label: str
    """What to call it in messages."""
    description: str
    licence: str
    source: str | None = None
    """The source that its documents name."""


@dataclass(frozen=True)
class Outputs:
    """The corpora of a recipe, and the documents of each."""

    corpora: tuple[Output, ...]
    number: NDArray[np.int16]
    """Of each document of the recipe, which of the corpora it is of; -1: of none."""

    def documents(self, place: int) -> Booleans:
        """Which documents are of a corpus; those that are left out too."""
        return np.equal(self.number, place)

    def only(self, places: Sequence[int]) -> Outputs:
        """These of the corpora, renumbered; the documents of the others are of none."""
        renumbered = np.full(len(self.corpora) + 1, -1, dtype=np.int16)  # the last is that of -1
        renumbered[list(places)] = np.arange(len(places))
        return Outputs(tuple(self.corpora[place] for place in places), renumbered[self.number])


def outputs_of(recipe: Recipe, tables: Sequence[Table], files: Sequence[str]) -> Outputs:
    """The corpora of a recipe; `files` are those of `encode_rows`, in the order of the tables.

    Sources are in the order of their names. Raises UserError where there are too many.
    """
    if recipe.is_split:
        return _sources(recipe, files)
    label, places = f"recipe {recipe.name}", {name: i for i, name in enumerate(recipe.outputs)}
    number = np.repeat(
        np.array([places.get(table.output or "", 0) for table in tables], dtype=np.int16),
        [len(table.open()) for table in tables],
    )
    if not recipe.outputs:
        return Outputs((Output(recipe.name, label, recipe.description, recipe.licence),), number)
    corpora = (
        Output(
            name,
            f"{label}, output {name}",
            recipe.description if output.description is None else output.description,
            recipe.licence if output.licence is None else output.licence,
        )
        for name, output in recipe.outputs.items()
    )
    return Outputs(tuple(corpora), number)


def _sources(recipe: Recipe, files: Sequence[str]) -> Outputs:
    met, number = _named(files)
    sources, folders = sorted(met), folder_names(met)
    corpora = (
        Output(
            folders[source],
            f"recipe {recipe.name}, source {source!r}",
            recipe.description,
            recipe.licence,
            source,
        )
        for source in sources
    )
    place = np.zeros(max(1, len(met)), dtype=np.int16)
    place[[met[source] for source in sources]] = np.arange(len(sources))
    return Outputs(tuple(corpora), place[number])


def _named(files: Sequence[str]) -> tuple[dict[str, int], NDArray[np.int16]]:
    """The sources that documents name, each with a number, and the number of every document's."""
    from datasets import Dataset

    sources: dict[str, int] = {}
    numbers = [np.empty(0, dtype=np.int16)]
    for file in files:
        for chunk in Dataset.from_file(file).data.column("source").chunks:
            encoded = chunk.dictionary_encode()
            here = [sources.setdefault(name, len(sources)) for name in encoded.dictionary.tolist()]
            require_few(sources)
            numbers.append(np.array(here, dtype=np.int16)[encoded.indices.to_numpy()])
    return sources, np.concatenate(numbers)


def write_shards(
    folders: Sequence[Path],
    outputs: Outputs,
    fates: Fates,
    files: Sequence[str],
    dtype: np.dtype[Any],
) -> None:
    """Write the shards of corpora into their folders: of each the documents that are kept."""
    for begin in range(0, len(folders), OPEN_CORPORA):
        together = folders[begin : begin + OPEN_CORPORA]
        place = outputs.number - begin
        is_here = fates.keep & (place >= 0) & (place < len(together))
        _write_together(together, np.where(is_here, 2 * place + fates.heldout, -1), files, dtype)
    for i, folder in enumerate(folders):
        with whole_file(folder / "heldout.bytes.npy") as file:
            np.save(file, fates.returned[fates.heldout & outputs.documents(i)])


def _write_together(
    folders: Sequence[Path], shard: NDArray[Any], files: Sequence[str], dtype: np.dtype[Any]
) -> None:
    """Read all documents once, and write those of these corpora.

    `shard` has twice the place of a document's folder, and one more where it is held out; -1 where
    it is not written.
    """
    with ExitStack() as stack:
        writers = [
            stack.enter_context(writing(folder / part, dtype))
            for folder in folders
            for part in PARTS
        ]
        bar = stack.enter_context(progress(len(shard), "writing shards", " documents"))
        for place, tokens in zip(shard, _token_bytes(files), strict=True):
            if place >= 0:
                writers[place].add(np.frombuffer(tokens, dtype=dtype))
            bar.update()


def _token_bytes(files: Sequence[str]) -> Iterator[bytes]:
    from datasets import Dataset

    for file in files:
        for batch in Dataset.from_file(file).data.to_batches():
            yield from (value.as_buffer() for value in batch.column("tokens"))
