"""Inputs of the demo: Fashion-MNIST from the Debian package, handwritten digits from scikit-learn.

Files get a fixed time of change, so that making them again gives the same source and finished stages are reused.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.corpus.idx import CLASSES, encode_png

__all__ = ["FASHION_CLASSES", "digits", "fashion_mnist", "stand_in"]

log = logging.getLogger(__name__)
PACKAGE = "dataset-fashion-mnist"  # Debian and Ubuntu; MIT, Zalando.
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FILES = tuple(f"{part}-{name}.gz" for part in ("train", "t10k") for name in ("images-idx3-ubyte", "labels-idx1-ubyte"))
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FIXED_TIME = 946_684_800  # 2000-01-01, seconds since 1970.
SECONDS = 120  # For one call of apt-get.


def fashion_mnist(folder: Path) -> tuple[Path, str]:
    """The four IDX files and classes.txt in `folder`/fashion-mnist, and a sentence that says where they come from.

    Without apt or without its network the photos of scikit-learn stand in: see `stand_in`.
    """
    target = folder / "fashion-mnist"
    told = f"Fashion-MNIST (70,000 photos of clothes, MIT) from the package {PACKAGE}"
    if not _complete(target):
        if _complete(INSTALLED):
            _copy(INSTALLED, target)
        elif not (problem := _from_package(target)):
            told += ", unpacked without installing it"
        else:
            path = stand_in(folder)
            return path, (
                f"Fashion-MNIST could not be had ({problem}); a stand-in is used: 7,000 crops of the two photos that"
                " scikit-learn ships, 10 classes by which part of which photo a crop shows. Its figures say nothing"
                " about Fashion-MNIST"
            )
    _write(target / CLASSES, "".join(f"{name}\n" for name in FASHION_CLASSES).encode())
    return target, told


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _copy(source: Path, target: Path) -> None:
    """Each file whole or not at all, with its time of change."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        part = target / f".{name}.part"
        shutil.copy2(source / name, part)
        part.replace(target / name)


def _from_package(target: Path) -> str:
    """Download and unpack the Debian package, which needs no root. Returns what went wrong, or nothing."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return "there is no apt on this machine"
    with tempfile.TemporaryDirectory() as folder:
        problem = _run(["apt-get", "download", PACKAGE], folder)
        if problem and os.geteuid() == 0 and not _run(["apt-get", "update"], folder):
            problem = _run(["apt-get", "download", PACKAGE], folder)
        if problem:
            return problem
        packages = list(Path(folder).glob("*.deb"))
        unpacked = Path(folder) / "unpacked"
        if not packages or (problem := _run(["dpkg", "-x", str(packages[0]), str(unpacked)], folder)):
            return problem or "apt-get gave no package"
        inside = unpacked / INSTALLED.relative_to("/")
        if not _complete(inside):
            return f"the package lacks {', '.join(FILES)}"
        _copy(inside, target)
    return ""


def _run(command: list[str], folder: str) -> str:
    """The last line that the command said when it failed; nothing when it worked."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"`{' '.join(command[:2])}` took more than {SECONDS} s"
    except OSError as error:
        return f"`{command[0]}`: {error.strerror}"
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    log.info("%s: %s", " ".join(command), "\n".join(lines))
    return f"`{' '.join(command[:2])}`: {lines[-1].removeprefix('E: ') if lines else f'status {done.returncode}'}"


def stand_in(folder: Path) -> Path:
    """An honest replacement that needs no network: 28x28 grey crops of scikit-learn's two photos, as IDX files.

    The class of a crop is the vertical fifth of the photo in which it lies. Training crops come from the upper three
    quarters of a photo, test crops from the rest, so no pixel is in both.
    """
    from sklearn.datasets import load_sample_images

    target = folder / "photo-crops"
    rng = np.random.Generator(np.random.Philox(0))
    photos = [photo.mean(axis=2) for photo in load_sample_images().images]  # (427, 640), 0..255
    names = [f"{name}, part {part + 1} of 5" for name in ("china", "flower") for part in range(5)]
    for part, count in (("train", 6000), ("t10k", 1000)):
        labels = np.arange(count, dtype=np.uint8) % len(names)
        images = np.stack([_crop(photos[label // 5], label % 5, part == "train", rng) for label in labels.tolist()])
        header = struct.pack(">IIII", 0x00000803, count, 28, 28)
        _write(target / f"{part}-images-idx3-ubyte.gz", gzip.compress(header + images.tobytes(), 6, mtime=0))
        header = struct.pack(">II", 0x00000801, count)
        _write(target / f"{part}-labels-idx1-ubyte.gz", gzip.compress(header + labels.tobytes(), 6, mtime=0))
    _write(target / CLASSES, "".join(f"{name}\n" for name in names).encode())
    return target


def _crop(
    photo: np.ndarray[Any, Any], fifth: int, upper: bool, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A square of 56 or 84 pixels, reduced to 28 by averaging."""
    height, width = photo.shape
    low, high = (0, height * 3 // 4) if upper else (height * 3 // 4, height)
    factor = int(rng.integers(2, 4))
    side = 28 * factor
    top = int(rng.integers(low, high - side + 1))
    left = int(rng.integers(fifth * width // 5, (fifth + 1) * width // 5 - side + 1))
    square = photo[top : top + side, left : left + side]
    small: np.ndarray[Any, Any] = square.reshape(28, factor, 28, factor).mean(axis=(1, 3)).round()
    return small.astype(np.uint8)


def digits(folder: Path) -> Path:
    """scikit-learn's 1,797 handwritten digits (8x8 grey) as class folders of PNG."""
    from sklearn.datasets import load_digits

    target = folder / "digits"
    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images, data.target.tolist(), strict=True)):
        pixels = (image * (255 / 16)).round().astype(np.uint8)  # The data has 17 levels, 0..16.
        _write(target / str(label) / f"{number:04d}.png", encode_png(pixels))
    return target


def _write(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data and path.stat().st_mtime == FIXED_TIME:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.utime(part, (FIXED_TIME, FIXED_TIME))
    part.replace(path)
