"""The reader between a real object store and a network that breaks: complete, counted, or a clear error. Never less."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infra.endpoints import Endpoints
from pipelines import store
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus
from pipelines.reader import fetch
from pipelines.reader.fetch import FetchError
from pipelines.reader.loader import AugmentConfig, ReaderConfig, train_batches
from pipelines.reader.rows import SampleError
from vit_model.preprocess import InputSpec

from ..pipelines.reader.conftest import picture
from .proxy import Fault, FaultProxy
from .reader_cases import Case, Outcome, cases, places

pytestmark = pytest.mark.stack

SPEC = InputSpec(height=16, width=16)
SAMPLES, SHARD = 48, 16
LOCAL = ReaderConfig(backend="local")


@pytest.fixture
def corpus(stack: Endpoints, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", 4)
    images = [("train", "abc"[i % 3], f"{i:03}.jpg", picture(i, (120, 100), "JPEG", "RGB")) for i in range(SAMPLES)]
    return write_corpus(store.join(store.root(), "corpora", "faults"), images, shard_samples=SHARD)


@pytest.fixture
def proxy(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        monkeypatch.setattr(fetch, "STALL_SECONDS", 0.5)
        monkeypatch.setattr(store, "ATTEMPTS", 4)
        store._clients.clear()
        fetch._etags.clear()
        yield found
    store._clients.clear()
    fetch._etags.clear()


def read(corpus: Corpus, pixels: dict[int, str] | None, after_first: object = None) -> tuple[Outcome, dict[int, str]]:
    """One epoch, and what each sample looked like; `pixels`: how it should look."""
    outcome, seen = Outcome(SAMPLES), {}
    batches = train_batches(
        corpus,
        batch_size=8,
        seed=1,
        spec=SPEC,
        augment=AugmentConfig(),
        total_steps=SAMPLES // 8,
        lanes=1,
        window_pages=1,
        reader=LOCAL,
    )
    try:
        for number, batch in enumerate(batches):
            for sample, weight, image in zip(batch.sample_ids.tolist(), batch.weights, batch.images, strict=True):
                looks = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                if not weight:
                    assert not image.any()
                    outcome.masked += 1
                elif sample in seen or (pixels is not None and pixels[sample] != looks):
                    outcome.wrong.add(str(sample))
                else:
                    outcome.given.add(str(sample))
                seen[sample] = looks
            if number == 0 and callable(after_first):
                after_first()
        assert sum(batches.stats().bad.values()) == outcome.masked
    except (FetchError, SampleError) as error:
        outcome.error = str(error)
    return outcome, seen


def test_every_fault_at_every_class_of_offset(corpus: Corpus, proxy: FaultProxy) -> None:
    """One test, because the corpus and the stack are shared by all cases; each names itself when it fails."""
    _, pixels = read(corpus, None)
    uri = corpus.shard_uri(1)
    shard = store.read(uri)
    offsets = places(shard, corpus)
    wrong: list[str] = []
    for case in cases(shard, offsets):
        found = run(case, corpus, proxy, uri, shard, pixels)
        if found.word not in case.expected or (found.error and uri not in found.error):
            wrong.append(f"{case.name}, {case.where}: {found}")
        if case.fault and not proxy.hits:
            wrong.append(f"{case.name}, {case.where}: nothing went wrong")
        proxy.clear()
    assert not wrong, "\n".join(wrong)


def run(case: Case, corpus: Corpus, proxy: FaultProxy, uri: str, shard: bytes, pixels: dict[int, str]) -> Outcome:
    fetch._etags.clear()
    if case.fault is not None:
        fault = case.fault()
        # A page is what a request asks for: the offset is counted from the start of the page that it falls into.
        fault.match, fault.after = Path(uri).name, fault.after % PAGE
        proxy.add(fault)
        return read(corpus, pixels)[0]
    assert case.damage is not None
    changed = case.damage(shard)

    def damage() -> None:
        store.delete(uri) if changed is None else store.write(uri, changed)

    try:
        if not case.while_reading:
            damage()
        return read(corpus, pixels, damage if case.while_reading else None)[0]
    finally:
        store.write(uri, shard)
        fetch._etags.clear()


PAGE = 8192


def test_a_read_goes_on_from_its_last_byte_and_names_the_version(corpus: Corpus, proxy: FaultProxy) -> None:
    uri = corpus.shard_uri(0)
    whole = store.read(uri)
    proxy.clear()
    for kind in ("reset", "truncate", "stall"):
        proxy.add(Fault(kind, method="GET", after=30_000))  # type: ignore[arg-type]
        buffer = np.empty(60_000, np.uint8)
        found = store.read_into(uri, buffer.data, 1000, stall_seconds=0.5)
        assert buffer.tobytes() == whole[1000:61_000]
        assert found.size == len(whole) and found.etag == store.stat(uri).etag
        first, second = (request for request in proxy.requests if request.method == "GET")
        assert "range: bytes=1000-60999" in first.head and "if-match" not in first.head
        again = int(second.head.split("range: bytes=")[1].split("-")[0])
        assert 1000 < again <= 31_000, kind
        assert f"if-match: {found.etag.lower()}" in second.head
        proxy.clear()


def test_the_last_word_names_shard_and_byte(corpus: Corpus, proxy: FaultProxy) -> None:
    proxy.add(Fault("reset", method="GET", match="shards/", after=2000, times=None))
    with pytest.raises(
        FetchError, match=r"s3://.*/shards/.*\.tar: bytes [\d,]+ to [\d,]+ cannot be read: .*byte [\d,]+"
    ):
        outcome, _ = read(corpus, None)
        raise FetchError(outcome.error)
