"""Tars as other people write them: any header format, any member, in any order."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .inputs import picture

Member = tuple[str | bytes, bytes] | tarfile.TarInfo
BLOCK = 512


def foreign_tar(members: Iterable[Member], form: int = tarfile.GNU_FORMAT, end: bool = True) -> bytes:
    """(name, content) are files; a TarInfo stands for itself, without content. `end`: with the end-of-archive mark."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name)
            info.size, info.mtime = len(data), 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
        length = tar.offset
    return file.getvalue() if end else file.getvalue()[:length]


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """One header block with a right checksum, whatever the fields say."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sample(key: str, number: int, label: bytes | None = None, kind: str = "JPEG") -> list[Member]:
    """Image and .cls; the label is the number modulo three unless given."""
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    return [
        (f"{key}.{extension}", picture(number, kind=kind)),
        (f"{key}.cls", str(number % 3).encode() if label is None else label),
    ]


def write_tars(
    folder: Path,
    names: Sequence[str] = ("a-train-0.tar", "a-train-1.tar", "val/x.tar"),
    samples: int = 12,
    form: int = tarfile.GNU_FORMAT,
    members: Callable[[str, int], list[Member]] = sample,
) -> Path:
    """Clean tars with differing keys; `members(key, number)` makes one sample."""
    number = 0
    for name in names:
        content: list[Member] = []
        for _ in range(samples):
            content += members(f"{number:05d}", number)
            number += 1
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(foreign_tar(content, form))
    return folder
