from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipelines.corpus.errors import SourceError
from pipelines.corpus.plan import Plan, assign_splits, cut, freeze, load_plan, make_plan, permutation
from pipelines.corpus.sources import open_source
from pipelines.corpus.tar import sample_key

from .inputs import class_folders, idx_folder, tar_folder

keys = hnp.arrays(np.uint64, st.integers(1, 200), unique=True)
GOLDEN_ORDER = [5, 1, 6, 3, 4, 0, 2, 7]
SETTINGS: dict[str, object] = {"seed": 0, "shard_bytes": 2000, "splits": None, "classes": None, "validate": "header"}


def plan_of(base: Path, folder: Path, **settings: object) -> tuple[Plan, object]:
    source = open_source(str(folder))
    return make_plan(str(base), source.entries(), kind=source.kind, source=str(folder), **SETTINGS | settings)  # type: ignore[arg-type]


@given(keys, st.integers(0, 2**63), st.data())
def test_new_samples_never_change_how_old_ones_are_ordered(
    keys: np.ndarray[tuple[int], np.dtype[np.uint64]], seed: int, data: st.DataObject
) -> None:
    order = keys[permutation(keys, seed)]
    assert sorted(order) == sorted(keys)
    kept = data.draw(hnp.arrays(np.bool_, len(keys)))
    few = keys[kept]
    assert np.array_equal(few[permutation(few, seed)], order[np.isin(order, few)])


def test_the_order_is_the_same_for_ever_and_differs_by_seed() -> None:
    keys = np.array([int(sample_key(str(i)), 16) for i in range(8)], np.uint64)
    assert permutation(keys, 0).tolist() == GOLDEN_ORDER
    assert permutation(keys, 1).tolist() != GOLDEN_ORDER


def test_splits_take_their_fractions_and_growing_a_corpus_moves_no_sample() -> None:
    keys = np.array([int(sample_key(f"a/{i}.png"), 16) for i in range(20_000)], np.uint64)
    fractions = {"train": 0.7, "val": 0.08, "test": 0.22}
    parts = assign_splits(keys, fractions)
    shares = np.bincount(parts, minlength=3) / len(keys)
    assert np.abs(shares - list(fractions.values())).max() < 0.01
    assert np.array_equal(assign_splits(keys[:77], fractions), parts[:77])


@given(hnp.arrays(np.int64, st.integers(1, 300), elements=st.integers(0, 5000)), st.integers(1, 20_000))
def test_shards_are_runs_of_nearly_equal_source_bytes(
    sizes: np.ndarray[tuple[int], np.dtype[np.int64]], shard_bytes: int
) -> None:
    numbers = cut(sizes, shard_bytes)
    assert numbers[0] == 0 and set(np.diff(numbers)) <= {0, 1}
    share = sizes.sum() / max(1, -(-int(sizes.sum()) // shard_bytes))
    for shard in range(numbers[-1] + 1):
        assert sizes[numbers == shard].sum() <= share + sizes.max() + 1


@pytest.mark.parametrize("make", [lambda base: class_folders(base, {"a": 20, "b": 21}), idx_folder, tar_folder])
def test_a_frozen_plan_gives_back_every_sample_once_in_shards_of_one_split(make: object, tmp_path: Path) -> None:
    folder = make(tmp_path / "s")  # type: ignore[operator]
    plan, listing = plan_of(tmp_path / "c", folder, splits={"train": 0.7, "val": 0.3})
    freeze(plan, listing)  # type: ignore[arg-type]
    loaded = load_plan(plan.uri)
    assert loaded == plan
    entries = open_source(str(folder)).entries()
    rows = [row for shard in loaded.shards for row in loaded.rows(shard.number)]
    assert sorted(row.path for row in rows) == sorted(entries.path)
    assert [len(loaded.rows(shard.number)) for shard in loaded.shards] == [shard.rows for shard in loaded.shards]
    assert len(loaded.shards) > 3 and {shard.name for shard in loaded.shards} == {
        f"{shard.split}-{plan.digest[:12]}-{shard.number:06d}.tar" for shard in loaded.shards
    }


def test_a_listing_in_several_parts_is_read_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.corpus.plan.PART_SHARDS", 3)
    plan, listing = plan_of(tmp_path / "c", class_folders(tmp_path / "s", {"a": 20, "b": 21}), shard_bytes=700)
    freeze(plan, listing)  # type: ignore[arg-type]
    assert len(list((tmp_path / "c").rglob("listing/*.parquet"))) == -(-len(plan.shards) // 3) > 2
    assert sum(len(plan.rows(shard.number)) for shard in plan.shards) == 41


def test_everything_that_decides_a_shard_is_in_the_name_of_the_plan(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "s", {"a": 20, "b": 21})
    base = plan_of(tmp_path / "c", folder)[0].digest
    assert plan_of(tmp_path / "elsewhere", folder)[0].digest == base
    for changed in ({"seed": 1}, {"shard_bytes": 999}, {"splits": {"train": 0.5, "val": 0.5}}, {"classes": ["b", "a"]}):
        assert plan_of(tmp_path / "c", folder, **changed)[0].digest != base
    assert plan_of(tmp_path / "c", folder, validate="decode")[0].digest != base
    (folder / "a" / "0000.png").touch()
    assert plan_of(tmp_path / "c", folder)[0].digest != base


def test_samples_of_a_tar_keep_their_order_and_whole_tars_are_permuted(tmp_path: Path) -> None:
    _, listing = plan_of(tmp_path / "c", tar_folder(tmp_path / "s", tars=9, samples=4))
    tars = [path.split("/")[0] for path in listing.table()["path"].to_pylist()]  # type: ignore[attr-defined]
    runs = [tars[i] for i in range(0, 36, 4)]
    assert tars == [tar for tar in runs for _ in range(4)] and runs != sorted(runs) and len(set(runs)) == 9
    offsets = listing.table()["offset"].to_pylist()  # type: ignore[attr-defined]
    assert all(offsets[i : i + 4] == sorted(offsets[i : i + 4]) for i in range(0, 36, 4))


def test_fractions_divide_train_and_leave_the_other_splits_of_the_source_alone(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path / "c", idx_folder(tmp_path / "s"), splits={"train": 0.8, "val": 0.2})
    rows = {name: sum(s.rows for s in plan.shards if s.split == name) for name in ("train", "val", "test")}
    assert rows["test"] == 20 and rows["train"] + rows["val"] == 60 and rows["val"] > 2
    with pytest.raises(SourceError, match="has its own split 'test'"):
        plan_of(tmp_path / "c", tmp_path / "s", splits={"train": 0.8, "test": 0.2})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"classes": ["a", "x"]}, "has class 'b', which is not in `classes`"),
        ({"splits": {"train": 0.999999, "val": 0.000001}}, "split 'val' would be empty"),
    ],
)
def test_a_recipe_that_does_not_fit_its_source_is_refused(
    settings: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=words):
        plan_of(tmp_path / "c", class_folders(tmp_path / "s", {"a": 3, "b": 3}), **settings)


@pytest.mark.parametrize("names, words", [(["a", "b"], r"labels 0\.\.3, classes names 2"), (list("wxyz"), None)])
def test_numbered_labels_need_a_name_each(names: list[str], words: str | None, tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "s")
    if words is None:
        assert plan_of(tmp_path / "c", folder, classes=names)[0].class_names == tuple(names)
        (folder / "classes.txt").write_text("1\n2\n3\n4\n")
        words = "names its classes 1, 2, 3, 4, the recipe w, x, y, z"
    with pytest.raises(SourceError, match=words):
        plan_of(tmp_path / "c", folder, classes=names)


def test_given_classes_decide_the_labels(tmp_path: Path) -> None:
    plan, listing = plan_of(tmp_path / "c", class_folders(tmp_path / "s", {"a": 2, "b": 2}), classes=["z", "b", "a"])
    labels = {
        path[0]: label for path, label in zip(*(listing.table()[n].to_pylist() for n in ("path", "label")), strict=True)
    }  # type: ignore[attr-defined]
    assert plan.class_names == ("z", "b", "a") and labels == {"a": 2, "b": 1}
