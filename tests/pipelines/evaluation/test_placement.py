"""How predict shares a cluster between the model and the reading of images."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.evaluation.placement import place


@pytest.mark.parametrize(
    ("device", "num_workers", "cpus", "gpus", "can_grow", "expected"),
    [
        ("auto", None, 2, 0, False, (1, False, 1.0, False)),
        ("auto", None, 16, 0, False, (8, False, 1.0, False)),
        ("auto", None, 1, 0, False, (1, False, 0.5, False)),
        ("auto", None, 48, 4, False, (4, True, 1.0, False)),
        ("cpu", None, 48, 4, False, (24, False, 1.0, False)),
        ("cuda", 8, 0, 0, True, (8, True, 1.0, True)),
        ("cuda", 8, 48, 4, True, (8, True, 1.0, True)),
        ("cpu", 8, 4, 0, True, (8, False, 1.0, True)),
        ("auto", None, 1, 1, False, (1, True, 0.5, False)),
    ],
)
def test_the_cluster_is_shared(
    device: Any, num_workers: int | None, cpus: float, gpus: float, can_grow: bool, expected: tuple[Any, ...]
) -> None:
    placed = place(device, num_workers, cpus, gpus, can_grow=can_grow)
    assert (placed.count, placed.use_gpu, placed.cpus, placed.waits) == expected


@pytest.mark.parametrize(
    ("device", "num_workers", "cpus", "gpus", "can_grow", "said"),
    [
        ("auto", None, 0, 0, False, "the cluster shows 0 CPUs, and reading needs one; add a node; num_workers: 0"),
        ("auto", None, 0, 0, True, "or say how many to wait for, as in num_workers: 8"),
        ("cuda", None, 8, 0, False, "device='cuda': the cluster shows no GPU; use device: auto or cpu"),
        ("cuda", None, 8, 0, True, "with num_workers: N they are waited for"),
        ("cpu", 2, 2, 0, False, "num_workers=2 would hold 2: none is left for reading"),
        ("cuda", 4, 16, 2, False, "num_workers=4 is more than the cluster's 2 GPUs; nearest: 2"),
    ],
)
def test_too_small_a_cluster_is_named_with_the_remedy(
    device: Any, num_workers: int | None, cpus: float, gpus: float, can_grow: bool, said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        place(device, num_workers, cpus, gpus, can_grow=can_grow)
    assert said in str(caught.value)
