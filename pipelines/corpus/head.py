"""The small part of a manifest: enough to plan a run and to show what a corpus is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.corpus.errors import MAKE_AGAIN, ManifestError
from pipelines.corpus.layout import SCHEMA

__all__ = ["Head", "SourceVersion"]

COUNTS = ("rejected", "noted", "ignored", "duplicates", "recipe")
KINDS: dict[str, type] = {"digest": str, "shards": int, "bytes": int, "source": str, **dict.fromkeys(COUNTS, dict)}


@dataclass(frozen=True, slots=True)
class SourceVersion:
    """A version whose shards another version lists: the one before it, or a part of a mixture."""

    uri: str  # Base of that corpus; "" for the base of the version that lists it.
    digest: str
    labels: tuple[int, ...] | None = None  # New label of each of its labels, -1: left out; None: the same.

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SourceVersion:
        labels = value["labels"]
        return cls(value["uri"], value["digest"], None if labels is None else tuple(labels))


@dataclass(frozen=True, slots=True)
class Head:
    digest: str
    class_names: tuple[str, ...]
    splits: dict[str, int]  # Samples that come in an epoch of each split, in manifest order.
    shards: int
    bytes: int  # Of all tars.
    multi_label: bool = False  # Samples have a list of labels.
    rejected: dict[str, int] = field(default_factory=dict)  # Images by the reason in quarantine.parquet.
    bad_fraction: float = 0.0  # Of all images; duplicate and withdrawn ones are not bad.
    noted: dict[str, int] = field(default_factory=dict)  # Kept, but converted by rule: alpha, cmyk, resized, ...
    ignored: dict[str, int] = field(default_factory=dict)  # Files of the source that are no samples, by kind.
    duplicates: dict[str, int] = field(default_factory=dict)  # Images whose content occurs before, by where it does.
    parent: str | None = None  # Digest of the version that this one grew from.
    sources: tuple[SourceVersion, ...] = ()  # Versions that list these shards with their samples; none: this one does.
    source: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def samples(self) -> int:
        return sum(self.splits.values())

    def to_json(self) -> dict[str, Any]:
        # A list, because JSON objects carry no order and the order of the splits is that of the sample ids.
        return dataclasses.asdict(self) | {"splits": [[name, samples] for name, samples in self.splits.items()]}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Head:
        """Raises ManifestError if that is no head, or not one of this schema."""
        if not isinstance(value, dict):
            raise ManifestError(f"{where} is damaged: no JSON object; {MAKE_AGAIN}")
        schema = value.get("schema")
        if schema != SCHEMA:
            raise ManifestError(
                f"{where}: manifest schema {schema!r}, this code reads {SCHEMA}; use the release that wrote it"
            )
        known = {spec.name for spec in dataclasses.fields(cls)}
        if unknown := value.keys() - known:
            raise ManifestError(f"{where}: unknown keys {sorted(unknown)}; the head was not written by this code")
        try:
            head = cls(
                **value
                | {
                    "class_names": tuple(value["class_names"]),
                    "splits": {name: int(samples) for name, samples in value["splits"]},
                    "sources": tuple(SourceVersion.from_json(one) for one in value.get("sources", ())),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{where} is damaged ({error!r}); {MAKE_AGAIN}") from None
        for name, kind in KINDS.items():
            if not isinstance(found := getattr(head, name), kind):
                raise ManifestError(f"{where} is damaged: {name} is {found!r}; {MAKE_AGAIN}")
        return head
