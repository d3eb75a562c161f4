from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import get_native_id
from typing import Any

import pytest
import torch

from pipelines import store
from pipelines.training.async_saver import AsyncSaver
from pipelines.training.checkpoint import MANIFEST, STATE, TENSORS, CheckpointError, Checkpoints

FILES = [TENSORS, STATE, MANIFEST]


class Lost(RuntimeError):
    pass


@dataclass
class Place:
    root: str
    number: int = 1
    first: int = 1
    digest: str = "d" * 64
    held: bool = True

    @property
    def uri(self) -> str:
        return store.join(self.root, "attempts", str(self.number))

    def check(self) -> None:
        if not self.held:
            raise Lost("another attempt took over")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "runs" / "pretrain" / "d"))


def tensors(step: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(step)
    return {"model/a": torch.randn(3, 4, generator=source), "optimizer/a/step": torch.tensor(float(step))}


def save(place: Place, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(place, keep=keep)
    for step in steps:
        checkpoints.save(step, tensors(step), {"seed": 1})
    return checkpoints


def path_of(place: Place, step: int, name: str, attempt: int | None = None) -> Path:
    return Path(place.root) / "attempts" / str(attempt or place.number) / "checkpoints" / f"{step:09d}" / name


def test_what_was_saved_comes_back_bit_for_bit(place: Place) -> None:
    loaded = save(place, 10).newest()
    assert loaded is not None and loaded.found.step == 10 and loaded.state["seed"] == 1
    assert loaded.tensors.keys() == tensors(10).keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors(10).items())


def test_nothing_is_found_where_nothing_is(place: Place) -> None:
    assert Checkpoints(place).newest() is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [truncate, flip_a_byte, empty, Path.unlink], ids=lambda harm: harm.__name__)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(
    place: Place, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = save(place, 10, 20)
    harm(path_of(place, 20, name))
    with caplog.at_level(logging.WARNING):
        loaded = checkpoints.newest()
    assert loaded is not None and loaded.found.step == 10
    # Without a manifest there never was a checkpoint; any other fault is said.
    assert "falling back" in caplog.text or (name == MANIFEST and harm is Path.unlink)


class Bomb:
    """Unpickling it creates a file: the visible side effect."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rehashed", [False, True])
def test_a_planted_pickle_is_refused_and_never_run(place: Place, tmp_path: Path, name: str, rehashed: bool) -> None:
    import hashlib

    checkpoints = save(place, 10, 20)
    harmed = tmp_path / "harmed"
    bomb = pickle.dumps(Bomb(harmed))
    path_of(place, 20, name).write_bytes(bomb)
    if rehashed and name != MANIFEST:  # Whoever can write the prefix can also write a manifest that fits.
        manifest = json.loads(path_of(place, 20, MANIFEST).read_text())
        manifest["files"][name] = {"size": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
        path_of(place, 20, MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        checkpoints.load(checkpoints.found()[0])
    loaded = checkpoints.newest()
    assert loaded is not None and loaded.found.step == 10
    assert not harmed.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"order": None},
        {"order": {"lanes": "x"}},
        {"order": {"lanes": True}},
        {"order": {"window_pages": 0}},
        {"engine": 7},
        {"left_out": 3},
        {"curves": [1]},
        {"best": [1]},
        {"best": {"without_best": "x"}},
        {"per_device_batch_size": 0},
        {"dollars": "much"},
        {"ended": 1},
    ],
    ids=str,
)
def test_a_state_that_no_start_could_go_by_is_passed_over(place: Place, changes: dict[str, object]) -> None:
    import hashlib

    checkpoints = save(place, 10, 20)
    text = json.dumps({**json.loads(path_of(place, 20, STATE).read_text()), **changes}).encode()
    path_of(place, 20, STATE).write_bytes(text)
    manifest = json.loads(path_of(place, 20, MANIFEST).read_text())
    manifest["files"][STATE] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    path_of(place, 20, MANIFEST).write_text(json.dumps(manifest))
    loaded = checkpoints.newest()
    assert loaded is not None and loaded.found.step == 10
    assert Checkpoints(place).newest_state()["step"] == 10


@pytest.mark.parametrize("name", [STATE, TENSORS])
@pytest.mark.parametrize("kind", ["pipe", "loop"])
def test_what_is_no_file_is_passed_over_and_never_waited_for(place: Place, name: str, kind: str) -> None:
    checkpoints = save(place, 10, 20)
    path = path_of(place, 20, name)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name)
    loaded = checkpoints.newest()
    assert loaded is not None and loaded.found.step == 10


def test_what_is_larger_than_its_manifest_says_is_not_downloaded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save(place, 10, 20)
    with path_of(place, 20, TENSORS).open("ab") as file:
        file.write(b"more")
    fetched: list[str] = []
    download = store.download
    monkeypatch.setattr(store, "download", lambda uri, path: fetched.append(uri) or download(uri, path))  # type: ignore[func-returns-value]
    loaded = checkpoints.newest()
    assert loaded is not None and loaded.found.step == 10
    assert not any("000000020" in uri and uri.endswith(TENSORS) for uri in fetched)


def test_a_manifest_of_another_run_is_refused(place: Place) -> None:
    checkpoints = save(place, 10)
    other = Checkpoints(Place(place.root, digest="e" * 64))
    assert other.newest() is None and checkpoints.newest() is not None


def test_all_attempts_of_a_digest_are_scanned_newest_step_first(place: Place) -> None:
    save(place, 10, 30)
    later = Place(place.root, number=2)
    checkpoints = save(later, 20)
    assert [(found.step, found.attempt) for found in checkpoints.found()] == [(30, 1), (20, 2), (10, 1)]
    assert [found.step for found in Checkpoints(Place(place.root, number=3, first=2)).found()] == [20]


def test_retention_keeps_the_newest_and_sweeps_orphans_of_older_attempts(place: Place) -> None:
    save(place, 10, 20, keep=2)
    path_of(place, 25, TENSORS).parent.mkdir()
    path_of(place, 25, TENSORS).write_bytes(b"an upload that never ended")
    checkpoints = save(Place(place.root, number=2), 30, keep=2)
    assert [found.step for found in checkpoints.found()] == [30, 20]
    left = [item.uri for item in store.list_objects(place.root)]
    assert not any("000000010" in uri or "000000025" in uri for uri in left)


def test_the_only_good_checkpoint_survives_a_new_one_that_did_not_arrive_whole(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = save(place, 10, keep=1)
    upload = store.upload

    def torn(path: Path, uri: str) -> str:
        etag = upload(path, uri)
        if uri.endswith(TENSORS):
            truncate(Path(uri))  # A store that lies.
        return etag

    monkeypatch.setattr(store, "upload", torn)
    checkpoints.save(20, tensors(20), {})
    loaded = checkpoints.newest()
    assert loaded is not None and loaded.found.step == 10


def test_an_attempt_that_lost_its_lease_commits_nothing(place: Place) -> None:
    checkpoints = save(place, 10)
    place.held = False
    with pytest.raises(Lost):
        checkpoints.save(20, tensors(20), {})
    assert [found.step for found in checkpoints.found()] == [10]


def test_an_upload_in_a_thread_hands_its_error_to_the_loop(place: Place) -> None:
    saver = AsyncSaver(Checkpoints(place))
    saver.save(10, tensors(10), {})
    saver.wait()
    place.held = False
    saver.save(20, tensors(20), {})
    with pytest.raises(Lost):
        saver.wait()
    saver.wait()  # Said once.


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives niceness to a thread")
def test_the_thread_that_uploads_yields_to_training_and_training_stays_as_it_was(place: Place) -> None:
    seen: list[int] = []
    saver = AsyncSaver(Checkpoints(place), lambda _: seen.append(os.getpriority(os.PRIO_PROCESS, get_native_id())))
    before = os.getpriority(os.PRIO_PROCESS, get_native_id())
    saver.save(10, tensors(10), {})
    saver.wait()
    assert seen == [min(19, before + 10)]
    assert os.getpriority(os.PRIO_PROCESS, get_native_id()) == before


def test_a_torn_checkpoint_is_none_of_those_that_stay(place: Place) -> None:
    """Torn at 200, resumed from 100: two good ones must survive the next torn one."""
    save(place, 100, 200)
    truncate(path_of(place, 200, TENSORS))
    second = Checkpoints(Place(place.root, number=2), keep=2)
    loaded = second.newest()
    assert loaded is not None and loaded.found.step == 100
    for step in (110, 120, 130):
        second.save(step, tensors(step), {"seed": 1})
    assert [(found.step, found.attempt) for found in second.found()] == [(130, 2), (120, 2)]
    second.save(200, tensors(200), {"seed": 1})
    assert [found.step for found in second.found()] == [200, 130]


def test_what_another_rank_found_torn_does_not_count_either(place: Place) -> None:
    checkpoints = save(place, 100, 200, keep=2)
    checkpoints.refuse(checkpoints.found()[0])
    checkpoints.save(110, tensors(110), {"seed": 1})
    assert {found.step for found in checkpoints.found()} >= {100, 110}


def rewrite(place: Place, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Another state, with a manifest that fits it."""
    path = path_of(place, step, STATE)
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    manifest = json.loads(path_of(place, step, MANIFEST).read_text())
    data = path.read_bytes()
    manifest["files"][STATE] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path_of(place, step, MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("rows", [[1], float("inf"), -5, 0, 10**18, True, "3", None, 7], ids=str)
def test_rows_that_no_checkpoint_of_ours_has_are_passed_over(place: Place, rows: Any) -> None:
    checkpoints = save(place, 10, 20)
    rewrite(place, 20, lambda state: state["layout"].update(rows={"model/a": rows}))
    loaded = checkpoints.newest()
    assert loaded is not None and loaded.found.step == 10


def test_a_number_that_is_said_to_be_cut_is_passed_over(place: Place) -> None:
    checkpoints = save(place, 10, 20)
    rewrite(place, 20, lambda state: state["layout"].update(rows={"optimizer/a/step": 3}))
    loaded = checkpoints.newest()
    assert loaded is not None and loaded.found.step == 10


def test_a_link_that_leads_nowhere_is_passed_over(place: Place) -> None:
    checkpoints = save(place, 10, 20)
    path = path_of(place, 20, TENSORS)
    path.unlink()
    path.symlink_to(path.name)  # To itself.
    loaded = checkpoints.newest()
    assert loaded is not None and loaded.found.step == 10


@pytest.mark.parametrize("order", [None, [1], {"lanes": "x"}, {"lanes": [1]}], ids=str)
def test_the_driver_plans_with_the_newest_state_that_can_be_gone_on_with(place: Place, order: Any) -> None:
    checkpoints = Checkpoints(place, keep=9)
    for step in (10, 20):
        checkpoints.save(step, tensors(step), {"order": {"lanes": 4}, "engine": f"at {step}"})
    assert checkpoints.newest_state()["engine"] == "at 20"
    rewrite(place, 20, lambda state: state.update(order=order))
    assert checkpoints.newest_state() == {**checkpoints.newest_state(), "order": {"lanes": 4}, "engine": "at 10"}
    truncate(path_of(place, 10, STATE))
    assert checkpoints.newest_state() == {}
