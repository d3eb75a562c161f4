"""The class number of a sample that the tar walk found, or its class numbers where a sample has several labels.

Our own tars have it in KEY.cls. Adopted tars may name the class, or keep the label in KEY.json: the names stand in the
head of the manifest, which a process reads once, when it first meets a label that is no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.labels import parse_labels, read_label
from pipelines.corpus.manifest import open_corpus
from pipelines.reader.tar import TarSample

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["find_label", "find_labels", "multi_hot", "padded"]


def find_label(sample: TarSample, page: memoryview, num_classes: int, corpus: str) -> tuple[int, str]:
    """(class number, "") or (0, what is wrong). `corpus` is the reference of the manifest, for class names."""
    cls = _member(sample, page, "cls")
    if cls is not None and cls.isdigit() and len(cls) <= 9:  # The short way: nearly every sample.
        label: int | str | None = int(cls)
    else:
        label = read_label(cls, _member(sample, page, "json"))
    if isinstance(label, str) and corpus:
        label = _numbers(corpus).get(label, label)
    if isinstance(label, int) and label < num_classes:
        return label, ""
    if label is None:
        return 0, f"missing_label: {sorted(sample.members)}" if cls is None else f"bad_label: {cls[:20]!r}"
    return 0, f"bad_label: {str(label)[:40]!r} of {num_classes} classes"


def find_labels(sample: TarSample, page: memoryview, num_classes: int, corpus: str) -> tuple[tuple[int, ...], str]:
    """(class numbers in order, "") or ((), what is wrong): as the sample table of the corpus has them."""
    cls, described = _member(sample, page, "cls"), _member(sample, page, "json")
    one = read_label(cls, described)  # A tar with one label an image may lie beside tars with several.
    found = (one,) if one is not None else parse_labels(described or b"") or ()
    known = _numbers(corpus) if corpus and any(isinstance(label, str) for label in found) else {}
    labels = [known.get(label, label) if isinstance(label, str) else label for label in found]
    numbers = sorted(label for label in labels if isinstance(label, int) and label < num_classes)
    if len(numbers) < len(labels):
        bad = next(label for label in labels if isinstance(label, str) or label >= num_classes)
        return (), f"bad_label: {str(bad)[:40]!r} of {num_classes} classes"
    if not numbers:
        return (), f"missing_label: {sorted(sample.members)}"
    return tuple(numbers), ""


def padded(labels: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    """(n, W): the numbers of each row and then -1; W is the longest row's, at least 1."""
    rows = np.full((len(labels), max([1, *map(len, labels)])), -1, np.int64)
    for row, own in zip(rows, labels, strict=True):
        row[: len(own)] = own
    return rows


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """float32 (B, K) of int64 (B, W): 1 at each of a row's numbers; its -1 are nothing."""
    import torch

    hot = labels.new_zeros(len(labels), num_classes + 1, dtype=torch.float32)  # The last column takes the -1.
    return hot.scatter_(1, labels.masked_fill(labels < 0, num_classes), 1.0)[:, :num_classes]


def _member(sample: TarSample, page: memoryview, extension: str) -> bytes | None:
    found = sample.members.get(extension)
    return bytes(page[found[0] : found[0] + found[1]]) if found else None


@lru_cache(maxsize=8)
def _numbers(corpus: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(open_corpus(corpus).class_names)}
