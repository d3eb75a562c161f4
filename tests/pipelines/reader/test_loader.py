"""The door: what comes out of it is the order law's, whatever is killed, resumed or split over ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.batch import Batch
from pipelines.corpus.manifest import Corpus
from pipelines.reader import wheels
from pipelines.reader.loader import AugmentConfig, BatchStream, ReaderConfig, eval_batches, train_batches
from pipelines.reader.order import Order, OrderError
from pipelines.reader.rows import SampleError
from vit_model import preprocess

from .conftest import GREY

LOCAL = ReaderConfig(backend="local")
STEPS = 30
AUGMENTS = [AugmentConfig(), AugmentConfig(crop="random", padding=2), AugmentConfig(crop="none", flip=False)]


def stream(corpus: Corpus, **changes: Any) -> BatchStream:
    settings: dict[str, Any] = dict(
        batch_size=16, seed=5, spec=GREY, augment=AUGMENTS[0], total_steps=STEPS, lanes=4, window_pages=2, reader=LOCAL
    )
    return train_batches(corpus, **settings | changes)


def trace(batches: BatchStream) -> list[tuple[int | None, list[tuple[int, str]]]]:
    """Step, and each row's sample id with a hash of its pixels."""
    return [(batch.step, rows(batch)) for batch in batches]


def rows(batch: Batch) -> list[tuple[int, str]]:
    pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
    return list(zip(batch.sample_ids.tolist(), pixels, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(corpus: Corpus) -> list[tuple[int | None, list[tuple[int, str]]]]:
    return trace(stream(corpus))


def test_batches_hold_the_rows_that_the_law_names(corpus: Corpus) -> None:
    order = Order(corpus.pages("train").rows, seed=5, lanes=4, batch_size=16, window_pages=2)
    labels = dict(zip(*(corpus.samples("train")[name].to_pylist() for name in ("sample_id", "label")), strict=True))
    for step, batch in enumerate(stream(corpus)):
        assert batch.step == step
        assert batch.sample_ids.tolist() == order.step_rows(step).tolist()
        assert batch.labels.tolist() == [labels[i] for i in batch.sample_ids.tolist()]
        assert batch.weights.tolist() == [1.0] * 16
        assert batch.images.shape == (16, 1, 12, 12)


def test_the_first_epoch_shows_every_image_once_before_any_twice(corpus: Corpus, uninterrupted: Any) -> None:
    ids = [i for _, batch in uninterrupted for i, _ in batch]
    assert len(set(ids[: 6 * 16])) == 6 * 16
    assert set(ids) == set(range(103))


@settings(max_examples=15)
@given(start=st.integers(0, STEPS))
def test_a_resumed_run_is_the_tail_of_the_uninterrupted_one(corpus: Corpus, uninterrupted: Any, start: int) -> None:
    assert trace(stream(corpus, start_step=start)) == uninterrupted[start:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 7])
def test_ranks_together_give_the_same_pixels(corpus: Corpus, uninterrupted: Any, world_size: int, start: int) -> None:
    ranks = [trace(stream(corpus, rank=r, world_size=world_size, start_step=start)) for r in range(world_size)]
    for (step, whole), *parts in zip(uninterrupted[start:], *ranks, strict=True):
        assert {part[0] for part in parts} == {step}
        assert sorted(row for _, part in parts for row in part) == sorted(whole)


@pytest.mark.parametrize("augment", AUGMENTS, ids=lambda config: config.crop)
def test_pixels_depend_on_seed_epoch_and_sample_alone(corpus: Corpus, augment: AugmentConfig) -> None:
    """Other lanes, batches and windows give another order, but an image of an epoch looks the same in all."""
    seen: dict[int, set[str]] = {}
    for changes in ({}, {"lanes": 1, "window_pages": 5}, {"batch_size": 32, "lanes": 8}):
        settings = {"batch_size": 16, **changes, "augment": augment}
        for batch in stream(corpus, total_steps=96 // settings["batch_size"], **settings):
            for sample_id, pixels in rows(batch):
                seen.setdefault(sample_id, set()).add(pixels)
    assert {len(pixels) for pixels in seen.values()} == {1}


def test_epochs_and_seeds_show_other_crops(corpus: Corpus, uninterrupted: Any) -> None:
    shown: dict[int, list[str]] = {}
    for _, batch in uninterrupted:
        for sample_id, pixels in batch:
            shown.setdefault(sample_id, []).append(pixels)
    again = [pixels for pixels in shown.values() if len(pixels) > 1]
    assert np.mean([len(set(pixels)) > 1 for pixels in again]) > 0.95


def test_pages_are_fetched_once_per_epoch_and_lane_border(corpus: Corpus) -> None:
    steps = 103 // 16
    with stream(corpus, total_steps=steps) as batches:
        for _ in batches:
            pass
        assert batches.stats().pages <= len(corpus.pages("train")) + 4 - 1
        assert batches.stats().images == steps * 16


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_shows_every_sample_exactly_once(corpus: Corpus, world_size: int) -> None:
    ids, lengths = [], set()
    for rank in range(world_size):
        batches = list(
            eval_batches(
                corpus,
                split="test",
                batch_size=4 * world_size,
                spec=GREY,
                rank=rank,
                world_size=world_size,
                reader=LOCAL,
            )
        )
        lengths.add(len(batches))
        for batch in batches:
            assert len(batch) == 4
            assert (batch.weights == (batch.sample_ids >= 0)).all()
            assert not batch.images[batch.sample_ids < 0].any()
            ids += batch.sample_ids[batch.sample_ids >= 0].tolist()
    assert ids == list(range(103, 120))
    assert len(lengths) == 1, "ranks must take part in equally many collectives"


def test_stopping_early_gives_everything_back(corpus: Corpus) -> None:
    with stream(corpus, total_steps=1000) as batches:
        next(batches)
    assert list(batches) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lanes": 3}, "lanes=3 does not divide batch_size=16"),
        ({"lanes": 16}, "fewer than 2"),
        ({"world_size": 8}, "8 workers share 4 lanes"),
        ({"start_step": 31}, "outside 0..total_steps=30"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"seed": -1}, "seed=-1"),
        ({"window_pages": 0}, "window_pages=0"),
    ],
)
def test_impossible_settings_are_refused_before_reading(corpus: Corpus, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OrderError, match=words):
        stream(corpus, **changes)


def test_an_evaluation_batch_must_be_divisible(corpus: Corpus) -> None:
    with pytest.raises(OrderError, match="batch_size=7 is not divisible by 2 workers"):
        eval_batches(corpus, split="test", batch_size=7, spec=GREY, world_size=2)


def test_a_world_without_workers_is_refused(corpus: Corpus) -> None:
    with pytest.raises(OrderError, match="world_size=0: at least one worker reads"):
        eval_batches(corpus, split="test", batch_size=4, spec=GREY, world_size=0)
    with pytest.raises(OrderError, match="world_size=0: at least one worker reads"):
        stream(corpus, world_size=0)


@pytest.mark.parametrize("evaluation", [False, True])
def test_a_decoder_that_fails_by_its_own_fault_names_shard_and_key(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, evaluation: bool
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("a fault of the program")

    for name in ("decode_image", "load_image"):
        monkeypatch.setattr(preprocess, name, fail)
    monkeypatch.setattr(wheels, "open_plain", lambda *_: None)
    reader = ReaderConfig(backend="local", engine="wheels")
    with pytest.raises(SampleError, match=r"\.tar, sample [0-9a-f]{16}: the decoder failed with TypeError: a fault"):
        if evaluation:
            next(eval_batches(corpus, split="test", batch_size=4, spec=GREY, reader=reader))
        else:
            next(stream(corpus, reader=reader))
