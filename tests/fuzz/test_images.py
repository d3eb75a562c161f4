"""No picture, whole or damaged, gets anything out of `decode_image` but pixels or an ImageError."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from tests.fuzz.images import mutations, pictures, seeds, sweep, verdicts


def test_whole_pictures_of_every_kind_decode() -> None:
    found = verdicts(pictures())
    assert found.keys() == {"decoded", "unsupported_mode"}
    assert found["unsupported_mode"] == 64  # TIFF of floating point, and LAB.


def test_damaged_pictures_are_decoded_or_refused() -> None:
    found: Counter[str] = sum((verdicts(sweep(data, 220)) for data in seeds()), Counter())
    found += verdicts(islice(mutations(seeds(), seed=0), 4000))
    assert {"decoded", "undecodable", "unknown_format", "too_many_pixels"} <= found.keys()
