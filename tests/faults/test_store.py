"""The store layer and the shard stage while S3 misbehaves: complete and byte-identical, or a clear error."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import store
from pipelines.config import from_dict
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.index import IndexRecipe, adopt_tars
from pipelines.shard import ShardRecipe, make_corpus
from pipelines.store import s3
from tests.pipelines.corpus.foreign import write_tars
from tests.pipelines.corpus.inputs import class_folders

from .proxy import Fault, FaultProxy, Kind

pytestmark = pytest.mark.stack
DATA = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def place(stack: Any) -> str:
    return store.join(store.root(), "faults", f"{time.time_ns()}")


@pytest.mark.parametrize(
    "kind, after",
    [("unavailable", 0), *((kind, after) for kind in ("reset", "truncate") for after in (0, 1_048_576, len(DATA) - 1))],
)
def test_a_read_that_breaks_off_goes_on_where_it_was(kind: Kind, after: int, proxy: FaultProxy, place: str) -> None:
    store.write(f"{place}/x", DATA)
    proxy.clear()
    proxy.add(Fault(kind, method="GET", after=after, times=2))
    assert store.read(f"{place}/x") == DATA
    assert proxy.hits == 2
    proxy.clear()
    proxy.add(Fault(kind, method="GET", after=min(after, 99_999), times=2))
    assert store.read(f"{place}/x", 1_000_000, 100_000) == DATA[1_000_000:1_100_000] and proxy.hits == 2


@pytest.mark.parametrize("kind", ["unavailable", "cut_request", "lost_response"])
def test_a_write_that_fails_on_the_way_ends_whole(kind: Kind, proxy: FaultProxy, place: str) -> None:
    proxy.add(Fault(kind, method="PUT", after=70_000, times=2))
    etag = store.write(f"{place}/x", DATA)
    assert proxy.hits == 2
    assert store.read(f"{place}/x") == DATA and store.stat(f"{place}/x").etag == etag


@pytest.mark.parametrize("times", [1, 3])
def test_a_conditional_write_whose_answer_is_lost_was_still_ours(times: int, proxy: FaultProxy, place: str) -> None:
    proxy.add(Fault("lost_response", method="PUT", header="if-none-match", times=times))
    etag = store.write(f"{place}/lock", b"mine", if_absent=True)
    assert proxy.hits >= 1 and store.stat(f"{place}/lock").etag == etag
    with pytest.raises(store.Conflict):
        store.write(f"{place}/lock", b"theirs", if_absent=True)
    proxy.clear()
    proxy.add(Fault("lost_response", method="PUT", header="if-match", times=times))
    second = store.write(f"{place}/lock", b"mine again", if_match=etag)
    assert proxy.hits >= 1
    with pytest.raises(store.Conflict):
        store.write(f"{place}/lock", b"theirs", if_match=etag)
    assert store.read(f"{place}/lock") == b"mine again" and store.stat(f"{place}/lock").etag == second


@pytest.mark.parametrize("kind", ["unavailable", "cut_request", "lost_response", "reset", "truncate"])
def test_files_in_parts_arrive_whole_both_ways(kind: Kind, proxy: FaultProxy, place: str, tmp_path: Path) -> None:
    """20 MB: several parts, and the faults hit some of them."""
    data = DATA * 7
    (tmp_path / "up").write_bytes(data)
    proxy.add(Fault(kind, method="PUT", after=50_000, times=2), Fault(kind, method="GET", after=50_000, times=2))
    store.upload(tmp_path / "up", f"{place}/x")
    store.download(f"{place}/x", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == data and proxy.hits >= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["down", "up"]


def test_a_store_that_stays_away_is_an_error_with_the_address(
    proxy: FaultProxy, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    store.write(f"{place}/x", b"1")
    proxy.add(Fault("unavailable", times=None))
    with pytest.raises(store.StoreError, match=f"cannot read {place}/x"):
        store.read(f"{place}/x")
    proxy.clear()
    proxy.add(Fault("reset", method="GET", after=0, times=None))
    with pytest.raises(store.StoreError, match=f"cannot download {place}/x"):
        store.download(f"{place}/x", tmp_path / "down")
    assert list(tmp_path.iterdir()) == []


def everything(corpus: Corpus) -> dict[str, str]:
    return {
        info.uri.removeprefix(corpus.uri): hashlib.sha256(store.read(info.uri)).hexdigest()
        for folder in ("shards", "manifests")
        for info in store.list_objects(store.join(corpus.uri, folder))
    }


def rough_weather() -> list[Fault]:
    return [
        Fault("unavailable", times=None, chance=0.06),
        Fault("lost_response", method="PUT", times=None, chance=0.12),
        Fault("cut_request", method="PUT", after=700, times=None, chance=0.12),
        Fault("reset", method="GET", after=300, times=None, chance=0.08),
        Fault("truncate", method="GET", after=300, times=None, chance=0.08),
    ]


def test_a_corpus_that_is_made_in_rough_weather_is_the_same_to_the_byte(
    proxy: FaultProxy, place: str, tmp_path: Path
) -> None:
    folder = class_folders(tmp_path / "s", {"train/cat": 12, "train/dog": 12, "val/cat": 2, "val/dog": 2})
    for path in sorted(folder.rglob("*.*")):
        store.write(f"{place}/s/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def make(destination: str) -> Corpus:
        values = {"source": f"{place}/s", "destination": destination, "shard_bytes": 2500, "num_workers": 0}
        return make_corpus(from_dict(ShardRecipe, values))

    calm = make(f"{place}/calm")
    proxy.clear()
    proxy.add(*rough_weather())
    rough = make(f"{place}/rough")
    hits = proxy.hits
    proxy.clear()
    assert hits >= 8
    assert everything(rough) == everything(calm) and len(everything(calm)) > 6
    assert open_corpus(f"{place}/rough@current").digest == calm.digest


def test_tars_are_indexed_in_rough_weather_as_in_calm(proxy: FaultProxy, place: str, tmp_path: Path) -> None:
    local = write_tars(tmp_path, samples=6)
    for path in local.rglob("*.tar"):
        store.write(f"{place}/{path.relative_to(local).as_posix()}", path.read_bytes())
    proxy.add(*rough_weather())
    found = adopt_tars(from_dict(IndexRecipe, {"source": place, "num_workers": 0}))
    hits = proxy.hits
    proxy.clear()
    assert hits >= 2 and found.anomalies == {}
    assert (
        found.corpus.digest
        == adopt_tars(from_dict(IndexRecipe, {"source": str(local), "num_workers": 0})).corpus.digest
    )
