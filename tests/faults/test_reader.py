"""The reader between a real object store and a network that breaks: complete, counted, or a clear error. Never less."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from infra.endpoints import Endpoints
from pipelines import store
from pipelines.corpus.manifest import Corpus
from pipelines.reader import fetch
from pipelines.store import s3

from ..pipelines.reader.conftest import picture
from .proxy import Fault, FaultProxy, Kind
from .reader_cases import Case, Outcome, aim, cases, places, read_with_ours, write_faults_corpus

pytestmark = pytest.mark.stack


@pytest.fixture
def corpus(stack: Endpoints, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", 4)
    base = store.join(store.root(), "corpora", "reader-faults")
    return write_faults_corpus(base, lambda i: picture(i, (120, 100), "JPEG", "RGB"))


@pytest.fixture
def proxy(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between the reader and the store, which gives up sooner than usual."""
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        monkeypatch.setattr(fetch, "STALL_SECONDS", 0.4)
        monkeypatch.setattr(s3, "ATTEMPTS", 3)
        s3._clients.clear()
        yield found
    s3._clients.clear()
    fetch._etags.clear()


def test_every_fault_at_every_class_of_offset(corpus: Corpus, proxy: FaultProxy) -> None:
    """One test, because all cases share the corpus; each that fails names itself."""
    _, looks = read_with_ours(corpus, None)
    uri = corpus.shard_uri(1)
    shard = store.read(uri)
    wrong: list[str] = []
    for case in cases(shard, places(shard, corpus)):
        found = run(case, corpus, proxy, uri, shard, looks)
        if found.word not in case.expected or (found.error and uri not in found.error):
            wrong.append(f"{case}: {found}")
        if case.kind and not proxy.hits:
            wrong.append(f"{case}: no request met the fault")
        proxy.clear()
    assert not wrong, "\n".join(wrong)


def run(case: Case, corpus: Corpus, proxy: FaultProxy, uri: str, shard: bytes, looks: dict[str, str]) -> Outcome:
    if case.kind is not None:
        proxy.add(aim(case, corpus))
        return read_with_ours(corpus, looks)[0]
    assert case.damage is not None
    changed = case.damage(shard)

    def damage() -> None:
        store.delete(uri) if changed is None else store.write(uri, changed)

    try:
        if not case.while_reading:
            damage()
            return read_with_ours(corpus, looks)[0]
        return read_with_ours(corpus, looks, damage)[0]
    finally:
        store.write(uri, shard)


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_a_read_goes_on_from_its_last_byte_and_only_in_the_same_version(
    corpus: Corpus, proxy: FaultProxy, kind: Kind
) -> None:
    uri = corpus.shard_uri(0)
    whole = store.read(uri)
    proxy.clear()
    proxy.add(Fault(kind, method="GET", after=30_000))
    buffer = np.empty(60_000, np.uint8)
    found = store.read_into(uri, buffer.data, 1000, stall_seconds=0.4)
    assert buffer.tobytes() == whole[1000:61_000]
    assert found.size == len(whole)
    first, second = (request for request in proxy.requests if request.method == "GET")
    assert "range: bytes=1000-60999" in first.head
    assert "if-match" not in first.head
    again = int(second.head.split("range: bytes=")[1].split("-")[0])
    assert 1000 < again <= 31_000
    assert f"if-match: {found.etag.lower()}" in second.head


def test_the_last_word_names_shard_and_byte(corpus: Corpus, proxy: FaultProxy) -> None:
    proxy.add(Fault("reset", method="GET", match="shards/", after=2000, times=None))
    outcome, _ = read_with_ours(corpus, None)
    assert outcome.error.startswith("s3://")
    assert ".tar: bytes " in outcome.error
    assert "as far as byte " in outcome.error
