"""Text to corpus folders: list the documents, tokenize them on many processes, merge.

Every rank tokenizes one contiguous range of the documents of a recipe; rank 0 then drops
duplicates, parts held-out from train, and writes the shards of each corpus. What happens to a
document follows from its text and from the documents before it, so the files are the same bytes on
any number of processes. All recipes are made before any folder gets its name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from megascale.corpus.encode import GOOD, Encoder, encode_rows, hash_of, text_of
from megascale.corpus.facts import corpus_facts
from megascale.corpus.inputs import Table, read_documents, read_table
from megascale.corpus.made import (
    CORPUS_NAMES,
    Made,
    Prepared,
    find_made,
    fingerprints,
    require_only,
    set_content,
)
from megascale.corpus.mpi_processes import Team
from megascale.corpus.outcomes import (
    Fates,
    decide,
    heldout_below,
    nothing_to_train_on,
    round_trip,
    skipped_of,
)
from megascale.corpus.outputs import Outputs, outputs_of, write_shards
from megascale.corpus.recipe import Recipe, TokenizerConfig
from megascale.corpus.sources import CORPUS_FILE, SET_FILE, TOKENIZER_FOLDER
from megascale.corpus.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    load_hf,
    load_tokenizer,
    token_dtype,
    train_bpe,
)
from megascale.errors import UserError
from megascale.infowindow.tokenizer import InfoWindowTokenizer
from megascale.runtime.files import (
    discard,
    make_fresh_folder,
    open_lock,
    unfinished_file,
    write_file,
)
from megascale.runtime.progress import progress

WORK, MADE = "work", "made"
"""Folders in a scratch folder: intermediate files, and what gets the name that is asked for."""
_READ_ROWS = 256


@dataclass(frozen=True)
class Job:
    """A recipe to be prepared, and the folder that is to be made of it."""

    recipe: Recipe
    out: Path
    identity: str = ""
    """The fingerprint of what is asked for."""

    @property
    def partial(self) -> Path:
        """Its scratch folder."""
        return _partial(self.out)


def prepare(
    recipe: Recipe, out: str | Path, processes: int | None = None, force: bool = False
) -> Prepared:
    """Make the corpus folder `out` of a recipe with one corpus; see `prepare_all`."""
    (made,) = prepare_all([(recipe, out)], processes, force)
    (corpus,) = made.corpora
    return corpus


def prepare_all(
    wanted: Sequence[tuple[Recipe, str | Path]], processes: int | None = None, force: bool = False
) -> list[Made]:
    """Make a folder of each recipe, or find it made from the same recipe and inputs.

    The recipes have one tokenizer; a BPE is trained on the text of all. `processes` tokenize on
    this machine; None: one per core, and under `mpiexec` one per rank. `force` replaces corpora
    that differ. Every folder appears whole or not at all, and none does after an error in any
    recipe. Raises UserError on every rank for inputs that cannot be read and where no text is left.
    """
    team = Team()
    # `.` has no name to put others beside
    jobs = [Job(recipe, Path(os.path.abspath(out))) for recipe, out in wanted]
    if processes is None:
        processes = _cores() if team.size == 1 else 1
    if processes < 1:
        raise UserError(f"--processes {processes} must be at least 1")
    jobs, found = team.lead(lambda: _look(jobs, force))
    missing = [job for job, made in zip(jobs, found, strict=True) if made is None]
    new = iter(_make(missing, next(filter(None, found), None), team, processes) if missing else ())
    return [next(new) if made is None else made for made in found]


def _look(jobs: Sequence[Job], force: bool) -> tuple[list[Job], list[Made | None]]:
    """The jobs with their fingerprints, and what is there already."""
    identities = fingerprints([job.recipe for job in jobs])
    jobs = [replace(job, identity=identity) for job, identity in zip(jobs, identities, strict=True)]
    return jobs, [find_made(job.recipe, job.out, job.identity, force) for job in jobs]


def _make(jobs: Sequence[Job], sibling: Made | None, team: Team, processes: int) -> list[Made]:
    """Every rank: make the folders of all jobs. `sibling` was made together with them before."""
    with ExitStack() as stack:
        team.lead(lambda: _enter(stack, jobs))
        tables, encoder = team.lead(lambda: _begin(jobs, sibling))
        made = [
            _make_one(job, read, encoder, team, processes)
            for job, read in zip(jobs, tables, strict=True)
        ]
        team.lead(lambda: _give_names(jobs))
    return made


def _make_one(
    job: Job, tables: Sequence[Table], encoder: Encoder, team: Team, processes: int
) -> Made:
    """Every rank: make all of a job in its scratch folder."""
    recipe = job.recipe
    own = replace(
        encoder, min_characters=recipe.min_characters, heldout_below=heldout_below(recipe)
    )
    parts = team.each(lambda: _encode(tables, own, team, processes, job.partial / WORK))
    files = [name for part in parts for name in part]
    return team.lead(lambda: _finish(job, tables, own, files))


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _enter(stack: ExitStack, jobs: Sequence[Job]) -> None:
    for job in jobs:
        stack.enter_context(_scratch(job.out))


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, of this prepare alone, that is gone at the end.

    Raises UserError while another prepare makes `out`.
    """
    partial, path = _partial(out), out.with_name(f"{out.name}.lock")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):  # held, or removed by the one that held it
            ours = False
        if not ours:
            raise UserError(f"{out}: another prepare is making it; wait for that one to end")
        try:
            require_only(partial, {*CORPUS_NAMES, WORK, MADE}, "is in the way of a scratch folder")
            make_fresh_folder(partial)  # without what one that was killed has left
            try:
                yield partial
            finally:
                discard(partial)
        finally:
            path.unlink(missing_ok=True)


def _cores() -> int:
    """Cores this process may use, where the system tells; else all of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin(jobs: Sequence[Job], sibling: Made | None) -> tuple[list[list[Table]], Encoder]:
    """Rank 0: list the documents of each job and settle the tokenizer."""
    tables = [_read_tables(job) for job in jobs]
    recipe, folder = jobs[0].recipe, jobs[0].partial / TOKENIZER_FOLDER
    if sibling is not None and recipe.tokenizer.kind == "bpe":
        known = sibling.corpora[0].folder
        tokenizer: Tokenizer = load_tokenizer(known)
        shutil.copytree(known / TOKENIZER_FOLDER, folder)
    else:
        folder.mkdir()
        tokenizer = _make_tokenizer(jobs, tables)
        tokenizer.save(folder)
    return tables, Encoder.of(tokenizer, folder, recipe.min_characters, heldout_below(recipe))


def _read_tables(job: Job) -> list[Table]:
    return [
        replace(read_table(place, job.partial / WORK / f"input-{i}"), output=output)
        for i, (output, place) in enumerate(job.recipe.named_inputs)
    ]


def _make_tokenizer(jobs: Sequence[Job], tables: Sequence[Sequence[Table]]) -> Tokenizer:
    wanted: TokenizerConfig = jobs[0].recipe.tokenizer
    if wanted.kind == "hf":
        return load_hf(wanted.path or "", wanted.eod_token, wanted.bos)
    if wanted.kind == "bytes":
        return ByteTokenizer()
    if wanted.kind == "infowindow":
        return InfoWindowTokenizer.load(Path(wanted.path or ""), wanted.vocab_size)
    print(f"training a BPE of {wanted.vocab_size} ids", file=sys.stderr, flush=True)
    below = max(heldout_below(job.recipe) for job in jobs)
    texts = (_train_texts(job.recipe, read, below) for job, read in zip(jobs, tables, strict=True))
    return train_bpe(chain.from_iterable(texts), wanted.vocab_size or 0)


def _train_texts(recipe: Recipe, tables: Sequence[Table], heldout_below: int) -> Iterator[str]:
    """The texts that will be trained on: a tokenizer must not have seen held-out documents.

    `heldout_below` is the largest of the recipes that are prepared together.
    """
    seen: set[tuple[int, int]] = set()
    opened = [table.open().with_format("arrow") for table in tables]
    bar = progress(sum(map(len, opened)), "reading for the BPE", " documents")
    for table, rows in zip(tables, opened, strict=True):
        for begin in range(0, len(rows), _READ_ROWS):
            numbers = range(begin, min(begin + _READ_ROWS, len(rows)))
            bar.update(len(numbers))
            for raw, _ in read_documents(table, numbers, rows[begin : numbers.stop]):
                verdict, text = text_of(raw, recipe.min_characters)
                key = hash_of(raw)
                is_new = not recipe.deduplicate or key not in seen
                seen.add(key)
                if verdict == GOOD and is_new and key[0] >= heldout_below:
                    yield text
    bar.close()


def _encode(
    tables: Sequence[Table], encoder: Encoder, team: Team, processes: int, work: Path
) -> list[str]:
    """Every rank: tokenize this rank's range of all documents; the Arrow files, in order."""
    import datasets

    if team.rank:
        datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if processes > 1 else "true"
    counts = [len(table.open()) for table in tables]
    mine = team.share_of(sum(counts))
    files: list[str] = []
    first = 0
    for i, (table, count) in enumerate(zip(tables, counts, strict=True)):
        rows = range(max(0, mine.start - first), min(count, mine.stop - first))
        out = work / f"tokens-{i}-rank-{team.rank}.arrow"
        files += encode_rows(table, rows, encoder, processes, out, f"tokenizing {table.label}")
        first += count
    return files


def _finish(job: Job, tables: Sequence[Table], encoder: Encoder, files: Sequence[str]) -> Made:
    """Rank 0: write every corpus of a job, ready to get the name of its folder."""
    recipe, tokenizer = job.recipe, encoder.tokenizer()
    fates = decide(recipe, tables, files)
    outputs, left_out = _with_text(recipe, outputs_of(recipe, tables, files), fates)
    trips, skipped = [], []
    for i, output in enumerate(outputs.corpora):
        documents = outputs.documents(i)
        trips.append(round_trip(output.label, recipe, tables, tokenizer, fates.among(documents)))
        skipped.append(skipped_of(fates, documents, tables))
    places = [output.name if recipe.makes_several else "" for output in outputs.corpora]
    folders = [job.partial / MADE / place for place in places]
    for folder in folders:
        folder.mkdir(parents=True)
    write_shards(folders, outputs, fates, files, token_dtype(tokenizer.vocab_size))
    shutil.rmtree(job.partial / WORK)
    corpora = []
    for i, folder in enumerate(folders):
        if tokenizer.kind != "bytes":
            shutil.copytree(encoder.folder, folder / TOKENIZER_FOLDER)
        part = fates.among(outputs.documents(i))
        facts = corpus_facts(
            outputs.corpora[i], folder, tokenizer, part, trips[i], skipped[i], job.identity
        )
        write_file(folder / CORPUS_FILE, json.dumps(facts, indent=1) + "\n")
        corpora.append(Prepared(job.out / places[i], facts, reused=False))
    made = Made(job.out, tuple(corpora), recipe.makes_several, left_out)
    if made.several:
        write_file(job.partial / MADE / SET_FILE, set_content(recipe, job.identity, made))
    return made


def _with_text(recipe: Recipe, outputs: Outputs, fates: Fates) -> tuple[Outputs, dict[str, str]]:
    """The corpora with text to train on, and why sources have none.

    Raises UserError for a corpus without, where it is not one source of several.
    """
    if not outputs.corpora:
        raise UserError(f"recipe {recipe.name}: no document was read; give it more text")
    reasons = {
        i: nothing_to_train_on(fates, outputs.documents(i)) for i in range(len(outputs.corpora))
    }
    left_out = {i: reason for i, reason in reasons.items() if reason is not None}
    if left_out and (not recipe.is_split or len(left_out) == len(reasons)):
        i, reason = next(iter(left_out.items()))
        raise UserError(f"{outputs.corpora[i].label}: {reason}; give it more text")
    kept = [i for i in reasons if i not in left_out]
    named = {outputs.corpora[i].source or "": reason for i, reason in left_out.items()}
    return outputs.only(kept), named


def _give_names(jobs: Sequence[Job]) -> None:
    for job in jobs:
        _give_name(job.partial / MADE, job.out)


def _give_name(made: Path, out: Path) -> None:
    """Put the finished folder in place; an old corpus leaves only then."""
    old = unfinished_file(out)
    if os.path.lexists(out):
        os.replace(out, old)
    os.replace(made, out)
    discard(old)
