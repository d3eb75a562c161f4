"""Small real inputs: pictures in every format, folders of them, IDX files, tars."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.corpus.entries import Entries
from pipelines.corpus.fetch import Planned


def picture(
    number: int, size: tuple[int, int] = (12, 10), kind: str = "PNG", mode: str = "RGB", **options: Any
) -> bytes:
    """A picture that differs for each number; `options` go to Pillow's save."""
    width, height = size
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16)).save(file, kind)
    else:
        image = Image.fromarray(pixels).convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(
                Image.fromarray(pixels[..., 0] // 2)
            )  # Pillow drops an alpha channel that is opaque throughout.
        image.save(file, kind, **options)
    return file.getvalue()


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (6, 5), (40 * i, 0, 0)) for i in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large; it has a pixel chunk that nobody should decode."""
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def class_folders(
    folder: Path, counts: Mapping[str, int], kinds: tuple[str, ...] = ("PNG", "JPEG"), size: tuple[int, int] = (12, 10)
) -> Path:
    """counts: "cat" or "train/cat" to the number of images."""
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            kind = kinds[i % len(kinds)]
            extension = "jpg" if kind == "JPEG" else kind.lower()
            (folder / name / f"{i:04d}.{extension}").write_bytes(picture(number, size, kind))
            number += 1
    return folder


def idx_images(images: np.ndarray[Any, Any], packed: bool = True) -> bytes:
    data = struct.pack(">IIII", 0x803, *images.shape) + images.astype(np.uint8).tobytes()
    return gzip.compress(data, mtime=0) if packed else data


def idx_labels(labels: np.ndarray[Any, Any], packed: bool = True) -> bytes:
    data = struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()
    return gzip.compress(data, mtime=0) if packed else data


def idx_folder(folder: Path, train: int = 60, test: int = 20, packed: bool = True) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    end = ".gz" if packed else ""
    for name, rows in {"train": train, "t10k": test}.items():
        images = rng.integers(0, 256, (rows, 9, 7), dtype=np.uint8)
        (folder / f"{name}-images-idx3-ubyte{end}").write_bytes(idx_images(images, packed))
        (folder / f"{name}-labels-idx1-ubyte{end}").write_bytes(idx_labels(np.arange(rows) % 4, packed))
    return folder


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def tar_folder(folder: Path, tars: int = 3, samples: int = 10) -> Path:
    folder.mkdir(parents=True)
    for shard in range(tars):
        members: list[tuple[str, bytes]] = []
        for i in range(samples):
            key = f"{shard:02d}/{i:05d}"
            members += [
                (f"{key}.cls", str(i % 3).encode()),
                (f"{key}.jpg", picture(100 * shard + i, kind="JPEG")),
                (f"{key}.txt", b"a caption"),
            ]
        (folder / f"some-{shard:03d}.tar").write_bytes(tar_bytes(members))
    return folder


def planned(entries: Entries) -> list[Planned]:
    """Its samples as the plan has them, all with label 0."""
    columns = (entries.path, entries.uri, entries.offset, entries.size, entries.etag, [0] * len(entries))
    return [Planned(*row) for row in zip(*columns, strict=True)]
