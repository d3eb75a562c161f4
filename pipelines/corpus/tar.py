"""One shard: a plain WebDataset tar with deterministic bytes, and the row that each of its samples gets."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.corpus.pages import close_pages

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ShardContent", "ShardWriter", "sample_key"]


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
BLOCK = 512
RECORD = 20 * BLOCK  # An archive is padded to whole records.


def row_schema(multi_label: bool = False) -> pa.Schema:
    """`labels`, a list, in place of `label` where samples have several."""
    import pyarrow as pa

    return pa.schema(
        [
            ("row", pa.int32()),
            ("offset", pa.int64()),
            ("bytes", pa.int64()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("labels", pa.list_(pa.int32())) if multi_label else ("label", pa.int32()),
            ("key", pa.string()),
            ("source", pa.string()),
            ("content", pa.binary(16)),
        ]
    )


class _Stream:
    """What TarWriter writes to in place of a tarfile: the same bytes for plain members, at a tenth of the cost."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._headers: dict[str, bytearray] = {}  # By extension: name, size and checksum are filled in.
        self.sha256 = hashlib.sha256()
        self.offset = 0

    def addfile(self, member: tarfile.TarInfo, content: io.BytesIO) -> None:
        data = content.getbuffer()
        self._write(self._header(member))
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))

    def _header(self, member: tarfile.TarInfo) -> bytes:
        extension = member.name.rpartition(".")[2]
        header = self._headers.get(extension)
        if header is None:
            header = bytearray(member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
            self._headers[extension] = header
            return bytes(header)
        name = member.name.encode()  # KEY.extension: always short, always of one length.
        header[: len(name)] = name
        header[124:136] = b"%011o\0" % member.size
        header[148:156] = b" " * 8  # As which the checksum counts itself.
        # The sum of the bytes: the lower half of Adler-32 is 1 + sum, and 512 bytes of ASCII stay below its modulus.
        header[148:156] = b"%06o\0 " % ((zlib.adler32(header) & 0xFFFF) - 1)
        return bytes(header)

    def _write(self, data: bytes | memoryview) -> None:
        self.sha256.update(data)
        self.offset += len(data)
        self._file.write(data)

    def close(self) -> None:
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.offset % RECORD))


class ShardWriter:
    """Writes samples one after another; `close` returns what the manifest has to know."""

    def __init__(self, file: BinaryIO, *, multi_label: bool = False) -> None:
        from webdataset import TarWriter

        # Fixed owner, mode and time: the bytes depend on the samples alone.
        self._tar: Any = TarWriter(io.BytesIO(), user="vit", group="vit", mode=0o444, mtime=0, encoder=False)
        self._stream = self._tar.tarstream = _Stream(file)
        self._multi_label = multi_label
        self._columns: dict[str, list[Any]] = {name: [] for name in ROW_FIELDS}

    def add(
        self, *, path: str, image: bytes, extension: str, width: int, height: int, label: int | Sequence[int]
    ) -> None:
        """`image` goes in as it is; `extension` is jpg, png or webp. Several labels stand in KEY.json alone."""
        key = sample_key(path)
        described: dict[str, Any] = {"path": path, "width": width, "height": height}
        members: dict[str, Any] = {"__key__": key, extension: image}
        if isinstance(label, int):
            described["label"] = label
            members["cls"] = b"%d" % label
        else:
            described["labels"] = list(label)
        members["json"] = json.dumps(described, sort_keys=True, separators=(",", ":")).encode()
        start = self._stream.offset
        self._tar.write(members)
        columns = self._columns
        length = self._stream.offset - start
        content = hashlib.sha256(image).digest()[:16]
        values = (len(columns["row"]), start, length, width, height, label, key, path, content)
        for name, value in zip(ROW_FIELDS, values, strict=True):
            columns[name].append(value)

    def close(self) -> ShardContent:
        import pyarrow as pa

        self._stream.close()
        offsets, lengths, rows = close_pages(self._columns["bytes"])
        columns = dict(self._columns)
        if self._multi_label:
            columns["labels"] = columns.pop("label")
        table = pa.table(columns, schema=row_schema(self._multi_label))
        return ShardContent(self._stream.offset, self._stream.sha256.hexdigest(), offsets, lengths, rows, table)
