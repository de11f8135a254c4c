"""Text to a corpus folder: list the documents, tokenize them on many processes, merge.

Every rank tokenizes one contiguous range of the documents; rank 0 then drops duplicates, parts
held-out from train, and writes the shards. What happens to a document follows from its text and
from the documents before it, so the files are the same bytes on any number of processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megascale.corpus.encode import GOOD, Encoder, encode_rows, hash_of, text_of
from megascale.corpus.facts import corpus_facts
from megascale.corpus.inputs import Table, input_files, read_document, read_table
from megascale.corpus.mpi_processes import Team
from megascale.corpus.outcomes import (
    Fates,
    decide,
    heldout_below,
    round_trip,
)
from megascale.corpus.recipe import Recipe, TokenizerConfig
from megascale.corpus.shards import writing
from megascale.corpus.sources import (
    CORPUS_FILE,
    FORMAT,
    PARTS,
    TOKENIZER_FOLDER,
    describe,
    read_corpus_file,
)
from megascale.corpus.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    load_hf,
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
    whole_file,
    write_file,
)
from megascale.runtime.progress import progress

WORK = "work"
"""Folder of intermediate files in an unfinished corpus."""
CORPUS_NAMES = frozenset(
    {CORPUS_FILE, TOKENIZER_FOLDER, "cache", "heldout.bytes.npy"}
    | {f"{part}{ending}" for part in PARTS for ending in (".bin", ".idx")}
)
"""All that a corpus folder holds, with what readers keep beside its shards."""
_READ_ROWS = 256


@dataclass(frozen=True)
class Prepared:
    """A corpus folder and how it came to be."""

    folder: Path
    facts: dict[str, Any]
    """The content of corpus.json."""
    reused: bool
    """It was there already, made from the same recipe and inputs."""


def prepare(
    recipe: Recipe, out: str | Path, processes: int | None = None, force: bool = False
) -> Prepared:
    """Make the corpus folder `out`, or find it made from the same recipe and inputs.

    `processes` tokenize on this machine; None: one per core, and under `mpiexec` one per rank.
    `force` replaces a corpus that differs. The folder appears whole or not at all. Raises
    UserError on every rank for inputs that cannot be read and where no text is left.
    """
    out, team = Path(os.path.abspath(out)), Team()  # `.` has no name to put others beside
    if processes is None:
        processes = _cores() if team.size == 1 else 1
    if processes < 1:
        raise UserError(f"--processes {processes} must be at least 1")
    identity, found = team.lead(lambda: _look(recipe, out, force))
    if found is not None:
        return Prepared(out, found, reused=True)
    with ExitStack() as stack:
        partial = team.lead(lambda: stack.enter_context(_scratch(out)))
        tables, encoder = team.lead(lambda: _begin(recipe, partial))
        parts = team.each(lambda: _encode(tables, encoder, team, processes, partial / WORK))
        facts = team.lead(lambda: _finish(recipe, out, tables, encoder, parts, identity))
    return Prepared(out, facts, reused=False)


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, of this prepare alone, that is gone at the end.

    Raises UserError while another prepare makes `out`.
    """
    partial, path = (out.with_name(f"{out.name}.{ending}") for ending in ("partial", "lock"))
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
            require_only(partial, {*CORPUS_NAMES, WORK}, "is in the way of a scratch folder")
            make_fresh_folder(partial)  # without what one that was killed has left
            try:
                yield partial
            finally:
                discard(partial)
        finally:
            path.unlink(missing_ok=True)


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


def _cores() -> int:
    """Cores this process may use, where the system tells; else all of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _look(recipe: Recipe, out: Path, force: bool) -> tuple[str, dict[str, Any] | None]:
    """The fingerprint of what is asked for, and the corpus that has it, where there is one."""
    wanted = fingerprint(recipe)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return wanted, None
    if not (out / CORPUS_FILE).is_file():
        raise UserError(f"{out}: exists and is no corpus; give another folder with --out")
    if force:
        require_only(out, CORPUS_NAMES, "would be deleted by --force")
        _require_inputs_elsewhere(recipe, out)
        return wanted, None
    try:
        describe(str(out))
        facts = dict(read_corpus_file(out))
    except UserError as error:
        raise UserError(f"{error} with --force") from None
    if facts.get("source_fingerprint") == wanted:
        return wanted, facts
    if facts["tokenizer"]["kind"] == "hf" and "bos_id" not in facts["tokenizer"]:
        raise UserError(
            f"{out}: an earlier version made this corpus, without the token that begins a document "
            "(tokenizer.bos); train on it as it is, or make it anew with --force"
        )
    raise UserError(
        f"{out}: holds a corpus from another recipe or other inputs; replace it with --force or "
        "give another folder with --out"
    )


def _require_inputs_elsewhere(recipe: Recipe, out: Path) -> None:
    for name in (name for one in recipe.inputs for name in input_files(one)):
        if Path(name).resolve().is_relative_to(out.resolve()):
            raise UserError(f"{name}: an input below {out}, which --force replaces; move it away")


def fingerprint(recipe: Recipe) -> str:
    """What a corpus depends on: the recipe, and name, size and time of change of its inputs."""
    names = [name for one in recipe.inputs for name in input_files(one)]
    path = recipe.tokenizer.path
    if path is not None and Path(path).exists():
        here = Path(path)
        names += sorted(str(file) for file in here.iterdir()) if here.is_dir() else [path]
    stats = [(name, os.stat(name)) for name in names]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    plain = asdict(replace(recipe, description="", licence=""))
    if recipe.tokenizer.kind != "hf":
        del plain["tokenizer"]["bos"]  # as in corpora of before that option
    return hashlib.sha256(json.dumps([FORMAT, plain, files]).encode()).hexdigest()


def _begin(recipe: Recipe, partial: Path) -> tuple[list[Table], Encoder]:
    """Rank 0: list the documents and settle the tokenizer."""
    folder = partial / TOKENIZER_FOLDER
    folder.mkdir()
    tables = [read_table(one, partial / WORK / f"input-{i}") for i, one in enumerate(recipe.inputs)]
    tokenizer = _make_tokenizer(recipe, tables)
    tokenizer.save(folder)
    encoder = Encoder.of(tokenizer, folder, recipe.min_characters, heldout_below(recipe))
    return tables, encoder


def _make_tokenizer(recipe: Recipe, tables: Sequence[Table]) -> Tokenizer:
    wanted: TokenizerConfig = recipe.tokenizer
    if wanted.kind == "hf":
        return load_hf(wanted.path or "", wanted.eod_token, wanted.bos)
    if wanted.kind == "bytes":
        return ByteTokenizer()
    if wanted.kind == "infowindow":
        return InfoWindowTokenizer.load(Path(wanted.path or ""), wanted.vocab_size)
    print(f"training a BPE of {wanted.vocab_size} ids", file=sys.stderr, flush=True)
    return train_bpe(_train_texts(recipe, tables), wanted.vocab_size or 0)


def _train_texts(recipe: Recipe, tables: Sequence[Table]) -> Iterator[str]:
    """The texts that will be trained on: a tokenizer must not have seen held-out documents."""
    seen: set[tuple[int, int]] = set()
    opened = [table.open().with_format("arrow") for table in tables]
    bar = progress(sum(map(len, opened)), "reading for the BPE", " documents")
    for table, rows in zip(tables, opened, strict=True):
        for begin in range(0, len(rows), _READ_ROWS):
            bar.update(min(_READ_ROWS, len(rows) - begin))
            batch = rows[begin : begin + _READ_ROWS].column(table.column).cast("large_binary")
            for i, value in enumerate(batch.to_pylist()):
                raw = read_document(table, begin + i, value or b"")
                verdict, text = text_of(raw, recipe.min_characters)
                key = hash_of(raw)
                is_new = not recipe.deduplicate or key not in seen
                seen.add(key)
                if verdict == GOOD and is_new and key[0] >= heldout_below(recipe):
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


def _finish(
    recipe: Recipe,
    out: Path,
    tables: Sequence[Table],
    encoder: Encoder,
    parts: Sequence[Sequence[str]],
    identity: str,
) -> dict[str, Any]:
    """Rank 0: write the shards and corpus.json, and give the folder its name."""
    partial = out.with_name(f"{out.name}.partial")
    files = [name for part in parts for name in part]
    fates, tokenizer = decide(recipe, tables, files), encoder.tokenizer()
    trip = round_trip(recipe, tables, tokenizer, fates)
    _write_shards(partial, files, fates, token_dtype(tokenizer.vocab_size))
    shutil.rmtree(partial / WORK)
    if tokenizer.kind == "bytes":
        (partial / TOKENIZER_FOLDER).rmdir()
    facts = corpus_facts(recipe, partial, tokenizer, fates, trip, identity)
    write_file(partial / CORPUS_FILE, json.dumps(facts, indent=1) + "\n")
    _give_name(partial, out)
    return facts


def _write_shards(folder: Path, files: Sequence[str], fates: Fates, dtype: np.dtype[Any]) -> None:
    document = 0
    with (
        writing(folder / "train", dtype) as train,
        writing(folder / "heldout", dtype) as heldout,
        progress(len(fates.keep), "writing shards", " documents") as bar,
    ):
        for tokens in _token_bytes(files):
            if fates.keep[document]:
                writer = heldout if fates.heldout[document] else train
                writer.add(np.frombuffer(tokens, dtype=dtype))
            document += 1
            bar.update()
    with whole_file(folder / "heldout.bytes.npy") as file:
        np.save(file, fates.returned[fates.heldout])


def _token_bytes(files: Sequence[str]) -> Iterator[bytes]:
    from datasets import Dataset

    for file in files:
        for batch in Dataset.from_file(file).data.to_batches():
            yield from (value.as_buffer() for value in batch.column("tokens"))


def _give_name(partial: Path, out: Path) -> None:
    """Put the finished folder in place; an old corpus leaves only then."""
    old = unfinished_file(out)
    if os.path.lexists(out):
        os.replace(out, old)
    os.replace(partial, out)
    discard(old)
