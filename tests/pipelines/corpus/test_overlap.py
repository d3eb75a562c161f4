"""Mixtures of corpora that share images: each is one sample, and the mixture can be written into shards of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.corpus.errors import CorpusError
from pipelines.corpus.grow import exclude, versions
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus
from pipelines.mix import MixPart, MixRecipe, make_mix
from pipelines.subset import SubsetRecipe, make_subset
from pipelines.verify import VerifyRecipe, verify

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
        together: Counter[Any] = Counter()
        for one in parts.values():
            together += times(one, "train")
        assert times(mixed, "train") == together
        assert times(mixed, "test") == times(corpus, "test")
        assert verify(VerifyRecipe(corpus=mixed.reference, num_workers=0)).counts == {}


def test_an_image_with_two_labels_is_refused_and_one_part_may_leave_it_out(corpus: Corpus, tmp_path: Path) -> None:
    half = part(corpus, tmp_path / "half", fraction=0.5)
    other = {"a": "b", "b": "a", "c": "c"}
    with pytest.raises(CorpusError, match=r"corpora.all and corpora.half both hold \d+ images of split 'train'"):
        mixture(tmp_path / "m", "never", {"all": corpus, "half": half}, half=other)
    one = mixture(tmp_path / "m", "always", {"all": corpus, "half": half}, all={"a": "x"}, half={"b": "y", "c": "z"})
    assert one.class_names == ("x", "y", "z") and one.splits["test"] == corpus.splits["test"]


# Shards of its own ----------------------------------------------------------------------------------------------------


def test_shards_of_its_own_keep_the_paths_but_those_that_two_corpora_share(corpus: Corpus, tmp_path: Path) -> None:
    rows = [
        ("train", "abc"[i % 3], f"{name}/{i}.png", picture(500 + i)) for i in range(9) for name in ("new", "abc"[i % 3])
    ]
    other = write_corpus(tmp_path / "o", rows[:1] + rows[1::2], class_names=list("abc"))
    mixed = mixture(tmp_path / "m", "always", {"one": corpus, "two": other})
    sources = set(mixed.samples("train")["source"].to_pylist())
    shared = set(corpus.samples("train")["source"].to_pylist()) & set(other.samples("train")["source"].to_pylist())
    assert shared and not shared & sources and "new/0.png" in sources
    for digest in (corpus.digest, other.digest):
        assert {f"{digest[:12]}/{path}" for path in shared} <= sources
    gone = exclude(
        f"{tmp_path / 'm'}@current",
        ["new/0.png", next(iter(set(corpus.samples("train")["source"].to_pylist()) - shared))],
    )
    assert gone.head.rejected == {"withdrawn": 2}


def test_the_head_of_what_was_materialised_says_what_was_chosen(corpus: Corpus, tmp_path: Path) -> None:
    recipe = SubsetRecipe(corpus=corpus.reference, destination=str(tmp_path / "s"), fraction=0.2, num_workers=0)
    made = make_subset(recipe, corpus)
    assert not made.head.sources and made.head.source == corpus.reference
    view = made.head.recipe["materialised"]
    assert made.head.recipe == {"fraction": 0.2, "materialised": view} and view != made.digest
    assert [one.digest for one in versions(str(tmp_path / "s"))] == [made.digest]


def test_per_class_takes_each_image_once_and_a_fraction_keeps_how_often_each_comes(
    corpus: Corpus, tmp_path: Path
) -> None:
    even = part(corpus, tmp_path / "even", balance=1.0)
    assert even.splits["train"] > corpus.splits["train"]
    few = part(even, tmp_path / "few", per_class=2)
    assert Counter(label for _, label in times(few, "train").elements()) == {0: 2, 1: 2, 2: 2}
    half = times(part(even, tmp_path / "half", fraction=0.5), "train")
    assert len(half) == round(0.5 * corpus.splits["train"]) and half <= times(even, "train")
    assert all(count == times(even, "train")[one] for one, count in half.items())
