"""What a scan leaves behind of one tar: enough for the manifest, so an unchanged tar is never read twice."""

from __future__ import annotations

import dataclasses
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.corpus.anomalies import Anomaly
from pipelines.corpus.quarantine import Rejected

__all__ = ["ScannedTar"]

PAGES = {"page_offset": "q", "page_length": "q", "page_rows": "H"}


@dataclass(frozen=True, slots=True)
class ScannedTar:
    """What one tar holds. `rows` has class numbers, or indices into `names` where labels are names."""

    bytes: int
    sha256: str
    samples: int
    page_offset: Sequence[int]
    page_length: Sequence[int]
    page_rows: Sequence[int]
    numbers: list[int]  # Lowest and highest class number that occur; empty: none does,
    names: list[str]  # and class names: a tar that has both cannot be used.
    rejected: list[Rejected]
    noted: dict[str, int]
    ignored: dict[str, int]
    anomalies: list[Anomaly]
    anomaly_counts: dict[str, int]
    damage: str  # Why the samples after some byte are lost, or nothing.
    multi_label: bool = False  # A sample has a list of labels, so `rows` has lists.

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {name: list(getattr(self, name)) for name in PAGES}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ScannedTar:
        """Packed: an index holds one of them for each of its tars, which may be 300,000."""
        return cls(
            **dict(value)
            | {name: array(kind, value[name]) for name, kind in PAGES.items()}
            | {
                "names": [sys.intern(name) for name in value["names"]],
                "rejected": [Rejected(**item) for item in value["rejected"]],
                "anomalies": [Anomaly(**item) for item in value["anomalies"]],
            }
        )
