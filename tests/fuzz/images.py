"""`decode_image` against small pictures of every kind, whole and damaged: pixels or an ImageError, nothing else.

    make fuzz                                    FUZZ_SECONDS=60
    python -m tests.fuzz.images --seconds 60 [--seed 0]

First each byte of each picture in turn is set to some values (a type in a TIFF's directory is one byte of it), then
bytes are changed, cut out and put in at random. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from vit_model import ImageError, decode_image

KINDS: dict[str, tuple[str, ...]] = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
    "BMP": ("1", "P", "RGB"),
    "TIFF": ("1", "L", "RGB", "CMYK", "I;16", "F", "LAB"),
}
SIZES = ((1, 1), (1, 9), (9, 1), (5, 4))
VALUES = (0, 1, 2, 5, 10, 12, 127, 128, 255)  # 5, 10 and 12 are TIFF's types of fractions.


def picture(kind: str, mode: str, size: tuple[int, int], orientation: int) -> bytes:
    rng = np.random.default_rng(0)
    shape = size[::-1]
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 1 << 16, shape).astype(np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    return file.getvalue()


def pictures() -> Iterator[bytes]:
    """Whole pictures: every format, mode and orientation, and sides of one pixel."""
    for kind, modes in KINDS.items():
        for mode in modes:
            for size in SIZES:
                for orientation in range(1, 9):
                    yield picture(kind, mode, size, orientation)


def seeds() -> list[bytes]:
    """One picture of every format and mode."""
    return [picture(kind, mode, (5, 4), 6) for kind, modes in KINDS.items() for mode in modes]


def sweep(data: bytes, most: int) -> Iterator[bytes]:
    """Each of the first `most` bytes in turn set to each value, or with its lowest bit flipped."""
    for at in range(min(most, len(data))):
        for value in {*VALUES, data[at] ^ 1}:
            yield data[:at] + bytes([value]) + data[at + 1 :]


def mutations(found: list[bytes], seed: int) -> Iterator[bytes]:
    """Endless."""
    rng = random.Random(seed)
    while True:
        data = bytearray(rng.choice(found))
        for _ in range(rng.choice((1, 1, 2, 4, 10))):
            at, length = rng.randrange(len(data)), rng.randint(1, 8)
            match rng.randrange(5):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice(VALUES)
                case 2:
                    data[at : at + length] = rng.randbytes(length)
                case 3:
                    data[at:at] = data[(start := rng.randrange(len(data))) : start + length]
                case _:
                    del data[max(1, at) : at + length]
        yield bytes(data)


def verdicts(inputs: Iterable[bytes], until: float = float("inf")) -> Counter[str]:
    """How often each reason came; raises what is no ImageError, with the input in hex."""
    counts: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in inputs:
            try:
                decode_image(data, 3, max_pixels=1 << 20)
                counts["decoded"] += 1
            except ImageError as error:
                counts[error.reason] += 1
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error}; input {data.hex()}") from error
            if time.monotonic() > until:
                break
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes there what it thinks of each file.
    try:
        whole = verdicts(pictures())
        counts = sum((verdicts(sweep(data, len(data)), until) for data in seeds()), whole)
        counts += verdicts(mutations(seeds(), arguments.seed), until)
    except AssertionError as error:
        print(error)
        return 1
    print(json.dumps({"executions": counts.total(), "verdicts": dict(counts.most_common())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
