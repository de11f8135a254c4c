"""The text column of Parquet files, and nothing else of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megascale.corpus.opening import other_format
from megascale.errors import UserError
from megascale.reading import open_regular, require_regular

MAGIC = b"PAR1"
_BATCH_ROWS = 1024


def text_rows(path: str, column: str, bar: Any) -> Iterator[bytes]:
    """The texts of a Parquet file in order; null is empty.

    `column` is the name of a column, or the path of a field in nested ones, as `meta.text`. Other
    columns are not read and may be of any type. `bar` counts rows. Raises UserError for a file that
    cannot be read or has no such text.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with open_regular(path) as raw:
            head = raw.read(8)
        if not head.startswith(MAGIC) and (other := other_format(head)) is not None:
            raise UserError(f"{path}: is {other}")
        with parquet.ParquetFile(path) as file:
            steps = _steps_to(file.schema_arrow, column)
            _require_text(path, file.schema_arrow, column, steps)
            for batch in file.iter_batches(_BATCH_ROWS, columns=[".".join(steps)]):
                bar.update(len(batch))
                yield from _texts(batch, steps)
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


def _require_text(path: str, schema: Any, column: str, steps: list[str]) -> None:
    import pyarrow as pa

    kind = pa.struct(list(schema))
    for step in steps:
        if not pa.types.is_struct(kind) or kind.get_field_index(step) < 0:
            raise UserError(
                f"inputs: {path} has no column '{column}'; set text_column to one of "
                f"{', '.join(schema.names)}"
            )
        kind = kind.field(step).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(accepts(plain) for accepts in _text_types()):
        raise UserError(
            f"inputs: column '{column}' of {path} holds {kind} and no text; set text_column to "
            "one that does"
        )


def _text_types() -> list[Any]:
    from pyarrow import types

    names = "string large_string string_view binary large_binary binary_view null".split()
    return [getattr(types, f"is_{name}") for name in names if hasattr(types, f"is_{name}")]


def _texts(batch: Any, steps: list[str]) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.compute as compute

    values = batch.column(steps[0])
    for step in steps[1:]:
        values = compute.struct_field(values, step)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    for value in values.cast(pa.large_binary()):
        yield value.as_py() or b""
