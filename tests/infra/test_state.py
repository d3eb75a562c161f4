"""The state folder: what is found, what is refused, who may read it."""

from __future__ import annotations

import stat
import subprocess
import threading
from pathlib import Path

import pytest

from infra.local import ports
from infra.local.errors import StackError
from infra.local.processes import Process
from infra.local.stack import attend, down
from infra.local.state import LONGEST_SOCKET_FOLDER, PartRecord, Record, State


def silent(_: str) -> None:
    pass


def made(folder: Path) -> State:
    state = State(folder)
    state.create()
    state.create_keys()
    return state


def test_the_nearest_parent_with_a_state_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert State.find() is None
    state = made(tmp_path / ".vit")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert State.find() == state
    assert State.default().folder == deep / ".vit"
    monkeypatch.setenv("VIT_STATE", str(tmp_path / "other"))
    assert State.find() is None
    assert State.default().folder == tmp_path / "other"


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    state = made(tmp_path / ".vit")
    state.folder.chmod(0o777)
    assert State.find() is None


def test_folder_and_keys_are_for_the_owner_alone(tmp_path: Path) -> None:
    state = made(tmp_path / ".vit")
    assert stat.S_IMODE(state.folder.stat().st_mode) == 0o700
    for name in ("keys.json", "ray.token"):
        assert stat.S_IMODE((state.folder / name).stat().st_mode) == 0o600
    assert (state.folder / ".gitignore").read_text() == "*\n"
    keys = state.require_keys()
    assert keys.secret_key not in repr(keys) and keys.admin_secret_key not in repr(keys)


def test_git_sees_nothing_of_the_state_folder(tmp_path: Path) -> None:
    made(tmp_path / ".vit")
    subprocess.run(["git", "init", "-q", "."], check=True)
    seen = subprocess.run(["git", "status", "--porcelain", "-uall"], check=True, capture_output=True, text=True)
    assert seen.stdout == ""


def test_keys_stay_what_they_were(tmp_path: Path) -> None:
    state = made(tmp_path / ".vit")
    before = state.require_keys(), state.token_path.read_text()
    state.create()
    state.create_keys()
    assert before == (state.require_keys(), state.token_path.read_text())


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    mode = tmp_path.stat().st_mode
    with pytest.raises(StackError, match="not empty and no state folder; set VIT_STATE"):
        State(tmp_path).create()
    assert tmp_path.stat().st_mode == mode
    assert not (tmp_path / ".gitignore").exists()


def test_an_unwritable_place_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match=r"file/\.vit cannot be written .*set VIT_STATE"):
        State(tmp_path / "file" / ".vit").create()


def test_a_full_disk_is_an_error_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.local.stack.LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(StackError, match=r"MB free on the disk of .*the stack needs"):
        attend(State(tmp_path / ".vit"), say=silent)
    assert State(tmp_path / ".vit").keys() is None


@pytest.mark.parametrize("name", ["keys.json", "stack.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    state = made(tmp_path / ".vit")
    (state.folder / name).write_text('{"half')
    with pytest.raises(StackError, match=f"{name} is unreadable"):
        attend(state, say=silent)


def test_a_record_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    state = made(tmp_path / ".vit")
    record = Record("here", {"store": PartRecord({"s3": 1}, (Process(5, "x-7", "weed"),), (4,))})
    state.save(record)
    assert state.record() == record
    assert "secret" not in (state.folder / "stack.json").read_text()


def test_a_stack_of_another_machine_is_neither_started_nor_stopped(tmp_path: Path) -> None:
    state = made(tmp_path / ".vit")
    state.save(Record("elsewhere", {"store": PartRecord({"s3": 1}, (Process(1, "x"),))}))
    for act in (lambda: attend(state, say=silent), lambda: down(state, say=silent)):
        with pytest.raises(StackError, match="was started on elsewhere"):
            act()
    assert down(state, say=silent, forget=True) == []
    assert not state.record().is_up


@pytest.mark.parametrize("name", [f"{'d' * 60}/{'e' * 60}", "été"], ids=["long", "not ASCII"])
def test_rays_folder_is_one_that_ray_can_open_and_shut(tmp_path: Path, name: str) -> None:
    state = made(tmp_path / name / ".vit")
    folder = state.ray_folder()
    try:
        assert len(str(folder)) <= LONGEST_SOCKET_FOLDER and str(folder).isascii()
        assert folder == state.ray_folder()  # The same at each start.
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    finally:
        folder.rmdir()
        folder.parent.rmdir()


def test_one_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    state = made(tmp_path / ".vit")
    said: list[str] = []
    entered = threading.Event()

    def second() -> None:
        with state.locked(said.append):
            entered.set()

    with state.locked(silent):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
    thread.join(5)
    assert entered.is_set()
    assert said == ["another command is starting or stopping the stack; waiting for it"]


def test_a_lock_that_is_never_freed_is_an_error(tmp_path: Path) -> None:
    state = made(tmp_path / ".vit")
    with state.locked(silent), pytest.raises(StackError, match="lock was held for"), state.locked(silent, seconds=0.2):
        pass


def test_children_get_the_mark_and_nothing_of_another_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = made(tmp_path / ".vit")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("KEPT", "yes")
    environment = state.child_environment("ray")
    assert environment["VIT_PART"] == f"{state.require_keys().stack_id}:ray"
    assert environment["KEPT"] == "yes"
    assert "RAY_ADDRESS" not in environment and "MLFLOW_TRACKING_URI" not in environment


def test_chosen_ports_are_free_distinct_and_under_the_ephemeral_range() -> None:
    first = ports.choose(["a", "b"], ())
    second = ports.choose(["c", "d", "e"], first.values())
    chosen = [*first.values(), *second.values()]
    assert len(set(chosen)) == 5
    assert all(ports.is_free(port) for port in chosen)
    assert max(chosen) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def test_a_port_in_use_is_not_free_and_its_holder_has_a_name(listener: tuple[int, int]) -> None:
    pid, port = listener
    assert not ports.is_free(port)
    assert ports.holder(port).endswith(f"(pid {pid})")


def test_the_mark_differs_between_stacks(tmp_path: Path) -> None:
    assert made(tmp_path / "a").mark("ray") != made(tmp_path / "b").mark("ray")
