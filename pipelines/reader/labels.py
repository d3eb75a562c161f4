"""The class number of a sample that the tar walk found.

Our own tars have it in KEY.cls. Adopted tars may name the class, or keep the label in KEY.json: the names stand in the
head of the manifest, which a process reads once, when it first meets a label that is no number.
"""

from __future__ import annotations

from functools import lru_cache

from pipelines.corpus.labels import read_label
from pipelines.corpus.manifest import open_corpus
from pipelines.reader.tar import TarSample

__all__ = ["find_label"]


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


def _member(sample: TarSample, page: memoryview, extension: str) -> bytes | None:
    found = sample.members.get(extension)
    return bytes(page[found[0] : found[0] + found[1]]) if found else None


@lru_cache(maxsize=8)
def _numbers(corpus: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(open_corpus(corpus).class_names)}
