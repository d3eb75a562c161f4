"""Mixtures of corpora that share images: each is one sample, and the mixture can be written into shards of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.corpus.errors import CorpusError
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus
from pipelines.mix import MixPart, MixRecipe, make_mix
from pipelines.subset import SubsetRecipe, make_subset

from .inputs import picture


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", 5)
    rows = [("test" if i % 4 == 3 else "train", "abc"[i % 3], f"{'abc'[i % 3]}/{i}.png", picture(i)) for i in range(48)]
    return write_corpus(tmp_path / "c", rows, class_names=list("abc"), shard_samples=16)


def part(corpus: Corpus, folder: Path, **settings: Any) -> Corpus:
    recipe = SubsetRecipe(corpus=corpus.reference, destination=str(folder), materialise="never", **settings)
    return make_subset(recipe, corpus)


def mixture(folder: Path, kind: Any, parts: dict[str, Corpus], **classes: Any) -> Corpus:
    given = {name: MixPart(corpus=one.reference, classes=classes.get(name)) for name, one in parts.items()}
    return make_mix(MixRecipe(corpora=given, destination=str(folder), materialise=kind, num_workers=0), parts)


def times(corpus: Corpus, split: str) -> Counter[Any]:
    return Counter((row["content"], row["label"]) for row in corpus.samples(split).to_pylist())


@pytest.mark.parametrize("kind", ["never", "always"])
def test_what_two_parts_hold_is_one_sample(kind: str, corpus: Corpus, tmp_path: Path) -> None:
    half, few = part(corpus, tmp_path / "half", fraction=0.5), part(corpus, tmp_path / "few", per_class=3)
    for parts in ({"all": corpus, "half": half}, {"half": half, "few": few}, {"a": half, "b": half, "c": few}):
        mixed = mixture(tmp_path / "m", kind, parts)
        assert times(mixed, "train") == sum((times(one, "train") for one in parts.values()), Counter())
        assert times(mixed, "test") == times(corpus, "test")


def test_an_image_with_two_labels_is_refused_and_one_part_may_leave_it_out(corpus: Corpus, tmp_path: Path) -> None:
    half = part(corpus, tmp_path / "half", fraction=0.5)
    other = {"a": "b", "b": "a", "c": "c"}
    with pytest.raises(CorpusError, match=r"corpora.all and corpora.half both hold \d+ images of split 'train'"):
        mixture(tmp_path / "m", "never", {"all": corpus, "half": half}, half=other)
    one = mixture(tmp_path / "m", "always", {"all": corpus, "half": half}, all={"a": "x"}, half={"b": "y", "c": "z"})
    assert one.class_names == ("x", "y", "z") and one.splits["test"] == corpus.splits["test"]
