"""Batches arrive on the device changed as their keys say: whatever was killed, resumed or split over ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from pipelines.batch import Batch
from pipelines.corpus.manifest import Corpus
from pipelines.reader.device import DeviceBatches, changed
from pipelines.reader.levels import Changes
from pipelines.reader.loader import AugmentConfig, ReaderConfig, changes_of, eval_batches, train_batches

from .conftest import CLASSES, GREY

LOCAL = ReaderConfig(backend="local")
AUGMENT = AugmentConfig(policy="randaugment", color_jitter=0.3, mixup=0.8, cutmix=1.0)
STEPS = 14  # Two epochs and a little.


def batches(corpus: Corpus, device: str = "cpu", **options: Any) -> DeviceBatches:
    settings: dict[str, Any] = dict(
        batch_size=16, seed=5, spec=GREY, augment=AUGMENT, total_steps=STEPS, lanes=4, window_pages=2, reader=LOCAL
    )
    stream = train_batches(corpus, **settings | options)
    return DeviceBatches(stream, torch.device(device), changes=changes_of(AUGMENT), seed=5, num_classes=len(CLASSES))


def rows(batch: Batch) -> list[tuple[int, str, list[float]]]:
    pixels = [hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest() for image in batch.images]
    return list(zip(batch.sample_ids.tolist(), pixels, batch.labels.tolist(), strict=True))


@pytest.fixture(scope="module")
def whole(corpus: Corpus) -> list[list[tuple[int, str, list[float]]]]:
    return [rows(batch) for batch in batches(corpus)]


def test_labels_are_shares_of_classes(corpus: Corpus) -> None:
    for batch in batches(corpus, total_steps=3):
        assert batch.labels.shape == (16, len(CLASSES))
        torch.testing.assert_close(batch.labels.sum(dim=1), torch.ones(16))


@pytest.mark.parametrize("start", [1, 6, 13])
def test_a_resumed_run_sees_the_same_changes(corpus: Corpus, whole: Any, start: int) -> None:
    assert [rows(batch) for batch in batches(corpus, start_step=start)] == whole[start:]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_the_same_changes(corpus: Corpus, whole: Any, world_size: int) -> None:
    ranks = [batches(corpus, rank=rank, world_size=world_size) for rank in range(world_size)]
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert sorted(row for part in parts for row in rows(part)) == sorted(expected)


def test_no_changes_leave_a_batch_alone(corpus: Corpus) -> None:
    stream = train_batches(
        corpus, batch_size=16, seed=5, spec=GREY, augment=AugmentConfig(), total_steps=1, lanes=4, reader=LOCAL
    )
    batch = next(stream)
    assert changed(batch, Changes(), 0, 3) is batch


def test_evaluation_is_never_changed(corpus: Corpus) -> None:
    stream = eval_batches(corpus, split="test", batch_size=4, spec=GREY, reader=LOCAL)
    with (
        pytest.raises(ValueError, match="augmentation is for training"),
        DeviceBatches(stream, torch.device("cpu"), changes=Changes("three")) as found,
    ):
        next(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_sees_what_the_cpu_sees(corpus: Corpus) -> None:
    on_gpu = list(batches(corpus, "cuda", pinned=True))
    for ours, theirs in zip(on_gpu, batches(corpus), strict=True):
        assert ours.images.is_cuda and ours.labels.is_cuda
        assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()
        torch.testing.assert_close(ours.labels.cpu(), theirs.labels)
        difference = (ours.images.cpu().int() - theirs.images.int()).abs()
        assert (difference > 1).float().mean() < 0.01  # Sums and ties may round another way.
    with pytest.raises(StopIteration):
        next(batches(corpus, "cuda", pinned=True, start_step=STEPS))
