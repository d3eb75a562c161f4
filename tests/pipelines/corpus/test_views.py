"""Versions over shards that other versions hold: subsets, mixtures, withdrawn and added images, read as they say."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import store
from pipelines.config import RecipeError
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.grow import exclude, versions
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.corpus.resize import ResizeConfig
from pipelines.corpus.selection import first_per_class, random_fraction, repeat_factors, whole_times
from pipelines.corpus.small import write_corpus
from pipelines.identity import canonical, deciding_fields
from pipelines.mix import MixPart, MixRecipe, make_mix
from pipelines.reader.loader import AugmentConfig, ReaderConfig, eval_batches, train_batches
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.store import local
from pipelines.subset import SubsetRecipe, make_subset
from vit_model.preprocess import InputSpec

from .inputs import class_folders, picture, tar_bytes

GREY = InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", 5)


def write(folder: Path, classes: str = "abc", train: int = 60, first: int = 0) -> Corpus:
    """Class i holds half as many as class i - 1; every fourth image is a test image."""
    rows = []
    for i in range(train):
        name = next((c for place, c in enumerate(classes) if i % 2 ** (place + 1)), classes[0])
        rows.append(("test" if i % 4 == 3 else "train", name, f"{name}/{i}.png", picture(first + i)))
    return write_corpus(folder, rows, class_names=list(classes), shard_samples=16)


def read_train(corpus: Corpus, split: str = "train", lanes: int = 2) -> tuple[list[int], dict[int, int]]:
    """All sample ids of one epoch of training, and the label of each."""
    total = corpus.splits[split]
    steps = -(-total // 4) + 2
    with train_batches(
        corpus, split=split, batch_size=4, seed=3, spec=GREY, augment=AugmentConfig(), total_steps=steps, lanes=lanes,
        window_pages=2, reader=ReaderConfig(backend="local"),
    ) as batches:  # fmt: skip
        found = [(i, label) for b in batches for i, label in zip(b.sample_ids.tolist(), b.labels.tolist(), strict=True)]
        assert not batches.stats().bad
    return [i for i, _ in found], dict(found)


def check_reading(corpus: Corpus, split: str = "train") -> None:
    """Training and evaluation give the samples of the table, with its labels, each id once in an epoch."""
    table = corpus.samples(split)
    ids = table["sample_id"].to_pylist()
    assert ids == list(range(corpus.first_sample(split), corpus.first_sample(split) + corpus.splits[split]))
    labels = dict(zip(ids, table["label"].to_pylist(), strict=True))
    seen, trained = read_train(corpus, split)
    assert set(seen) == set(ids) and trained == labels
    with eval_batches(corpus, split=split, batch_size=7, spec=GREY, reader=ReaderConfig(backend="local")) as batches:
        rows = [
            (i, label)
            for b in batches
            for i, label, weight in zip(b.sample_ids.tolist(), b.labels.tolist(), b.weights.tolist(), strict=True)
            if weight
        ]
    assert rows == list(labels.items())


def subset(corpus: Corpus, folder: Path, **settings: Any) -> Corpus:
    values = {"corpus": corpus.reference, "destination": str(folder), "materialise": "never"} | settings
    return make_subset(SubsetRecipe(**values), corpus)


def paths(corpus: Corpus, split: str = "train") -> list[str]:
    return list(corpus.samples(split)["source"].to_pylist())


def test_random_subsets_are_exact_nested_and_read_like_any_corpus(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    parts = {f: subset(corpus, tmp_path / f"s{f}", fraction=f) for f in (0.1, 0.3, 1.0)}
    assert [one.splits["train"] for one in parts.values()] == [4, 14, 45]  # round(0.1 * 45), ...
    assert set(paths(parts[0.1])) < set(paths(parts[0.3])) < set(paths(parts[1.0])) == set(paths(corpus))
    for one in parts.values():
        assert one.splits["test"] == corpus.splits["test"] and paths(one, "test") == paths(corpus, "test")
        check_reading(one)
        check_reading(one, "test")
    assert parts[1.0].digest == corpus.digest  # All of it, in the same order, is the same corpus.
    again = subset(corpus, tmp_path / "again", fraction=0.3)
    assert again.digest == parts[0.3].digest
    assert subset(corpus, tmp_path / "other", fraction=0.3, seed=1).digest != again.digest


def test_the_first_of_each_class_are_taken_in_manifest_order(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    few = subset(corpus, tmp_path / "s", per_class=3)
    assert Counter(path[0] for path in paths(few)) == {"a": 3, "b": 3, "c": 3}
    for name in "abc":
        assert [p for p in paths(few) if p[0] == name] == [p for p in paths(corpus) if p[0] == name][:3]
    check_reading(few)


def test_rare_classes_come_more_often_and_an_epoch_keeps_its_length(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    even = subset(corpus, tmp_path / "s", balance=0.6)
    before, after = (Counter(path[0] for path in paths(one)) for one in (corpus, even))
    shares = [count / 45 for count in before.values()]
    for name, share in zip(before, shares, strict=True):
        wanted = before[name] * max(1.0, (0.6 / share) ** 0.5)
        assert abs(after[name] - wanted) <= 3 and after[name] >= before[name]
    assert after["c"] > 1.5 * before["c"] and even.splits["train"] == sum(after.values())
    check_reading(even)


def test_mixtures_join_label_spaces_by_name_and_weigh_whole_images(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", "abc"), write(tmp_path / "two", "bdc", 24, first=500)
    mixed = make_mix(
        MixRecipe(
            corpora={
                "one": MixPart(corpus=one.reference, weight=1.0),
                "two": MixPart(corpus=two.reference, weight=2.0, classes={"b": "b", "d": "a"}),
            },
            destination=str(tmp_path / "m"),
            materialise="never",
        ),
        {"one": one, "two": two},
    )
    assert mixed.class_names == ("a", "b", "c") and mixed.head.sources[1].labels == (1, 0, -1)
    counts = Counter((row["source"], row["label"]) for row in mixed.samples("train").to_pylist())
    kept = [row for row in two.samples("train").to_pylist() if two.class_names[row["label"]] != "c"]
    assert sum(counts.values()) == mixed.splits["train"] and set(Counter(counts.values())) <= {1, 2, 3, 4, 5, 6, 7}
    times = (mixed.splits["train"] - 45) / len(kept)
    assert abs(times - 2 * 45 / len(kept)) < 1  # Twice as many images of the second as of the first.
    assert mixed.splits["test"] == one.splits["test"] + sum(
        two.class_names[row["label"]] != "c" for row in two.samples("test").to_pylist()
    )
    check_reading(mixed)
    check_reading(mixed, "test")


def mixture(folder: Path, **corpora: MixPart) -> MixRecipe:
    return MixRecipe(corpora=corpora, destination=str(folder), materialise="never", num_workers=0)


def test_the_order_of_a_mixture_is_part_of_its_identity(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", "bc"), write(tmp_path / "two", "ab", 24, first=500)
    parts = {"one": MixPart(corpus=one.reference), "two": MixPart(corpus=two.reference)}
    recipes = [
        mixture(tmp_path / "m", **{name: parts[name] for name in order}) for order in (["one", "two"], ["two", "one"])
    ]
    corpora = {"one": one, "two": two}
    made = [make_mix(given, {name: corpora[name] for name in given.corpora}) for given in recipes]
    assert made[0].class_names == ("b", "c", "a") and made[1].class_names == ("a", "b", "c")
    first, second = (canonical(deciding_fields(given)["corpora"]) for given in recipes)
    assert first != second and first.startswith('{"one":')  # By name: as it always was.


def test_weights_and_balance_multiply(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", "ab", 2000), write(tmp_path / "two", "ab", 3000, first=5000)
    given = mixture(
        tmp_path / "m", one=MixPart(corpus=one.reference, weight=1.0), two=MixPart(corpus=two.reference, weight=1.0)
    )
    mixed = make_mix(dataclasses.replace(given, balance=0.6), {"one": one, "two": two})
    labels = mixed.samples("train")["label"].to_pylist()
    before = Counter(one.samples("train")["label"].to_pylist())
    total = before + Counter(two.samples("train")["label"].to_pylist())
    repeat = max(1.0, (0.6 / (total[1] / total.total())) ** 0.5)
    wanted = (1.5 * before[1] + total[1] - before[1]) * repeat
    assert labels.count(1) == pytest.approx(wanted, rel=0.03)


def test_a_second_draw_knows_nothing_of_the_first() -> None:
    ones = np.ones(100_000, np.uint8)
    for seed in range(3):
        assert whole_times(whole_times(ones, 1.3, seed), 1.3, seed).mean() == pytest.approx(1.69, rel=0.01)
        assert whole_times(whole_times(ones, 1.5, seed), 1.25, seed).mean() == pytest.approx(1.875, rel=0.01)


def test_copies_leave_a_mixture_and_what_stays_comes_as_often_as_before(tmp_path: Path) -> None:
    one = class_folders(tmp_path / "a", {"cat": 10, "dog": 10})
    (one / "cat" / "copy.png").write_bytes((one / "cat" / "0000.png").read_bytes())
    two = tmp_path / "b"
    for i in range(80):
        (two / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        (two / ("cat", "dog")[i % 2] / f"{i}.png").write_bytes(picture(5000 + i))
    corpora = {"a": shard(one, tmp_path / "ca"), "b": shard(two, tmp_path / "cb")}
    given = mixture(
        tmp_path / "m", **{name: MixPart(corpus=one.reference, weight=1.0) for name, one in corpora.items()}
    )
    mixed = make_mix(given, corpora)

    def often(corpus: Corpus) -> Counter[Any]:
        return Counter(corpus.samples("train")["content"].to_pylist())

    before, values = often(mixed), {"destination": str(tmp_path / "o"), "duplicates": "quarantine", "num_workers": 0}
    after = make_corpus(ShardRecipe(source=mixed.reference, **values))  # type: ignore[arg-type]
    assert after.head.rejected == {"duplicate": 1}
    found = often(after)
    assert found.keys() == before.keys() and max(found.values()) > 2
    (fewer,) = (content for content, count in found.items() if count != before[content])
    assert 0 < found[fewer] < before[fewer]
    check_reading(after)


def test_a_subset_can_be_made_of_a_mixture_and_gets_shards_of_its_own(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", "abc"), write(tmp_path / "two", "cde", 24, first=500)
    recipe = MixRecipe(
        corpora={"one": MixPart(corpus=one.reference), "two": MixPart(corpus=two.reference)},
        destination=str(tmp_path / "m"),
        balance=0.5,
        materialise="never",
    )
    mixed = make_mix(recipe, {"one": one, "two": two})
    thin = subset(mixed, tmp_path / "thin", fraction=0.1)
    check_reading(thin)
    recipe_thin = SubsetRecipe(corpus=mixed.reference, destination=str(tmp_path / "own"), fraction=0.1, num_workers=0)
    own = make_subset(recipe_thin, mixed)
    assert not own.head.sources and own.pages("train").useful_part() == 1.0
    assert own.splits == thin.splits

    def content(corpus: Corpus) -> Counter[Any]:
        return Counter((row["content"], row["label"]) for row in corpus.samples("train").to_pylist())

    assert content(own) == content(thin)
    check_reading(own)


def test_withdrawn_images_are_a_version_and_the_old_one_stays(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    victims = [corpus.samples("train")["key"][4].as_py(), corpus.samples("test")["source"][2].as_py()]
    made = exclude(f"{corpus.uri}@current", [*victims, ""], "takedown.txt")
    assert made == open_corpus(f"{corpus.uri}@current") and made.head.parent == corpus.digest
    assert made.splits == {"train": 44, "test": 14} and made.head.rejected == {"withdrawn": 2}
    assert made.head.bad_fraction == 0 and "takedown.txt" in made.quarantine()["detail"][0].as_py()
    gone = set(paths(corpus)) - set(paths(made))
    assert len(gone) == 1 and not gone & set(paths(made, "test"))
    check_reading(made)
    assert len(paths(corpus)) == 45 and len(list((tmp_path / "c" / "shards").iterdir())) == corpus.head.shards
    with pytest.raises(CorpusError, match=r"1 of 1 listed images are not in .* such as 'nobody'"):
        exclude(made.reference, ["nobody"])
    second = exclude(made.reference, paths(made)[:1])
    assert second.splits["train"] == 43 and second.head.rejected == {"withdrawn": 3}
    assert [one.digest for one in versions(corpus.uri)] == [corpus.digest, made.digest, second.digest]


def shard(source: Path, base: Path, **settings: Any) -> Corpus:
    values: dict[str, Any] = {"source": str(source), "destination": str(base), "shard_bytes": 3000, "num_workers": 0}
    return make_corpus(ShardRecipe(**(values | settings)))


def test_new_images_are_appended_as_a_version_and_nothing_is_written_twice(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"cat": 20, "dog": 20})
    parent = shard(source, tmp_path / "c", splits={"train": 0.7, "test": 0.3})
    tars = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "shards").iterdir()}
    assert shard(source, tmp_path / "c", splits={"train": 0.7, "test": 0.3}, append=True) == parent
    class_folders(tmp_path / "more", {"owl": 9, "ant": 9})
    for path in (tmp_path / "more").rglob("*.*"):
        (source / path.parent.name).mkdir(exist_ok=True)
        path.rename(source / path.parent.name / path.name)
    (source / "cat" / "bad.jpg").write_bytes(b"")
    grown = shard(source, tmp_path / "c", splits={"train": 0.7, "test": 0.3}, append=True, max_bad_fraction=0.1)
    assert grown.head.parent == parent.digest and grown == open_corpus(f"{tmp_path / 'c'}@current")
    assert grown.class_names == ("cat", "dog", "ant", "owl") and grown.head.rejected == {"empty": 1}
    assert grown.head.ignored["in_parent"] == 40 and sum(grown.splits.values()) == 58
    assert all(path.stat().st_mtime_ns == time for path, time in tars.items())
    for split in parent.splits:
        assert paths(grown, split)[: parent.splits[split]] == paths(parent, split)
        check_reading(grown, split)
    for row in grown.samples("train").to_pylist():
        assert grown.class_names[row["label"]] == row["source"].split("/")[0]
    last = exclude(grown.reference, ["owl/0000.png"])
    assert last.head.parent == grown.digest and sum(last.splits.values()) == 57
    check_reading(last)


@pytest.mark.parametrize("plans_left", [True, False])
def test_an_image_that_changed_under_its_old_name_stops_an_append_and_one_that_was_touched_does_not(
    plans_left: bool, tmp_path: Path
) -> None:
    source = class_folders(tmp_path / "s", {"cat": 9, "dog": 9})
    shard(source, tmp_path / "c")
    (source / "cat" / "new.png").write_bytes(picture(900))
    parent = shard(source, tmp_path / "c", append=True)
    assert len(parent.head.sources) == 2
    if not plans_left:
        for path in (tmp_path / "c" / "plans").rglob("listing/*"):
            path.unlink()
    os.utime(source / "cat" / "0000.png", (5, 5))
    (source / "dog" / "new.png").write_bytes(picture(901))
    parent = shard(source, tmp_path / "c", append=True)
    assert sum(parent.splits.values()) == 20 and parent.head.ignored["in_parent"] == 19
    (source / "cat" / "0002.png").write_bytes(picture(902))
    (source / "dog" / "0001.jpg").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"2 images have changed since .*: cat/0002.png, dog/0001.jpg; a version"):
        shard(source, tmp_path / "c", append=True)
    assert open_corpus(f"{tmp_path / 'c'}@current") == parent


def test_an_image_that_the_recipe_resized_is_known_by_its_etag_alone(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "s", {"cat": 5, "dog": 5}, size=(60, 50))
    settings: dict[str, Any] = {"resize": ResizeConfig(side="longest", pixels=20), "append": True}
    shard(source, tmp_path / "c", **settings | {"append": False})
    (source / "cat" / "new.png").write_bytes(picture(900))
    assert sum(shard(source, tmp_path / "c", **settings).splits.values()) == 11
    os.utime(source / "cat" / "0000.png", (5, 5))
    with pytest.raises(CorpusError, match="1 images have changed"):
        shard(source, tmp_path / "c", **settings)


def test_a_tar_that_was_written_anew_with_more_samples_gives_its_new_ones(tmp_path: Path) -> None:
    def write(count: int, first: int = 0) -> None:
        members = [((f"{i}.cls", b"%d" % (i % 2)), (f"{i}.png", picture(first + i))) for i in range(count)]
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / "x.tar").write_bytes(tar_bytes([member for pair in members for member in pair]))

    write(6)
    shard(tmp_path / "s", tmp_path / "c")
    write(9)
    grown = shard(tmp_path / "s", tmp_path / "c", append=True)
    assert grown.splits == {"train": 9} and grown.head.ignored["in_parent"] == 6
    write(9, first=50)
    with pytest.raises(CorpusError, match=r"9 images have changed since .* and 6 more"):
        shard(tmp_path / "s", tmp_path / "c", append=True)


def test_adopted_tars_that_name_their_classes_can_be_mixed_and_withdrawn(tmp_path: Path) -> None:
    from pipelines.index import IndexRecipe, adopt_tars

    def adopted(name: str, classes: str) -> Corpus:
        (tmp_path / name).mkdir()
        for tar in range(2):
            members = []
            for i in range(12):
                members += [(f"{i:03d}.cls", classes[i % 3].encode()), (f"{i:03d}.png", picture(i + 100 * tar))]
            (tmp_path / name / f"train-{tar}.tar").write_bytes(tar_bytes(members))
        return adopt_tars(IndexRecipe(source=str(tmp_path / name), num_workers=0)).corpus

    one, two = adopted("one", "abc"), adopted("two", "xby")
    parts = {"one": MixPart(corpus=one.reference, classes={"a": "b", "c": "c"}), "two": MixPart(corpus=two.reference)}
    mixed = make_mix(
        MixRecipe(corpora=parts, destination=str(tmp_path / "m"), materialise="never"), {"one": one, "two": two}
    )
    assert mixed.class_names == ("b", "c", "x", "y") and mixed.splits == {"train": 16 + 24}
    check_reading(mixed)
    made = exclude(one.reference, [one.samples("train")["key"][0].as_py()])
    assert made.splits["train"] < 24
    check_reading(made)


def test_the_command_withdraws_images_and_shows_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.corpus.command import main

    corpus = write(tmp_path / "c")
    (tmp_path / "list.txt").write_text(f"{paths(corpus)[7]}\n\n")
    assert main(["exclude", str(tmp_path / "c"), str(tmp_path / "list.txt")], lambda: None) == 0
    assert main(["versions", str(tmp_path / "c")], lambda: None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 images withdrawn" in lines[0] and lines[1].startswith(corpus.digest[:12]) and lines[2].endswith("current")
    for wrong, words in (["exclude", "x"], "usage"), (["exclude", str(tmp_path / "c"), "/none"], "cannot read /none"):
        with pytest.raises((CorpusError, RecipeError), match=words):
            main(wrong, lambda: None)


# The choices themselves ---------------------------------------------------------------------------------------------

times_given = st.lists(st.integers(0, 3), min_size=1, max_size=80).map(lambda one: np.array(one, np.uint8))


@settings(deadline=None)
@given(times_given, st.floats(0.01, 1), st.integers(0, 2**40))
def test_a_fraction_takes_exactly_its_share_of_what_comes(times: Any, fraction: float, seed: int) -> None:
    chosen = random_fraction(times, fraction, seed)
    there = int((times > 0).sum())
    assert int((chosen > 0).sum()) == (max(1, round(fraction * there)) if there else 0)
    assert ((chosen == times) | (chosen == 0)).all()


@settings(deadline=None)
@given(times_given, st.floats(0.1, 20), st.integers(0, 2**40))
def test_whole_times_are_near_what_was_asked_for(times: Any, factor: float, seed: int) -> None:
    found = whole_times(times, factor, seed)
    assert (np.abs(found - times * factor) < 1).all() and (found[times == 0] == 0).all()
    assert np.array_equal(found, whole_times(times, factor, seed))


def test_choices_that_cannot_be_are_refused(tmp_path: Path) -> None:
    ones, labels = np.ones(6, np.uint8), np.array([0, 0, 0, 0, 0, 1], np.int32)
    assert first_per_class(ones, labels, 2).tolist() == [1, 1, 0, 0, 0, 1]
    assert repeat_factors(ones, labels, 0.5).tolist() == pytest.approx([1, 1, 1, 1, 1, 3**0.5])
    with pytest.raises(CorpusError, match="300 times per epoch, the limit is 255"):
        whole_times(ones, 300.0, 0)
    for values, words in (
        ({}, "nothing is chosen"),
        ({"fraction": 0.0}, "fraction=0"),
        ({"fraction": 0.5, "per_class": 2}, "keep one"),
    ):
        with pytest.raises(ValueError, match=words):
            SubsetRecipe(corpus="x@current", destination="y", **values)  # type: ignore[arg-type]
    corpus = write(tmp_path / "c")
    with pytest.raises(CorpusError, match="names 'x', which"):
        make_mix(
            MixRecipe(
                corpora={
                    "a": MixPart(corpus=corpus.reference, classes={"x": "y"}),
                    "b": MixPart(corpus=corpus.reference),
                },
                destination=str(tmp_path / "m"),
            ),
            {"a": corpus, "b": corpus},
        )


@pytest.mark.parametrize("weight", [float("inf"), float("nan")])
def test_a_weight_is_a_finite_number(weight: float) -> None:
    with pytest.raises(ValueError, match=r"corpora.x.weight=(inf|nan): all have a finite weight above 0"):
        MixRecipe(
            corpora={"x": MixPart(corpus="x@current", weight=weight), "y": MixPart(corpus="y@current", weight=1.0)},
            destination="m",
        )


@pytest.mark.parametrize("part", [{"classes": {}}, {"classes": {"b": "b"}}])
def test_a_weighted_part_without_an_image_in_the_split_is_named(part: dict[str, Any], tmp_path: Path) -> None:
    whole = write(tmp_path / "a")
    test_only = write_corpus(tmp_path / "b", [("test", "ab"[i % 2], f"{i}.png", picture(i)) for i in range(8)])
    corpora = {"x": whole, "y": test_only if "b" in part["classes"] else whole}
    recipe = MixRecipe(
        corpora={"x": MixPart(corpus="x@current", weight=1.0), "y": MixPart(corpus="y@current", weight=5.0, **part)},
        destination=str(tmp_path / "m"),
        num_workers=0,
    )
    with pytest.raises(CorpusError, match=r"corpora.y has a weight, and .* gives no image of split 'train'"):
        make_mix(recipe, corpora)


def test_a_long_line_of_versions_is_shown_in_order(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    digests = [corpus.digest, *(f"{i:064x}" for i in range(1500, 0, -1))]
    head = corpus.head.to_json()
    for parent, digest in pairwise(digests):
        store.write_json(f"{corpus.uri}/manifests/{digest}/head.json", head | {"digest": digest, "parent": parent})
    assert [one.digest for one in versions(corpus.uri)] == digests


def test_rows_of_scattered_shards_of_another_version_are_read_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subset that leaves out every other shard: the manifest behind it is opened once, not once for each."""
    rows = [("train", "ab"[i % 2], f"{i}.png", picture(i)) for i in range(40)]
    corpus = write_corpus(tmp_path / "c", rows, shard_samples=1)
    made = exclude(corpus.reference, corpus.samples("train")["key"].to_pylist()[::2])
    reads: Counter[str] = Counter()
    real = local.read

    def read(uri: str, *rest: Any) -> bytes:
        reads[uri.rpartition("/")[2]] += 1
        return real(uri, *rest)

    monkeypatch.setattr(local, "read", read)
    assert open_corpus(made.reference).samples("train").num_rows == 20
    assert reads["head.json"] == 2 and sum(reads.values()) < 30


def test_an_append_of_nothing_but_new_images_counts_none_as_known(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    source = class_folders(tmp_path / "s", {"x": 2, "y": 2})
    grown = make_corpus(ShardRecipe(source=str(source), destination=corpus.uri, append=True, num_workers=0))
    assert grown.head.samples == corpus.head.samples + 4 and grown.head.ignored == {}
