"""The same laws for local folders and for a real S3 server."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from pipelines import store
from pipelines.store import Conflict, NotFound, StoreError


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.stack)])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "place")
    request.getfixturevalue("stack")
    return store.join(store.root(), "tests", tmp_path.name + "-" + request.node.name[:20].replace("[", "-"))


def test_what_was_written_is_read_back_whole_and_in_slices(base: str) -> None:
    uri = store.join(base, "a/b.bin")
    data = bytes(range(256)) * 8_000
    etag = store.write(uri, data)
    assert store.read(uri) == data
    assert store.read(uri, 1000, 500) == data[1000:1500]
    assert store.read(uri, 2_047_000) == data[2_047_000:]
    assert store.read(uri, 5, 0) == b""
    assert store.stat(uri).size == len(data)
    assert store.stat(uri).etag == etag
    assert store.read(uri, if_match=etag) == data
    store.write(uri, b"other")
    with pytest.raises(Conflict):
        store.read(uri, if_match=etag)


def test_a_slice_past_the_end_is_an_error_and_never_a_short_answer(base: str) -> None:
    uri = store.join(base, "short")
    store.write(uri, b"0123456789")
    with pytest.raises(StoreError, match="wanted"):
        store.read(uri, 5, 10)


def test_missing_things_are_not_found(base: str) -> None:
    for call in (store.read, store.stat, store.read_json):
        with pytest.raises(NotFound):
            call(store.join(base, "nothing"))
    assert not store.exists(store.join(base, "nothing"))
    assert list(store.list_objects(store.join(base, "nothing"))) == []
    store.delete(store.join(base, "nothing"))


def test_listing_is_sorted_and_recursive(base: str) -> None:
    names = ["z", "a/2", "a/10", "b/c/d"]
    for name in names:
        store.write(store.join(base, "list", name), name.encode())
    found = list(store.list_objects(store.join(base, "list")))
    assert [item.uri for item in found] == sorted(store.join(base, "list", name) for name in names)
    assert [item.size for item in found] == [4, 3, 5, 1]


def test_exactly_one_of_eight_writers_wins(base: str) -> None:
    uri = store.join(base, "lock")
    wins: list[int] = []

    def race(number: int) -> None:
        try:
            store.write(uri, str(number).encode(), if_absent=True)
            wins.append(number)
        except Conflict:
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.read(uri) == str(wins[0]).encode()


def test_a_stale_etag_does_not_overwrite(base: str) -> None:
    uri = store.join(base, "versioned")
    first = store.write(uri, b"1")
    store.write(uri, b"2", if_match=first)
    with pytest.raises(Conflict):
        store.write(uri, b"3", if_match=first)
    assert store.read(uri) == b"2"


def test_files_go_up_and_come_down(base: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)
    store.upload(source, store.join(base, "up"))
    target = store.download(store.join(base, "up"), tmp_path / "new" / "target")
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(NotFound):
        store.download(store.join(base, "nothing"), tmp_path / "new" / "other")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["target"]


def test_a_broken_json_object_says_what_to_do(base: str) -> None:
    uri = store.join(base, "x.json")
    store.write(uri, b"{")
    with pytest.raises(StoreError, match="delete it"):
        store.read_json(uri)


@pytest.mark.stack
def test_a_wrong_bucket_is_named(stack: object) -> None:
    with pytest.raises(StoreError, match="no-such-bucket"):
        store.write("s3://no-such-bucket-here/x", b"")
    with pytest.raises(StoreError, match="s3://BUCKET/KEY"):
        store.read("s3://bucket-only")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        store.write(str(tmp_path / "file" / "below"), b"")


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "no space left on the disk of .*; free some"), (errno.EROFS, "Read-only")]
)
@pytest.mark.parametrize("step", ["mkdir", "open", "write_bytes"])
def test_a_full_or_read_only_disk_is_said_wherever_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, step, fail)
    with pytest.raises(StoreError, match=said):
        store.write(str(tmp_path / "a"), b"x", if_absent=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("free", [10 << 20, 1 << 40])
def test_a_store_that_fails_on_a_full_disk_is_told_apart_from_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """A full SeaweedFS says InternalError and no more."""
    from botocore.exceptions import ClientError

    class Full:
        def put_object(self, **_: object) -> None:
            raise ClientError({"Error": {"Code": "InternalError", "Message": "please try again"}}, "PutObject")

    monkeypatch.setenv("VIT_STATE", str(tmp_path))
    monkeypatch.setattr("pipelines.store.s3.client", Full)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    disk = shutil.disk_usage(tmp_path)._replace(free=free, total=2 << 40)
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk)
    with pytest.raises(StoreError, match=r"cannot write s3://vit/a: .*InternalError") as caught:
        store.write("s3://vit/a", b"x")
    said = "free some there, and run the same command again" if free < 1 << 30 else "the store failed at each try"
    assert said in str(caught.value)


def test_a_file_that_cannot_even_be_asked_for_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for call in (store.stat, store.read):
        with pytest.raises(store.Unreadable, match=r"cannot read .*loop"):
            call(str(tmp_path / "loop"))
