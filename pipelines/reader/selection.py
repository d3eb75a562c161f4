"""What a subset or mixture takes of a page: some of its samples, with the labels that they have there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus

__all__ = ["LabelSource", "label_sources", "select"]


class Labelled(Protocol):
    label: int | tuple[int, ...]
    name: str
    fault: str


S = TypeVar("S", bound=Labelled)


@dataclass(frozen=True, slots=True)
class LabelSource:
    """The label space in which a tar was written."""

    corpus: str  # Reference of the version that it belongs to.
    num_classes: int
    labels: tuple[int, ...] | None  # Label of each class in the corpus that is read; None: the same.


def label_sources(corpus: Corpus) -> tuple[LabelSource, ...]:
    """One for each source of the corpus; none if its tars are its own."""
    return tuple(
        LabelSource(
            f"{source.uri or corpus.uri}@{source.digest}",
            len(corpus.class_names if source.labels is None else source.labels),
            source.labels,
        )
        for source in corpus.head.sources
    )


def select(samples: Sequence[S], chosen: tuple[int, ...] | None, labels: tuple[int, ...] | None) -> Sequence[S]:
    """The chosen samples of a page, relabelled; a sample with a fault keeps its place.

    Of several labels those that `labels` leaves out (-1) are dropped. A sample with no other is not as the manifest
    has it, which lists no such sample.
    """
    if chosen is not None:
        samples = [samples[i] for i in chosen]
    if labels is not None:
        for sample in samples:
            if sample.fault:
                continue
            if isinstance(sample.label, tuple):
                kept = tuple(labels[own] for own in sample.label if labels[own] >= 0)
                sample.label, is_left_out = kept, bool(sample.label) and not kept
            else:
                sample.label, is_left_out = max(0, labels[sample.label]), labels[sample.label] < 0
            if is_left_out:
                sample.fault = f"bad_label: {sample.name}: a class that this corpus leaves out"
    return samples
