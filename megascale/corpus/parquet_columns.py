"""The columns of texts and their sources in Parquet files, and nothing else of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from megascale.corpus.compressed_files import HEAD_BYTES, compression_of, other_format
from megascale.errors import UserError
from megascale.reading import open_regular, require_regular

MAGIC = b"PAR1"
_BATCH_ROWS = 1024
_MOST_NAMES = 12
"""Of columns, in a message."""


_OPTIONS = ("text_column", "source_column")


def text_rows(path: str, columns: Sequence[str], bar: Any) -> Iterator[tuple[bytes | None, ...]]:
    """The texts of a Parquet file in order, and their sources where that column is given too.

    `columns` has the text's and perhaps the source's: each the name of a column, or the path of a
    field in nested ones, as `meta.text`. Other columns are not read and may be of any type. `bar`
    counts rows. Raises UserError for a file that cannot be read or has no such text.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with open_regular(path) as raw:
            head = raw.read(HEAD_BYTES)
        if (compression := compression_of(head)) is not None:
            raise UserError(f"{path}: is packed by {compression}; unpack it")
        if not head.startswith(MAGIC) and (other := other_format(head)) is not None:
            raise UserError(f"{path}: is {other}")
        with parquet.ParquetFile(path) as file:
            steps = [_steps_to(file.schema_arrow, column) for column in columns]
            for option, column, names in zip(_OPTIONS, columns, steps, strict=False):
                _require_text(path, file.schema_arrow, option, column, names)
            wanted = list(dict.fromkeys(".".join(names) for names in steps))
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                bar.update(len(batch))
                yield from zip(*(_texts(batch, names) for names in steps), strict=True)
    except (pa.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: cannot be read as parquet: {reason}; mend it or name it in exclude"
        ) from None


def count_rows(path: str) -> int:
    """Rows of a Parquet file, by its footer; 0 where that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        require_regular(path)
        return int(parquet.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return 0


def _steps_to(schema: Any, column: str) -> list[str]:
    """The names from a top-level column to the text: one, unless it lies in nested columns."""
    return [column] if column in schema.names else column.split(".")


def _require_text(path: str, schema: Any, option: str, column: str, steps: list[str]) -> None:
    import pyarrow as pa

    kind = pa.struct(list(schema))
    for step in steps:
        same = kind.get_all_field_indices(step) if pa.types.is_struct(kind) else []
        if len(same) > 1:
            raise UserError(
                f"inputs: {path} has {len(same)} columns named '{step}'; write the file again with "
                f"a name for each, or set {option} to another"
            )
        if not same:
            raise UserError(
                f"inputs: {path} has no column '{column}'; {_columns_with_text(schema, option)}"
            )
        kind = kind.field(step).type
    if not _holds_text(kind):
        raise UserError(
            f"inputs: column '{column}' of {path} holds {kind} and no text; "
            f"{_columns_with_text(schema, option)}"
        )


def _columns_with_text(schema: Any, option: str) -> str:
    """What `option` can be: the columns that hold text, nested ones by their path."""
    found = list(islice(_text_paths(schema, ""), _MOST_NAMES))
    if not found:
        return f"no column holds text; they are {', '.join(schema.names[:_MOST_NAMES])}"
    return f"set {option} to one that holds text: {', '.join(found)}"


def _text_paths(parent: Any, prefix: str) -> Iterator[str]:
    """Paths of the fields with text in a schema or a struct."""
    import pyarrow as pa

    for field in parent:
        if pa.types.is_struct(field.type):
            yield from _text_paths(field.type, f"{prefix}{field.name}.")
        elif _holds_text(field.type):
            yield f"{prefix}{field.name}"


def _holds_text(kind: Any) -> bool:
    import pyarrow as pa

    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(accepts(plain) for accepts in _text_types())


def _text_types() -> list[Any]:
    from pyarrow import types

    names = "string large_string string_view binary large_binary binary_view null".split()
    return [getattr(types, f"is_{name}") for name in names if hasattr(types, f"is_{name}")]


def _texts(batch: Any, steps: list[str]) -> Iterator[bytes | None]:
    import pyarrow as pa
    import pyarrow.compute as compute

    values = batch.column(steps[0])
    for step in steps[1:]:
        values = compute.struct_field(values, step)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    for value in values.cast(pa.large_binary()):
        yield value.as_py()
