"""Corpora with several labels an image: batches bear the labels that the tars hold."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.batch import Batch
from pipelines.config import from_dict
from pipelines.corpus.manifest import Corpus
from pipelines.index import IndexRecipe, adopt_tars
from pipelines.mix import MixPart, MixRecipe, make_mix
from pipelines.reader.blocks import rows_of_table, table_of_pixels
from pipelines.reader.device import DeviceBatches
from pipelines.reader.labels import multi_hot, padded
from pipelines.reader.loader import AugmentConfig, ReaderConfig, changes_of, eval_batches, train_batches
from pipelines.reader.pages import Sample
from pipelines.reader.rows import Rows
from pipelines.reader.selection import select
from tests.pipelines.corpus.foreign import Member, foreign_tar
from tests.pipelines.tiny_corpus import COLOURS, write_colour_lists
from vit_model.preprocess import InputSpec

from .conftest import picture

LOCAL = ReaderConfig(backend="local")
SPEC = InputSpec(height=8, width=8)
STEPS = 15  # 96 images in batches of 16: two and a half epochs.


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", 5)
        return write_colour_lists(tmp_path_factory.mktemp("colours"))


def training(corpus: Corpus, augment: AugmentConfig | None = None, **changes: Any) -> DeviceBatches:
    augment = augment or AugmentConfig()
    values: dict[str, Any] = dict(
        batch_size=16, seed=5, spec=SPEC, augment=augment, total_steps=STEPS, lanes=4, window_pages=2, reader=LOCAL
    )
    stream = train_batches(corpus, **values | changes)
    return DeviceBatches(stream, torch.device("cpu"), changes=changes_of(augment), seed=5, num_classes=3)


def evaluation(corpus: Corpus, split: str, size: int = 7, **changes: Any) -> DeviceBatches:
    stream = eval_batches(corpus, split=split, batch_size=size, spec=SPEC, reader=LOCAL, **changes)
    return DeviceBatches(stream, torch.device("cpu"), num_classes=len(corpus.class_names))


def labels_of(batches: DeviceBatches) -> dict[int, list[int]]:
    """Of every sample that counts."""
    return {
        number: row.nonzero()[:, 0].tolist()
        for batch in batches
        for number, row, weight in zip(batch.sample_ids.tolist(), batch.labels, batch.weights.tolist(), strict=True)
        if weight
    }


def labels_in_tars(corpus: Corpus) -> dict[int, list[int]]:
    """Sample ids count the samples of the tars as they follow one another."""
    found: list[list[int]] = []
    for shard in range(len(corpus.layout.samples)):
        with tarfile.open(corpus.shard_uri(shard)) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append(json.load(file)["labels"])
    return dict(enumerate(found))


def test_training_and_evaluation_give_the_labels_that_a_plain_reader_finds_in_the_tars(colours: Corpus) -> None:
    wanted = labels_in_tars(colours)
    assert len(wanted) == 120 and colours.class_names == COLOURS and {len(one) for one in wanted.values()} == {1, 2, 3}
    assert labels_of(training(colours)) == {number: wanted[number] for number in range(96)}
    assert labels_of(evaluation(colours, "val")) == {number: wanted[number] for number in range(96, 120)}


def test_batches_are_multi_hot_on_the_device_and_padding_is_of_nothing(colours: Corpus) -> None:
    for batch in training(colours):
        assert batch.labels.shape == (16, 3) and batch.labels.dtype == torch.float32
        assert set(batch.labels.unique().tolist()) <= {0.0, 1.0} and (batch.labels.sum(dim=1) > 0).all()
    *_, last = evaluation(colours, "val")
    assert last.weights.tolist() == [1.0] * 3 + [0.0] * 4 and not last.labels[3:].any()
    for rank, used in ((0, 0), (1, 1)):  # 24 images for 32 ranks: some have padding alone, as wide as the others' rows.
        (batch,) = evaluation(colours, "val", size=32, rank=rank, world_size=32)
        assert batch.labels.shape == (1, 3) and batch.weights.tolist() == [used] and bool(batch.labels.any()) == used


def rows(batch: Batch) -> list[tuple[int, str, list[float]]]:
    pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
    return list(zip(batch.sample_ids.tolist(), pixels, batch.labels.tolist(), strict=True))


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(mixup=0.8, cutmix=1.0)], ids=["plain", "mixed"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 7])
def test_each_sample_comes_once_an_epoch_with_its_labels_whatever_the_ranks(
    colours: Corpus, augment: AugmentConfig, world_size: int, start: int
) -> None:
    whole = [rows(batch) for batch in training(colours, augment)]
    for epoch in range(STEPS * 16 // 96):
        assert sorted(row[0] for step in whole[6 * epoch : 6 * epoch + 6] for row in step) == list(range(96))
    ranks = [training(colours, augment, rank=r, world_size=world_size, start_step=start) for r in range(world_size)]
    for expected, *parts in zip(whole[start:], *ranks, strict=True):
        assert sorted(row for part in parts for row in rows(part)) == sorted(expected)


def test_mixed_labels_are_the_shares_of_two_rows(colours: Corpus) -> None:
    wanted = labels_in_tars(colours)
    for batch in training(colours, AugmentConfig(mixup=0.8), total_steps=3):
        for number, row in zip(batch.sample_ids.tolist(), batch.labels, strict=True):
            own = torch.zeros(3)
            own[wanted[number]] = 1.0
            assert (row[own > 0] >= 0.5).all() and (row[own == 0] <= 0.5).all()


def test_names_and_single_labels_beside_lists_in_adopted_tars(tmp_path: Path) -> None:
    def member(key: str, described: dict[str, Any], number: int) -> list[Member]:
        return [(f"{key}.json", json.dumps(described).encode()), (f"{key}.png", picture(number, mode="RGB"))]

    lists = [member(f"a{i}", {"labels": ["owl", "cat"][: 1 + i % 2]}, i) for i in range(6)]
    single = [member(f"b{i}", {"label": ["dog", "cat"][i % 2]}, 10 + i) for i in range(4)]
    (tmp_path / "a-train.tar").write_bytes(foreign_tar([part for one in lists for part in one]))
    (tmp_path / "b-train.tar").write_bytes(foreign_tar([part for one in single for part in one]))
    named = [("c0.cls", b"dog"), ("c0.png", picture(20, mode="RGB"))]
    (tmp_path / "c-train.tar").write_bytes(foreign_tar(named))
    corpus = adopt_tars(from_dict(IndexRecipe, {"source": str(tmp_path), "num_workers": 0})).corpus
    assert corpus.class_names == ("cat", "dog", "owl")
    wanted = [[2], [0, 2]] * 3 + [[1], [0]] * 2 + [[1]]
    assert list(labels_of(evaluation(corpus, "train")).values()) == wanted
    assert corpus.samples("train")["labels"].to_pylist() == wanted


def test_a_mixture_gives_the_labels_of_its_own_classes(colours: Corpus, tmp_path: Path) -> None:
    others = write_colour_lists(tmp_path / "others", seed=1)
    mixed = make_mix(
        MixRecipe(
            corpora={
                "one": MixPart(corpus=colours.reference, classes={"red": "warm", "blue": "blue"}),
                "two": MixPart(corpus=others.reference),
            },
            destination=str(tmp_path / "m"),
            materialise="never",
        ),
        {"one": colours, "two": others},
    )
    assert mixed.head.multi_label and mixed.class_names == ("blue", "warm", "green", "red")
    for split in ("train", "val"):
        table = mixed.samples(split)
        wanted = {row["sample_id"]: sorted(row["labels"]) for row in table.to_pylist()}
        assert len(wanted) == mixed.splits[split] < 2 * colours.splits[split], (
            "images that are green alone are left out"
        )
        assert labels_of(evaluation(mixed, split)) == wanted
    for batch in eval_batches(mixed, split="val", batch_size=6, spec=SPEC, reader=LOCAL):
        used = batch.labels >= 0  # As it comes from the stream.
        assert batch.labels.dtype == torch.int64 and (used[:, 1:] <= used[:, :-1]).all(), "-1 comes after the numbers"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (b'"labels":[0]', b'"labels":[3]', "bad_label"),
        (b'"labels":[0]', b'"labels":[ ]', "missing_label"),
        (b'"labels":[0]', b'"labelz":[0]', "missing_label"),
        (b'"labels":[0]', b'"labels":"a"', "missing_label"),
    ],
)
def test_what_is_no_list_of_the_classes_is_a_bad_sample_of_weight_zero(
    before: bytes, after: bytes, reason: str, tmp_path: Path
) -> None:
    corpus = write_colour_lists(tmp_path, train=24)
    is_blue = [number for number, labels in labels_in_tars(corpus).items() if labels == [0] and number < 24]
    for shard in range(len(corpus.layout.samples)):
        path = Path(corpus.shard_uri(shard))
        path.write_bytes(path.read_bytes().replace(before, after))
    stream = eval_batches(corpus, split="train", batch_size=8, spec=SPEC, reader=LOCAL)
    batches = list(DeviceBatches(stream, torch.device("cpu"), num_classes=3))
    bad = [
        i for b in batches for i, weight in zip(b.sample_ids.tolist(), b.weights.tolist(), strict=True) if not weight
    ]
    assert bad == is_blue and stream.stats().bad == {reason: len(is_blue)}
    assert all(not batch.labels[batch.weights == 0].any() for batch in batches)


@pytest.mark.parametrize("cut", [1, 2, 5, 100])
def test_lists_survive_any_joining_and_slicing_of_their_blocks(cut: int) -> None:
    lists: list[list[tuple[int, ...]]] = [[(3,), (), (0, 4)], [(1, 2, 3), ()], [(), ()], [(5,)]]
    tables, at = [], 0
    for one in lists:
        n = len(one)
        ids = np.arange(at, at + n)
        images = np.zeros((n, 3, 2, 2), np.uint8)
        weights, faults = np.ones(n, np.float32), [""] * n
        tables.append(table_of_pixels(Rows(0, at, 0, images, padded(one), weights, ids, faults, [])))
        at += n
    table = pa.concat_tables(tables)
    blocks = [table.slice(start, cut) for start in range(0, len(table), cut)]
    found = [labels for block in blocks for rows in rows_of_table(block, (3, 2, 2)) for labels in rows.labels.tolist()]
    assert [tuple(label for label in labels if label >= 0) for labels in found] == [
        one for part in lists for one in part
    ]


@pytest.mark.parametrize("label", [1, (1,), (1, 3)])
def test_a_label_that_the_mixture_leaves_out_is_a_bad_one(label: Any) -> None:
    """The manifest lists no such sample: what stands in the tar is damaged."""
    sample, good = Sample(label=label, name="x.tar, sample a"), Sample(label=2, name="b")
    select([sample, good], None, (0, -1, 1, -1))
    assert sample.fault == "bad_label: x.tar, sample a: a class that this corpus leaves out"
    assert (good.label, good.fault) == (1, "") and sample.label in (0, ())


def test_multi_hot_rows_have_a_one_at_each_of_their_numbers() -> None:
    found = multi_hot(torch.from_numpy(padded([(0, 3), (), (2,), (0, 1, 2, 3)])), 4)
    assert found.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]
    assert padded([]).shape == (0, 1)
