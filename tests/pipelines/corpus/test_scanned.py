"""What an index holds of each tar."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

from pipelines.corpus.scanned import ScannedTar

BYTES = 3000  # Of one tar of 50 pages, whatever its labels: 300,000 of them are 0.9 GB.


def scan(number: int, names: int) -> dict[str, Any]:
    scanned = ScannedTar(
        bytes=10**8,
        sha256=f"{number:064x}",
        samples=1000,
        page_offset=[i * 2_000_000 + number for i in range(50)],
        page_length=[1_999_000 + i + number for i in range(50)],
        page_rows=[20] * 50,
        numbers=[] if names else [0, 999],
        names=[f"class {i}" for i in range(names)],
        rejected=[],
        noted={},
        ignored={},
        anomalies=[],
        anomaly_counts={},
        damage="",
    )
    return scanned.to_json()


def held(names: int) -> float:
    """Bytes of memory for each of 300 scans, as they come from the workers."""
    ScannedTar.from_json(scan(0, names))
    texts = [json.dumps(scan(number, names)) for number in range(300)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = [ScannedTar.from_json(json.loads(text)) for text in texts]
        return (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    finally:
        tracemalloc.stop()


def test_the_scan_of_a_tar_is_small_in_memory_and_comes_back_as_it_was() -> None:
    assert held(0) < BYTES
    assert held(1000) < BYTES + 1000 * 10  # A pointer a name: the names themselves are shared.
    for names in (0, 3):
        value = scan(7, names)
        assert ScannedTar.from_json(json.loads(json.dumps(value))).to_json() == value
