"""Tables of a corpus as Parquet objects: one way to write them, to read them, and to see whether one stands."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines import store
from pipelines.corpus.errors import MAKE_AGAIN, ManifestError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["GROUP_ROWS", "encode_table", "holds_table", "read_table", "write_table"]

GROUP_ROWS = 16_384  # Rows of a row group: who wants the rows of one shard reads 1 MB, not the part.
REPEATING = ["shard", "label", "width", "height", "split", "reason", "class"]  # A dictionary makes others larger.


def encode_table(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=GROUP_ROWS, use_dictionary=REPEATING)
    return sink.getvalue()


def write_table(uri: str, table: pa.Table) -> str:
    """Returns the ETag."""
    return store.write(uri, encode_table(table))


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet object, or those of `columns` that it has. Raises ManifestError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(pa.BufferReader(store.read(uri))) as file:
            return file.read(None if columns is None else [name for name in columns if name in file.schema_arrow.names])
    except store.NotFound:
        raise ManifestError(f"{uri} is missing, the corpus is incomplete; {MAKE_AGAIN}") from None
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{uri} is damaged ({error}); {MAKE_AGAIN}") from None


def holds_table(uri: str, table: pa.Table) -> bool:
    """Whether the object is there, whole, and has these rows."""
    try:
        return bool(read_table(uri).equals(table))
    except ManifestError:
        return False
