"""Which workers a run gets, from the recipe and what the cluster shows; and what is said of it."""

from __future__ import annotations

import pytest

from pipelines.training import placement
from pipelines.training.config import WorkerConfig
from pipelines.training.placement import MakingWay, Node, Patience, Placement, count_room, place


def workers(**given: object) -> WorkerConfig:
    return WorkerConfig(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "cpus", "gpus", "can_grow", "count", "use_gpu", "waits"),
    [
        ({}, 2, 0, False, 2, False, False),
        ({}, 1, 0, False, 1, False, False),
        ({}, 0, 0, True, 1, False, False),  # A head without CPUs, no worker node yet.
        ({}, 48, 4, True, 4, True, False),
        ({"count": 2}, 48, 4, True, 2, True, False),
        ({"count": 8}, 64, 0, True, 8, False, False),
        ({"device": "cpu"}, 48, 4, True, 2, False, False),
        ({"device": "cuda"}, 48, 4, False, 4, True, False),
        ({"device": "cuda", "count": 8}, 48, 4, True, 8, True, True),
        ({"device": "cuda", "count": 8}, 0, 0, True, 8, True, True),
        ({"device": "cuda", "count": 4}, 48, 4, True, 4, True, False),
        ({"count": (2, 8)}, 48, 4, True, 4, True, False),
        ({"count": (2, 8)}, 48, 16, True, 8, True, False),
        ({"count": (6, 8)}, 48, 4, True, 6, True, True),
        ({"count": (1, 8), "cpus": 0.5}, 2, 0, False, 4, False, False),
        ({"count": (1, 8), "device": "cuda"}, 48, 0, True, 1, True, True),
    ],
)
def test_the_recipe_and_the_cluster_decide(
    given: dict[str, object], cpus: float, gpus: float, can_grow: bool, count: int, use_gpu: bool, waits: bool
) -> None:
    placed = place(workers(**given), cpus, gpus, can_grow=can_grow)
    assert (placed.count, placed.use_gpu, placed.waits) == (count, use_gpu, waits)


@pytest.mark.parametrize(
    ("given", "gpus", "can_grow", "said"),
    [
        ({"count": 8}, 4, False, "workers.count=8 is more than the cluster's 4 GPUs; nearest: 4"),
        ({"count": 8}, 4, True, "nearest: 4; workers.device: cuda waits until the cluster has grown"),
        ({"device": "cuda"}, 0, True, "say how many to wait for, as in workers.count: 8"),
        (
            {"device": "cuda"},
            0,
            False,
            "workers.device=cuda: Ray shows no GPU on this machine; take workers.device: auto or cpu here",
        ),
        ({"device": "cuda", "count": 2}, 1, False, "workers.count=2: Ray shows 1 GPU on this machine"),
        ({"count": (2, 8)}, 1, False, "workers.count=[2, 8]: this machine has room for 1 GPU workers; nearest: [1, 8]"),
    ],
)
def test_what_the_cluster_will_never_have_is_refused_with_the_remedy(
    given: dict[str, object], gpus: float, can_grow: bool, said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        place(workers(**given), 16, gpus, can_grow=can_grow)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "gpus", "can_grow", "told"),
    [
        ({}, 0, False, "2 CPU workers (the cluster shows no GPU)"),
        ({}, 0, True, "2 CPU workers (the cluster shows no GPU; workers.device: cuda waits for some to come)"),
        ({}, 4, True, "4 GPU workers (the cluster shows 4 GPUs)"),
        ({"device": "cpu", "count": 1}, 4, True, "1 CPU worker (workers.device is cpu)"),
        ({"count": (2, 8)}, 4, True, "4 GPU workers of 2 to 8 (the cluster has room for 4)"),
        (
            {"device": "cuda", "count": 8},
            0,
            True,
            "8 GPU workers (workers.device is cuda; the cluster shows no GPU yet)",
        ),
    ],
)
def test_the_choice_is_said_with_its_reason(given: dict[str, object], gpus: float, can_grow: bool, told: str) -> None:
    assert str(place(workers(**given), 8, gpus, can_grow=can_grow)) == told


def test_how_many_workers_and_on_what_is_no_part_of_the_identity() -> None:
    from pipelines.identity import deciding_fields

    assert deciding_fields(workers(device="cuda", count=8)) == {}
    assert deciding_fields(workers(count=(1, 8), resize_seconds=5.0)) == {}


def test_a_long_wait_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "FIRST_WORD_SECONDS", 0.0)
    patience = Patience(Placement(8, True, "workers.device is cuda", waits=True))
    assert patience.is_due()
    assert patience.word(0, 0).startswith("waiting for 8 GPUs: the cluster shows 0 CPUs and 0 GPUs")
    assert not patience.is_due()


@pytest.mark.parametrize("count", [(0, 2), (3, 2)])
def test_a_range_that_is_none_is_refused(count: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"is no range of workers; give \[fewest, most\]"):
        workers(count=count)


NODES = [Node("aa", {"CPU": 2.0}), Node("bb", {"CPU": 1.0}), Node("cc", {"CPU": 8.0}, leaves=True)]


@pytest.mark.parametrize(
    ("available", "running", "room"),
    [(3.0, 0, 3), (0.75, 2, 3), (0.0, 2, 2), (0.5, 0, 0), (11.0, 0, 3)],  # The third node starts nothing more.
)
def test_room_is_counted_on_whole_nodes_and_in_what_others_leave_free(
    available: float, running: int, room: int
) -> None:
    assert count_room(NODES, {"CPU": available}, {"CPU": 0.75, "GPU": 0.0}, running) == room


def test_only_the_gpus_of_gpu_workers_must_be_free_and_all_counts_where_nobody_else_is() -> None:
    nodes = [Node("aa", {"CPU": 8.0, "GPU": 4.0})]
    need = {"CPU": 0.05, "GPU": 1.0}
    assert count_room(nodes, {"CPU": 0.0, "GPU": 2.0}, need, 1) == 3
    assert count_room(nodes, {"CPU": 8.0}, need, 1) == 1
    assert count_room(nodes, None, need) == 4


def test_workers_never_outnumber_the_lanes() -> None:
    placed = place(workers(count=(2, 8)), 64, 8, can_grow=True).at_most(4)
    assert (placed.count, placed.limits) == (4, (2, 4))
    assert [placed.resized(room).count for room in (1, 3, 9)] == [2, 3, 4]
    fixed = place(workers(count=8), 64, 8, can_grow=True)
    assert fixed.at_most(4) == fixed.resized(1) == fixed  # More workers than lanes: the reader's own error says so.


def test_workers_make_way_for_more_once_the_room_is_steady() -> None:
    way = MakingWay(place(workers(count=(1, 3)), 2, 0, can_grow=True, room=2), resize_seconds=60.0)
    nodes = NODES[:2]
    assert way.reason(nodes, [], 3, now=0.0) is None  # Before the first step there is nothing to save.
    assert way.reason(nodes, ["aa"], 2, now=10.0) is None
    assert way.reason(nodes, ["aa"], 3, now=69.0) is None
    assert way.reason(nodes, ["aa"], 2, now=71.0) is None  # Gone again: counted anew.
    assert way.reason(nodes, ["aa"], 3, now=72.0) is None
    full = MakingWay(place(workers(count=(1, 3)), 2, 0, can_grow=True, room=2), resize_seconds=0.0, taken=3)
    assert [full.reason(nodes, ["aa"], room, now) for now, room in ((0.0, 3), (9.0, 3), (20.0, 4))] == [None] * 3
    assert full.reason(nodes, ["aa"], 4, now=26.0) is not None  # More than what turned out to be taken.
    assert way.reason(nodes, ["aa"], 9, now=78.0) == "there is room for 3 workers instead of 2"


def test_workers_make_way_at_once_when_one_of_their_own_nodes_leaves() -> None:
    way = MakingWay(place(workers(count=2), 2, 0, can_grow=True), resize_seconds=60.0)
    assert way.reason(NODES, ["aa", "bb"], 2, now=0.0) is None
    assert way.reason(NODES, ["aa", "cc"], 2, now=2.0) == "node cc is about to be taken away"
