"""The generator is the published Philox4x32-10, and images draw independent numbers."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.reader.philox import image_bits, philox4x32, uniform


# Known answers of the authors' Random123 library (kat_vectors).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_it_gives_the_published_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    assert philox4x32(np.array([counter], np.uint32), key)[0].tolist() == expected


def test_an_image_draws_the_same_alone_and_among_others() -> None:
    ids = np.array([3, 2**40 + 3, 7], np.int64)
    together = image_bits(11, 2, ids, 0)
    for i in range(3):
        assert image_bits(11, 2, ids[i : i + 1], 0)[0].tolist() == together[i].tolist()
    assert len(np.unique(together)) == 12, "ids that differ in the high word alone must differ"


def test_seeds_epochs_and_streams_are_apart() -> None:
    ids = np.arange(100)
    draws = [image_bits(seed, epoch, ids, stream) for seed in (0, 1, 2**33) for epoch in (0, 1) for stream in (0, 1)]
    assert len(np.unique(np.concatenate(draws))) > 12 * 400 - 5


def test_uniform_numbers_fill_the_unit_interval() -> None:
    numbers = uniform(image_bits(1, 0, np.arange(20_000), 0))
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005
