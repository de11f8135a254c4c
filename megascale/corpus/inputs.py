"""From the inputs of a recipe to tables of documents, not yet read or parsed where that is slow.

A table is a list of Arrow files with one row per document. Reading a file and parsing a JSON
line is left to the processes that tokenize.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal

from megascale.corpus.compressed_files import other_format, reading
from megascale.corpus.parquet_columns import count_rows, text_rows
from megascale.corpus.recipe import InputConfig
from megascale.corpus.source_names import checked_source
from megascale.errors import UserError
from megascale.parsing import parse_text
from megascale.runtime.files import broken_link
from megascale.runtime.progress import progress

_BATCH_BYTES = 1 << 24
_MOST_KEYS = 8
"""Of a line, that are named in a message."""
_Row = tuple[int, bytes, bytes | None]
"""Number, content and source of a document."""
_UNITS = {"line": "line", "text": "row"}
"""What a row of a file is called."""


@dataclass(frozen=True)
class Table:
    """The documents of one input."""

    label: str
    """What to call the input in messages."""
    content: Literal["path", "line", "text"]
    """What `column` holds: the path of a file, a line of JSON, or the text."""
    column: str
    key: str
    """Key of the text in a line of JSON."""
    arrow_files: tuple[str, ...]
    names: tuple[str, ...] = ()
    """The input file that each Arrow file was made of, where there is one."""
    source: str | None = None
    """Key or column that names the source of a document; None: no document names one."""
    source_in: str = "source"
    """Which column of the Arrow files of texts holds the source."""
    output: str | None = None
    """Name of the output that the documents are of, where the recipe has outputs."""

    def open(self) -> Any:
        """The rows, memory-mapped, as a `datasets.Dataset`."""
        import datasets

        return datasets.concatenate_datasets(
            [datasets.Dataset.from_file(name) for name in self.arrow_files]
        )

    def num_bytes(self) -> int:
        """Bytes of all files, lines of JSON or texts, as they are stored."""
        column = self.open().data.column(self.column)
        if self.content == "path":
            return sum(os.path.getsize(path) for path in column.to_pylist())
        return int(column.nbytes)

    def where(self, row: int, value: bytes) -> str:
        """What to call a row in messages."""
        import datasets

        if self.content == "path":
            return value.decode("utf-8", "replace")
        for name, arrow_file in zip(self.names, self.arrow_files, strict=False):
            rows = datasets.Dataset.from_file(arrow_file)
            if row < len(rows):
                return f"{name} {_UNITS[self.content]} {rows[row]['number']}"
            row -= len(rows)
        return f"{self.label} row {row + 1}"


def input_files(one: InputConfig) -> list[str]:
    """The files an input is read from, in the order of reading; none for a dataset of the hub.

    Raises UserError where a pattern matches nothing.
    """
    if one.kind == "python_stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        kept_out = {"site-packages", "dist-packages", "__pycache__"}
        paths = (p for p in root.rglob("*.py") if not kept_out & set(p.relative_to(root).parts))
        found = sorted(map(str, paths))
    elif one.kind == "dataset":
        found = sorted(str(path) for path in Path(one.name or "").rglob("*")) if _local(one) else []
    else:
        found = sorted({name for pattern in one.paths for name in _matches(pattern)})
    kept = [name for name in found if not any(fnmatch(name, pattern) for pattern in one.exclude)]
    for name in kept if one.paths else ():
        if not os.path.exists(name) and (problem := broken_link(Path(name))) is not None:
            raise UserError(f"inputs: {problem}; mend the link or name it in exclude")
    return [name for name in kept if Path(name).is_file()]


def _local(one: InputConfig) -> bool:
    return one.name is not None and Path(one.name).is_dir()


def _matches(pattern: str) -> list[str]:
    path = str(Path(pattern).expanduser())
    names = glob.glob(path, recursive=True)
    if not names and (problem := broken_link(Path(path))) is not None:
        raise UserError(f"inputs: {problem}; mend the link")
    if not names:
        raise UserError(f"inputs: nothing matches '{pattern}'; give the path of text that is there")
    if names == [path] and os.path.isdir(path):
        raise UserError(f"inputs: '{pattern}' is a folder; name the files in it, e.g. {path}/*")
    return names


def read_table(one: InputConfig, work: Path) -> Table:
    """List the documents of an input in Arrow files below `work`.

    Raises UserError for an input without files, and for what cannot be read.
    """
    if one.kind == "dataset":
        return _through_datasets(one, work)
    files = input_files(one)
    label = "python_stdlib" if one.kind == "python_stdlib" else ", ".join(one.paths)
    if not files:
        raise UserError(f"inputs: {label}: no file is left to read")
    if one.kind == "jsonl":
        with progress(sum(map(os.path.getsize, files)), f"reading {label}", "B") as bar:
            arrow_files = [
                _write_rows(work / f"{i}.arrow", _lines(name, bar)) for i, name in enumerate(files)
            ]
        rows = tuple(arrow_files)
        key, source = one.text_column, one.source_column
        return Table(label, "line", "content", key, rows, tuple(files), source)
    if one.kind == "parquet":
        columns = [one.text_column, *([one.source_column] if one.source_column else [])]
        with progress(sum(map(count_rows, files)), f"reading {label}", " rows") as bar:
            arrow_files = [
                _write_rows(work / f"{i}.arrow", _numbered(text_rows(name, columns, bar)))
                for i, name in enumerate(files)
            ]
        rows = tuple(arrow_files)
        return Table(label, "text", "content", "", rows, tuple(files), one.source_column)
    listing = _write_rows(work / "files.arrow", _numbered([os.fsencode(name)] for name in files))
    return Table(label, "path", "content", "", (listing,))


def _numbered(rows: Iterable[Sequence[bytes | None]]) -> Iterator[_Row]:
    """Rows of a text and perhaps a source, each with its number."""
    for number, (text, *source) in enumerate(rows, 1):
        yield number, text or b"", source[0] if source else None


def _lines(path: str, bar: Any) -> Iterator[_Row]:
    """Each line that is not blank."""
    with reading(path) as (file, raw):
        before = 0
        for number, line in enumerate(file, 1):
            if number == 1 and (other := other_format(line)) is not None:
                raise UserError(f"{path}: is {other}")
            at = raw.tell()
            bar.update(at - before)
            before = at
            if line.strip():
                yield number, line, None


def _write_rows(path: Path, rows: Iterable[_Row]) -> str:
    """Write rows as an Arrow stream, in batches of bounded size."""
    import pyarrow as pa

    columns = [
        ("number", pa.int64()),
        ("content", pa.large_binary()),
        ("source", pa.large_binary()),
    ]
    schema = pa.schema(columns)
    batch: list[_Row] = []
    size = 0

    def write(writer: Any) -> None:
        values = [[row[i] for row in batch] for i in range(len(columns))]
        arrays = [pa.array(value, kind) for value, (_, kind) in zip(values, columns, strict=True)]
        writer.write_batch(pa.record_batch(arrays, schema))
        batch.clear()

    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for row in rows:
            batch.append(row)
            size += len(row[1]) + len(row[2] or b"") + 64
            if size >= _BATCH_BYTES:
                write(writer)
                size = 0
        write(writer)
    return str(path)


def _through_datasets(one: InputConfig, work: Path) -> Table:
    import datasets

    label = str(one.name)
    dataset = _load(one, label)
    for option, column in (
        ("text_column", one.text_column),
        ("source_column", one.source_column),
    ):
        if column is not None:
            _require_text_column(dataset, label, option, column)
    if "[" in one.split:  # a part of its files: copied out, because a table is whole files
        dataset.save_to_disk(str(work / "slice"))
        dataset = datasets.load_from_disk(str(work / "slice"))
    files = tuple(entry["filename"] for entry in dataset.cache_files)
    if not files:
        raise UserError(f"inputs: {label}: no rows")
    return Table(
        label, "text", one.text_column, "", files, (), one.source_column, one.source_column or ""
    )


def _require_text_column(dataset: Any, label: str, option: str, column: str) -> None:
    if column not in dataset.column_names:
        raise UserError(
            f"inputs: {label} has no column '{column}'; set {option} to one of "
            f"{', '.join(dataset.column_names)}"
        )
    kind = dataset.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string", "binary", "large_binary"):
        raise UserError(
            f"inputs: column '{column}' of {label} holds {getattr(kind, 'dtype', kind)} and no "
            f"text; set {option} to one that does"
        )


def _load(one: InputConfig, label: str) -> Any:
    import datasets

    try:
        if _local(one) and list(Path(str(one.name)).rglob("state.json")):
            return _split_of(datasets.load_from_disk(str(one.name)), one)
        return datasets.load_dataset(one.name, one.config, split=one.split)
    except UserError:
        raise
    except Exception as error:  # the readers raise many kinds, of several libraries
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        raise UserError(f"inputs: {label} cannot be read as {one.kind}: {reason}") from None


def _split_of(saved: Any, one: InputConfig) -> Any:
    """What `split` names in a dataset of `save_to_disk`, which cannot be asked for a slice."""
    import datasets

    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if one.split in splits:
        return splits[one.split]
    raise UserError(
        f"inputs: {one.name} has no split '{one.split}'; set split to one of {', '.join(splits)}"
    )


def read_documents(table: Table, rows: Sequence[int], batch: Any) -> list[tuple[bytes, str | None]]:
    """The text of each row as bytes, which may be no UTF-8, and the source that it names.

    `batch` has the Arrow columns of these `rows` of the table. Raises UserError for a file that
    cannot be read, a line that is no JSON with the text, and a source that cannot be a name.
    """
    values = batch.column(table.column).cast("large_binary").to_pylist()
    named: list[Any] = [None] * len(values)
    if table.source is not None and table.content == "text":
        named = batch.column(table.source_in).cast("large_binary").to_pylist()
    return [
        _document(table, row, value or b"", source)
        for row, value, source in zip(rows, values, named, strict=True)
    ]


def _document(table: Table, row: int, value: bytes, source: Any) -> tuple[bytes, str | None]:
    """The text and the source of one row; `source` is that of a table of texts."""
    if table.content == "path":
        with reading(os.fsdecode(value)) as (file, _):
            return file.read(), None
    text = value
    if table.content == "line":
        tree = _parse(table, row, value)
        text = _text_in(table, row, value, tree)
        source = _source_in(table, row, value, tree)
    if table.source is None:
        return text, None
    return text, checked_source(source, table.source, lambda: table.where(row, value))


def _parse(table: Table, row: int, line: bytes) -> Any:
    """The value of a line of JSON; None for a line that is none."""
    try:
        return parse_text(line)
    except JSONDecodeError:
        return None
    except ValueError as error:
        raise UserError(f"{table.where(row, line)}: {error}; leave the line out") from None


def _text_in(table: Table, row: int, line: bytes, tree: Any) -> bytes:
    """The text of a line of JSON; null is empty, as in Parquet."""
    try:
        text = _under(tree, table.key)
    except (KeyError, TypeError):
        text = 0
    if text is None:
        return b""
    if not isinstance(text, str):
        raise UserError(
            f"{table.where(row, line)}: not a JSON object with text under '{table.key}'; mend the "
            f"line or set text_column{_hint(line, tree)}"
        )
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _source_in(table: Table, row: int, line: bytes, tree: Any) -> Any:
    """What a line of JSON has under the key of its source."""
    if table.source is None:
        return None
    try:
        return _under(tree, table.source)
    except (KeyError, TypeError):
        raise UserError(
            f"{table.where(row, line)}: nothing under '{table.source}'; mend the line or set "
            f"source_column{_hint(line, tree)}"
        ) from None


def _hint(line: bytes, value: Any) -> str:
    """What a line seems to be, or has, in place of an object with the text."""
    if not isinstance(value, dict) and b"\r" in line.rstrip(b"\r\n"):
        return r"; its lines end in CR alone: convert them, e.g. with tr '\r' '\n'"
    if line.lstrip().startswith(b"["):
        return "; a JSON array is no JSONL"
    if isinstance(value, dict) and value:
        more = ", ..." if len(value) > _MOST_KEYS else ""
        return f"; its keys are {', '.join(list(value)[:_MOST_KEYS])}{more}"
    return ""


def _under(value: Any, key: str) -> Any:
    """What an object has under `key`, or under its parts in nested objects, as `meta.text`."""
    if key in value or "." not in key:
        return value[key]
    for step in key.split("."):
        value = value[step]
    return value
