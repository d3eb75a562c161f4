"""Walk of a page's tar members, every header checked. Bytes in, (offset, length) out: nothing is copied or unpacked.

POSIX ustar with the GNU and PAX extensions that other writers use (long names, large sizes).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["TarError", "TarSample", "walk"]

BLOCK = 512
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
    samples: list[TarSample] = []
    headers: list[int] = []
    owners: list[int] = []  # for each header, the number of samples before it
    problem: TarError | None = None
    try:
        _walk(page, samples, headers, owners)
    except TarError as error:
        problem = error
    wrong = _first_bad_checksum(page, headers)
    if wrong is not None:
        offset = headers[wrong]
        del samples[owners[wrong] :]
        problem = TarError("tar_checksum", offset, "tar header checksum is wrong")
    elif problem is not None and samples:
        del samples[-1]  # The damage may lie inside the last one.
    return samples, problem


def _walk(page: memoryview, samples: list[TarSample], headers: list[int], owners: list[int]) -> None:
    data = bytes(page) if not page.contiguous else page
    end, offset = len(data), 0
    long_name, long_size = "", -1
    key = None
    while offset < end:
        if end - offset < BLOCK:
            raise TarError("tar_truncated", offset, f"{end - offset} bytes left where a tar header has {BLOCK}")
        header = bytes(data[offset : offset + BLOCK])
        if not header[0] and not any(header):
            return  # End of archive.
        kind = header[156]
        size = _number(header, offset) if long_size < 0 else long_size
        body = offset + BLOCK
        following = body + (size + BLOCK - 1) // BLOCK * BLOCK
        if body + size > end:
            raise TarError("tar_truncated", offset, f"a member of {size:,} bytes ends after the page's {end:,}")
        headers.append(offset)
        owners.append(len(samples))
        offset = following
        if kind in REGULAR:
            name = long_name or _name(header)
            long_name, long_size = "", -1
            folder, _, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not dot or not stem:
                continue  # As the webdataset package does: such a member belongs to no sample.
            if name[0] == "/" or ".." in folder.split("/"):
                raise TarError("tar_unsafe", body - BLOCK, f"member name {name!r} leaves the archive")
            sample_key = f"{folder}/{stem}" if folder else stem
            if sample_key != key:
                key = sample_key
                samples.append(TarSample(key))
                owners[-1] = len(samples) - 1
            else:
                owners[-1] = len(samples) - 1
            members = samples[-1].members
            extension = extension.lower()
            if extension in members:
                raise TarError("tar_duplicate", body - BLOCK, f"sample {key!r} has two members {extension!r}")
            members[extension] = (body, size)
        elif kind in (PAX, LONG_NAME):
            if size > MAX_EXTENSION_BYTES:
                raise TarError("tar_unsafe", body - BLOCK, f"a header extension of {size:,} bytes")
            record = bytes(data[body : body + size])
            if kind == LONG_NAME:
                long_name = _text(record.rstrip(b"\0"), body)
            else:
                name, length = _pax(record, body)
                long_name, long_size = name or long_name, length
        elif kind not in (DIRECTORY, PAX_GLOBAL):
            raise TarError("tar_unsafe", body - BLOCK, f"member type {chr(kind)!r} (link, device or sparse file)")


def _number(header: bytes, offset: int) -> int:
    if header[124] & BASE_256:
        return int.from_bytes(header[125:136], "big")
    try:
        return int(header[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        raise TarError("tar_header", offset, f"member size {header[124:136]!r} is not a number") from None


def _name(header: bytes) -> str:
    name = header[: header.find(0, 0, 100)] if header.find(0, 0, 100) >= 0 else header[:100]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].rstrip(b"\0") + b"/" + name
    return _text(name, 0)


def _text(name: bytes, offset: int) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise TarError("tar_header", offset, f"member name {name[:40]!r} is not UTF-8") from None


def _pax(record: bytes, offset: int) -> tuple[str, int]:
    """Path and size that a PAX record sets: "", -1 where it sets none."""
    name, size, at = "", -1, 0
    while at < len(record):
        length, space, _ = record[at:].partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(record) - at:
            raise TarError("tar_header", offset, "malformed PAX record")
        keyword, _, value = record[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if keyword == b"path":
            name = _text(value, offset)
        elif keyword == b"size" and value.isdigit():
            size = int(value)
        at += int(length)
    return name, size


def _first_bad_checksum(page: memoryview, headers: list[int]) -> int | None:
    """Index of the first header whose checksum does not hold; all are summed in one call."""
    if not headers:
        return None
    blocks = np.frombuffer(page, np.uint8)[: len(page) // BLOCK * BLOCK].reshape(-1, BLOCK)
    chosen = blocks[np.array(headers) // BLOCK]
    # The checksum field itself counts as eight spaces.
    sums = chosen.sum(axis=1, dtype=np.int64) - chosen[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * 32
    for index, total in enumerate(sums.tolist()):
        start = headers[index] + 148
        try:
            stated = int(bytes(page[start : start + 8]).rstrip(b"\0 ") or b"0", 8)
        except ValueError:
            return index
        if stated != total:
            return index
    return None
