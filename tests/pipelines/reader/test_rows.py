"""What is bad keeps its place with weight 0 and is counted by reason; what is not the manifest's is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.batch import Batch
from pipelines.corpus.manifest import Corpus
from pipelines.reader.fetch import FetchError, PageSpan, fetch
from pipelines.reader.loader import AugmentConfig, BatchStream, ReaderConfig, train_batches
from pipelines.reader.rows import SampleError

from .conftest import GREY, picture

FILES = [picture(i) for i in range(40)]


def stream(corpus: Corpus, **reader: Any) -> BatchStream:
    return train_batches(
        corpus,
        batch_size=8,
        seed=1,
        spec=GREY,
        augment=AugmentConfig(),
        total_steps=5,
        lanes=2,
        reader=ReaderConfig(backend="local", **reader),
    )


def shard_path(corpus: Corpus, number: int = 0) -> Path:
    return Path(corpus.shard_uri(number))


def damage(corpus: Corpus, find: bytes, replace: bytes) -> None:
    """Change bytes of the first shard in place; its size stays."""
    path = shard_path(corpus)
    data = path.read_bytes()
    assert find in data
    assert len(find) == len(replace)
    path.write_bytes(data.replace(find, replace, 1))


def by_id(batches: BatchStream) -> dict[int, tuple[float, bytes, int]]:
    return {
        sample_id: (weight, image.numpy().tobytes(), label)
        for batch in batches
        for sample_id, weight, image, label in zip(
            batch.sample_ids.tolist(), batch.weights.tolist(), batch.images, batch.labels.tolist(), strict=True
        )
    }


@pytest.fixture
def whole(make_corpus: Callable[..., Corpus]) -> dict[int, tuple[float, bytes, int]]:
    return by_id(stream(make_corpus(FILES, "whole")))


def test_a_damaged_image_is_masked_and_all_others_are_untouched(
    make_corpus: Callable[..., Corpus], whole: dict[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    corpus = make_corpus(FILES)
    middle = FILES[3][60:90]
    damage(corpus, middle, bytes(byte ^ 0x5A for byte in middle))
    batches = stream(corpus)
    seen = by_id(batches)
    assert seen.keys() == whole.keys()
    assert seen[3][0] == 0
    assert not any(seen[3][1])
    assert {i: row for i, row in seen.items() if i != 3} == {i: row for i, row in whole.items() if i != 3}
    assert batches.stats().bad == {"undecodable": 1}
    assert batches.stats().read_cpu_seconds > 0
    assert "shards/train-" in caplog.text


def test_a_damaged_tar_header_masks_the_rest_of_its_page_alone(
    make_corpus: Callable[..., Corpus], whole: dict[int, Any]
) -> None:
    corpus = make_corpus(FILES)
    path = shard_path(corpus)
    data = bytearray(path.read_bytes())
    at = data.find(FILES[7]) - 512  # Header of the third image of the second page (rows 5 to 9).
    data[at + 124] ^= 1
    path.write_bytes(data)
    batches = stream(corpus)
    seen = by_id(batches)
    masked = {i for i, row in seen.items() if row[0] == 0}
    assert masked == {7, 8, 9}
    assert {i: row for i, row in seen.items() if i not in masked} == {
        i: row for i, row in whole.items() if i not in masked
    }
    assert sum(batches.stats().bad.values()) == 3


def test_a_label_that_is_no_class_is_masked(make_corpus: Callable[..., Corpus]) -> None:
    corpus = make_corpus(FILES)
    path = shard_path(corpus)
    data = bytearray(path.read_bytes())
    data[512] = ord("9")  # The first member is KEY.cls.
    path.write_bytes(data)
    batches = stream(corpus)
    assert by_id(batches)[0][0] == 0
    assert batches.stats().bad == {"bad_label": 1}


def test_the_policy_fail_stops_with_shard_and_key(make_corpus: Callable[..., Corpus]) -> None:
    corpus = make_corpus(FILES)
    middle = FILES[3][60:90]
    damage(corpus, middle, bytes(30))
    with pytest.raises(SampleError, match=rf"undecodable: {shard_path(corpus)}, sample [0-9a-f]{{16}}: .*on_bad=mask"):
        list(stream(corpus, on_bad="fail"))


def test_too_many_bad_images_stop_the_run(make_corpus: Callable[..., Corpus]) -> None:
    corpus = make_corpus(FILES)
    path = shard_path(corpus)
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"JDAT"))
    with pytest.raises(SampleError, match=r"more than max_bad_fraction=0\.01"):
        list(stream(corpus, max_bad_fraction=0.01))


@pytest.mark.parametrize("change", ["missing", "truncated", "longer"])
def test_a_shard_that_is_not_the_manifests_is_a_loud_error(make_corpus: Callable[..., Corpus], change: str) -> None:
    corpus = make_corpus(FILES)
    path = shard_path(corpus, 1)
    data = path.read_bytes()
    path.unlink()
    if change != "missing":
        path.write_bytes(data[:-512] if change == "truncated" else data + bytes(512))
    with pytest.raises(FetchError, match=f"{path} (is missing|has .* bytes, the manifest says)"):
        list(stream(corpus))


def test_a_shard_replaced_in_mid_run_is_a_loud_error(make_corpus: Callable[..., Corpus]) -> None:
    corpus = make_corpus(FILES)
    list(stream(corpus))  # The process now knows the shards.
    path = shard_path(corpus, 1)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(FetchError, match=f"{path} was replaced while it was read"):
        list(stream(corpus))


def test_a_page_with_other_samples_than_the_manifest_says_is_a_loud_error(make_corpus: Callable[..., Corpus]) -> None:
    corpus = make_corpus(FILES)
    path = shard_path(corpus)
    data = path.read_bytes()
    start = data.find(FILES[1]) - 1024 - 512  # An end-of-archive block in mid-page ends the page early.
    path.write_bytes(data[:start] + bytes(1024) + data[start + 1024 :])
    with pytest.raises(SampleError, match=r"holds \d samples, the manifest says 5"):
        list(stream(corpus))


def test_adjacent_pages_are_read_in_one_request(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(range(100)))

    def span(offset: int, length: int) -> PageSpan:
        return PageSpan(str(path), 100, offset, length, 1, 0, 0, 1)

    pages = fetch([span(10, 5), span(15, 20), span(0, 10)])
    assert [bytes(page.data) for page in pages] == [bytes(range(10, 15)), bytes(range(15, 35)), bytes(range(10))]
    assert pages[0].data.obj is pages[1].data.obj
    assert pages[0].data.obj is not pages[2].data.obj


def test_a_batch_knows_its_length(make_corpus: Callable[..., Corpus]) -> None:
    batch: Batch = next(stream(make_corpus(FILES)))
    assert len(batch) == 8


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_shard_that_can_neither_be_read_nor_asked_for_is_named(
    make_corpus: Callable[..., Corpus], tmp_path: Path, is_cached: bool
) -> None:
    corpus = make_corpus(FILES)
    path = shard_path(corpus)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(FetchError, match=rf"{path}: bytes .* cannot be read: .*Too many levels"):
        list(stream(corpus, cache=str(tmp_path / "cache") if is_cached else None))
