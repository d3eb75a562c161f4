"""Walk of a page's tar members, every header checked. Bytes in, (offset, length) out: nothing is copied or unpacked.

POSIX ustar with the GNU and PAX extensions that other writers use (long names, large sizes).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

__all__ = ["TarError", "TarSample", "walk"]

BLOCK = 512
# name, size, checksum, type, first byte of the prefix
HEADER = struct.Struct("100s24x12s12x8sB188xB")
REGULAR = (0x30, 0x00)  # "0", and the NUL of old writers
DIRECTORY, LONG_NAME, PAX, PAX_GLOBAL = 0x35, 0x4C, 0x78, 0x67
BASE_256 = 0x80  # First byte of a size that does not fit in octal digits.
MAX_EXTENSION_BYTES = 1 << 16  # A long name or PAX record larger than this is an attack, not a name.


class TarError(ValueError):
    """The bytes are not the tar members that the manifest promises."""

    def __init__(self, reason: str, offset: int, text: str) -> None:
        super().__init__(f"byte {offset:,}: {text}")
        self.reason, self.offset = reason, offset


@dataclass(slots=True)
class TarSample:
    """One sample: its key and where each member's bytes lie in the page, by extension."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def walk(page: memoryview) -> tuple[list[TarSample], TarError | None]:
    """The samples of a page, and the damage that ended the walk early, if any: samples before it are whole."""
    walker = _Walk(page)
    try:
        walker.run()
    except TarError as error:
        del walker.samples[-1:]  # The damage may lie inside the last one.
        problem: TarError | None = error
    else:
        problem = None
    wrong = walker.first_bad_checksum()
    if wrong is not None:
        # Its name cannot be trusted: it may have been a member of the sample before, also where an extension header
        # comes between, which counts as the sample's before it.
        del walker.samples[walker.owners[max(0, wrong - 1)] :]
        problem = TarError("tar_checksum", walker.headers[wrong], "tar header checksum is wrong")
    return walker.samples, problem


class _Walk:
    def __init__(self, page: memoryview) -> None:
        self.page = page
        self.samples: list[TarSample] = []
        self.headers: list[int] = []  # Offset of each header,
        self.checksums: list[bytes] = []  # the checksum it states,
        self.owners: list[int] = []  # and the sample it belongs to.
        self._prefix = b"\0"  # Of every member name of the current sample: its key and the first dot.
        self._long_name, self._long_size = b"", -1  # Set by an extension header for the member after it.

    def run(self) -> None:
        page, end, offset = self.page, len(self.page), 0
        while offset < end:
            if end - offset < BLOCK:
                raise TarError("tar_truncated", offset, f"{end - offset} bytes left where a tar header has {BLOCK}")
            name, digits, checksum, kind, prefix = HEADER.unpack_from(page, offset)
            if not name[0] and not any(page[offset : offset + BLOCK]):
                return  # End of archive.
            size = self._long_size if self._long_size >= 0 else _size(digits, offset)
            body = offset + BLOCK
            following = body + (size + BLOCK - 1) // BLOCK * BLOCK
            if following > end:
                raise TarError("tar_truncated", offset, f"a member of {size:,} bytes ends after the page's {end:,}")
            self.headers.append(offset)
            self.checksums.append(checksum)
            self.owners.append(max(0, len(self.samples) - 1))
            if kind in REGULAR:
                name = self._long_name or name.partition(b"\0")[0]
                if prefix and not self._long_name and bytes(page[offset + 257 : offset + 263]) == b"ustar\0":
                    name = bytes(page[offset + 345 : offset + 500]).partition(b"\0")[0] + b"/" + name
                self._long_name, self._long_size = b"", -1
                self._member(name, offset, size)
            elif kind in (PAX, LONG_NAME):
                self._extension(kind, body, size)
            elif kind == DIRECTORY:
                self._long_name, self._long_size = b"", -1  # They were the folder's.
            elif kind != PAX_GLOBAL:
                raise TarError("tar_unsafe", offset, f"member type {chr(kind)!r} (link, device or sparse file)")
            offset = following

    def _member(self, name: bytes, offset: int, size: int) -> None:
        if not name.startswith(self._prefix):
            folder, slash, base = name.rpartition(b"/")
            stem, dot, _ = base.partition(b".")
            if not dot or not stem:
                return  # As the webdataset package does: such a member belongs to no sample.
            if name[0] == ord("/") or b".." in folder.split(b"/"):
                raise TarError("tar_unsafe", offset, f"member name {name!r} leaves the archive")
            key = folder + slash + stem
            self._prefix = key + dot
            self.samples.append(TarSample(_text(key, offset)))
        members = self.samples[-1].members
        extension = _text(name[len(self._prefix) :], offset).lower()
        if extension in members:
            raise TarError("tar_duplicate", offset, f"sample {self.samples[-1].key!r} has two members {extension!r}")
        members[extension] = (offset + BLOCK, size)
        self.owners[-1] = len(self.samples) - 1

    def _extension(self, kind: int, body: int, size: int) -> None:
        if size > MAX_EXTENSION_BYTES:
            raise TarError("tar_unsafe", body - BLOCK, f"a header extension of {size:,} bytes")
        record = bytes(self.page[body : body + size])
        if kind == LONG_NAME:
            self._long_name = record.rstrip(b"\0")
        else:
            name, self._long_size = _pax(record, body)
            self._long_name = name or self._long_name

    def first_bad_checksum(self) -> int | None:
        """Index of the first header whose checksum does not hold; all are summed in one call."""
        if not self.headers:
            return None
        blocks = np.frombuffer(self.page, np.uint8)[: len(self.page) // BLOCK * BLOCK].reshape(-1, BLOCK)
        chosen = blocks[np.array(self.headers) // BLOCK]
        # The checksum field itself counts as eight spaces.
        sums = chosen.sum(axis=1, dtype=np.int64) - chosen[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
        for index, (total, stated) in enumerate(zip(sums.tolist(), self.checksums, strict=True)):
            try:
                if int(stated.partition(b"\0")[0], 8) != total:
                    return index
            except ValueError:
                return index
        return None


def _size(digits: bytes, offset: int) -> int:
    if digits[0] == BASE_256:
        return int.from_bytes(digits[1:], "big")
    try:
        size = int(digits.partition(b"\0")[0], 8)
    except ValueError:
        size = -1
    if size < 0:
        raise TarError("tar_header", offset, f"member size {digits!r} is not a number")
    return size


def _text(name: bytes, offset: int) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise TarError("tar_header", offset, f"member name {name[:40]!r} is not UTF-8") from None


def _pax(record: bytes, offset: int) -> tuple[bytes, int]:
    """Path and size that a PAX record sets: b"", -1 where it sets none."""
    name, size, at = b"", -1, 0
    while at < len(record):
        length, space, _ = record[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 2 < int(length) <= len(record) - at:
            raise TarError("tar_header", offset, "malformed PAX record")
        keyword, _, value = record[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if keyword.startswith(b"GNU.sparse"):
            raise TarError("tar_unsafe", offset, "a sparse file")
        if keyword == b"path":
            name = value
        elif keyword == b"size":
            if not value.isdigit():
                raise TarError("tar_header", offset, f"member size {value[:20]!r} is not a number")
            size = int(value)
        at += int(length)
    return name, size
