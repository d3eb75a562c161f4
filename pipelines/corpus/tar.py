"""One shard: a plain WebDataset tar with deterministic bytes, and the row that each of its samples gets."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.corpus.pages import close_pages

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ShardContent", "ShardWriter", "sample_key"]

# Samples whose TarInfo objects tarfile keeps although nobody asks for them; dropped so that memory stays flat.
FORGET_EVERY = 1024


def sample_key(path: str) -> str:
    """16 hex digits of sha256(relative source path): no dot, no slash, at which foreign readers would cut it."""
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ShardContent:
    bytes: int
    sha256: str
    page_offset: list[int]
    page_length: list[int]
    page_rows: list[int]
    rows: pa.Table  # One row a sample, in tar order: see ROW_FIELDS.


# offset and bytes are those of the whole sample in the tar, headers and padding included: one ranged GET reads it.
# content is the start of the sha256 of the image file: equal content means a duplicate.
ROW_FIELDS = ("row", "offset", "bytes", "width", "height", "label", "key", "source", "content")


def row_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("row", pa.int32()),
            ("offset", pa.int64()),
            ("bytes", pa.int64()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("label", pa.int32()),
            ("key", pa.string()),
            ("source", pa.string()),
            ("content", pa.binary(16)),
        ]
    )


class _Hashed:
    """A sink that hashes what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)


class ShardWriter:
    """Writes samples one after another; `close` returns what the manifest has to know.

    A context manager, so that an abandoned writer does not write its end to a file that is closed already.
    """

    def __init__(self, file: BinaryIO) -> None:
        from webdataset import TarWriter

        self._sink = _Hashed(file)
        # Fixed owner, mode and time: the bytes depend on the samples alone.
        self._tar: Any = TarWriter(self._sink, user="vit", group="vit", mode=0o444, mtime=0, encoder=False)
        # TarWriter means USTAR but opens with tarfile's default: the same headers at twice the cost.
        self._tar.tarstream.format = tarfile.USTAR_FORMAT
        self._columns: dict[str, list[Any]] = {name: [] for name in ROW_FIELDS}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._tar.close()

    def add(self, *, path: str, image: bytes, extension: str, width: int, height: int, label: int) -> None:
        """`image` goes in as it is; `extension` is jpg, png or webp."""
        key = sample_key(path)
        described = {"path": path, "width": width, "height": height, "label": label}
        start = self._tar.tarstream.offset
        self._tar.write(
            {
                "__key__": key,
                "cls": b"%d" % label,
                "json": json.dumps(described, sort_keys=True, separators=(",", ":")).encode(),
                extension: image,
            }
        )
        columns = self._columns
        row = len(columns["row"])
        length = self._tar.tarstream.offset - start
        content = hashlib.sha256(image).digest()[:16]
        values = (row, start, length, width, height, label, key, path, content)
        for name, value in zip(ROW_FIELDS, values, strict=True):
            columns[name].append(value)
        if row % FORGET_EVERY == 0:
            self._tar.tarstream.members.clear()

    def close(self) -> ShardContent:
        import pyarrow as pa

        self._tar.close()
        offsets, lengths, rows = close_pages(self._columns["bytes"])
        table = pa.table(self._columns, schema=row_schema())
        return ShardContent(self._sink.bytes, self._sink.sha256.hexdigest(), offsets, lengths, rows, table)
