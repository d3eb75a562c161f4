"""A whole tar as a stream of checked members: front to back, once, hashed on the way, never unpacked to disk.

POSIX ustar with the GNU and PAX extensions of other writers, by the same rules as `pipelines.reader.tar`, which walks
the pages that come of it. What no reader of ours takes (links, devices, sparse files, names that leave the archive) is
handed out as such; bytes that are no tar end the stream with `damage`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["BLOCK", "IMAGE_EXTENSIONS", "Member", "TarStream"]

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "png", "webp", "jpeg")  # In the order in which one is taken, if a sample has several.
CHUNK = 8 << 20  # Bytes of one request.
# name, size, checksum, type, magic, prefix
HEADER = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
MAX_EXTENSION_BYTES = 1 << 16  # A long name or PAX record larger than this is an attack, not a name.
MAX_EXTENSIONS = 8  # Extension headers before one member; writers put two at most.
REGULAR, FOLDER = (b"0", b"\0"), b"5"
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
SPARSE = b"GNU.sparse"
# Names for messages; POSIX.1-2001 pax, and the letters of GNU tar.
TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"S": "a sparse file",
    b"M": "the rest of a file from another volume",
    b"V": "a volume label",
    b"D": "a dump directory",
    b"X": "a Solaris extension",
}


@dataclass(frozen=True, slots=True)
class Member:
    name: bytes
    start: int  # Byte of its first header, extension headers included.
    data: int  # Byte at which its content begins.
    size: int
    kind: Literal["file", "folder", "unsupported"]
    detail: str = ""  # Why it is unsupported.

    @property
    def end(self) -> int:
        """Byte after its padding, where the next header begins."""
        return self.data + -(-self.size // BLOCK) * BLOCK


PACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class _Damage(Exception):
    def __init__(self, offset: int, text: str) -> None:
        super().__init__(text)
        self.offset, self.text = offset, text


class TarStream:
    """Iterate once over `members`; `content` gives the bytes of the member that was handed out last."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        """`read(start, length)` gives exactly these bytes of the tar, `size` is its length."""
        self._bytes = _Forward(read, size)
        self.size = size
        self.damage: tuple[int, str] | None = None  # Byte and reason, if the tar breaks off or is none from there.
        self.has_end_mark = False
        self.trailing = 0  # Bytes from the first that is not zero after the end mark.
        self.sha256 = ""  # Of the whole tar, known when the iteration has ended.

    def members(self) -> Iterator[Member]:
        try:
            while (member := self._next()) is not None:
                yield member
                self._bytes.skip_to(member.end)
        except _Damage as damage:
            self.damage = damage.offset, damage.text
        self._bytes.skip_to(self.size)
        self.sha256 = self._bytes.sha256.hexdigest()

    def content(self, member: Member) -> bytes:
        self._bytes.skip_to(member.data)
        return self._bytes.take(member.size)

    def _next(self) -> Member | None:
        start = self._bytes.position
        extended = _Extended()
        for _ in range(MAX_EXTENSIONS + 1):
            header = self._header()
            if header is None:
                self._end(start)
                return None
            name, size, kind = header
            data = self._bytes.position
            is_extension = kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL)
            if not is_extension and extended.size is not None:
                size = extended.size
            member = _member(extended, name, start, data, size, kind)
            if member.end > self.size:
                raise _Damage(start, f"a member of {size:,} bytes ends after the tar's {self.size:,}")
            if not is_extension:
                return member
            if size > MAX_EXTENSION_BYTES:
                extended.refused = f"a header extension of {size:,} bytes"
            else:
                extended.take(kind, self._bytes.take(size), start)
            self._bytes.skip_to(member.end)
        raise _Damage(start, f"more than {MAX_EXTENSIONS} extension headers before one member")

    def _header(self) -> tuple[bytes, int, bytes] | None:
        """Name, size and type; None at the end of the archive."""
        start = self._bytes.position
        if start == self.size:
            return None
        block = self._bytes.take(min(BLOCK, self.size - start))
        if not start and (packer := next((name for magic, name in PACKERS.items() if block.startswith(magic)), "")):
            raise _Damage(0, f"compressed with {packer}, although it is named .tar; unpack it")
        if len(block) < BLOCK:
            raise _Damage(start, f"{len(block)} bytes left where a tar header has {BLOCK}")
        if not any(block):
            self.has_end_mark = True
            return None
        name, digits, checksum, kind, magic, prefix = HEADER.unpack(block)
        if _number(checksum) != sum(block[:148]) + sum(block[156:]) + 8 * ord(" "):
            raise _Damage(start, "the checksum of a tar header is wrong")
        size = _number(digits)
        if size is None:
            raise _Damage(start, f"member size {digits!r} is no number")
        name = name.partition(b"\0")[0]
        if magic == b"ustar\0" and prefix[0]:
            name = prefix.partition(b"\0")[0] + b"/" + name
        return name, size, kind

    def _end(self, start: int) -> None:
        if self._bytes.position > start + BLOCK:
            raise _Damage(start, "the archive ends after an extension header, without its member")
        while (left := self.size - self._bytes.position) > 0 and not self.trailing:
            piece = self._bytes.take(min(left, CHUNK))
            if rest := piece.lstrip(b"\0"):
                self.trailing = left - (len(piece) - len(rest))


class _Extended:
    """What extension headers say about the member after them."""

    def __init__(self) -> None:
        self.name = b""
        self.size: int | None = None
        self.refused = ""

    def take(self, kind: bytes, record: bytes, offset: int) -> None:
        if kind == LONG_NAME:
            self.name = record.rstrip(b"\0")
            return
        if kind == LONG_LINK:
            self.refused = "a long link name"
            return
        fields = _pax_fields(record, offset)
        sparse = any(name.startswith(SPARSE) for name in fields)
        if kind == PAX_GLOBAL:
            if sparse or fields.keys() & {b"path", b"size", b"linkpath"}:
                self.refused = "a global header that renames or resizes every member"
            return
        if sparse:
            self.refused = TYPES[b"S"]
        self.name = fields.get(b"path", self.name)
        if b"size" in fields:
            if not fields[b"size"].isdigit():
                raise _Damage(offset, f"member size {fields[b'size']!r} is no number")
            self.size = int(fields[b"size"])


def _member(extended: _Extended, name: bytes, start: int, data: int, size: int, kind: bytes) -> Member:
    name = extended.name or name
    if extended.refused:
        return Member(name, start, data, size, "unsupported", extended.refused)
    if kind in REGULAR:
        return Member(name, start, data, size, "file")
    if kind == FOLDER:
        return Member(name, start, data, size, "folder")
    return Member(name, start, data, size, "unsupported", TYPES.get(kind, f"member type {kind!r}"))


def _number(digits: bytes) -> int | None:
    """Octal digits, or base 256 where the first bit is set (GNU, for large sizes). None: neither, or negative."""
    if digits[0] & 0x80:
        # A set second bit is the sign; the reader would take it for a size beyond any file.
        return int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else None
    try:
        value = int(digits.partition(b"\0")[0], 8)
    except ValueError:
        return None
    return value if value >= 0 else None


def _pax_fields(record: bytes, offset: int) -> dict[bytes, bytes]:
    """ "LENGTH KEYWORD=VALUE\\n", one after another."""
    fields: dict[bytes, bytes] = {}
    at = 0
    while at < len(record):
        digits, space, _ = record[at : at + 20].partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 2 < int(digits) <= len(record) - at:
            raise _Damage(offset, "a malformed PAX record")
        keyword, _, value = record[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        fields[keyword] = value
        at += int(digits)
    return fields


class _Forward:
    """Bytes in order, fetched in chunks and hashed as they come."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size = read, size
        self._chunk = memoryview(b"")
        self._at = 0  # In the chunk.
        self._fetched = 0
        self.sha256 = hashlib.sha256()

    @property
    def position(self) -> int:
        return self._fetched - len(self._chunk) + self._at

    def take(self, length: int) -> bytes:
        parts: list[memoryview] = []
        while length > 0:
            part = self._piece(length)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def skip_to(self, position: int) -> None:
        while self.position < min(position, self._size):
            self._piece(position - self.position)

    def _piece(self, length: int) -> memoryview:
        if self._at == len(self._chunk):
            wanted = min(CHUNK, self._size - self._fetched)
            data = self._read(self._fetched, wanted)
            assert len(data) == wanted > 0, "the source gave fewer bytes than it has"
            self.sha256.update(data)
            self._chunk, self._at = memoryview(data), 0
            self._fetched += wanted
        piece = self._chunk[self._at : self._at + length]
        self._at += len(piece)
        return piece
