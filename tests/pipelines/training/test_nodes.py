"""The load of nodes: one voice a node, names that do not collide, numbers of this machine, and nothing when off."""

from __future__ import annotations

import os
import socket
import stat
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.training.gpus import GpuReader, ask
from pipelines.training.hardware import list_price, peak_flops
from pipelines.training.nodes import NodeLoad
from pipelines.training.parallel import Ranks
from pipelines.training.tally import Tally

HOST = socket.gethostname()


def of(points: dict[str, float], key: str) -> float:
    return points[f"system/{HOST}/{key}"]


def test_one_machine_is_named_by_its_host_and_told_as_it_is() -> None:
    load = NodeLoad(Ranks(), "ab12" * 8, True, 0.2)
    load.join()
    assert load() == {}  # Not due.
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        sum(range(1000))  # Something for the CPU to do.
    points = load()
    assert 0 < of(points, "cpu_utilization_percentage") <= 100
    assert 0 < of(points, "system_memory_usage_percentage") < 100
    whole = 100 * of(points, "system_memory_usage_megabytes") / of(points, "system_memory_usage_percentage")
    assert whole == pytest.approx(psutil.virtual_memory().total / 1e6, rel=1e-6)
    assert of(points, "disk_available_megabytes") > 0 and 0 <= of(points, "disk_usage_percentage") <= 100
    assert of(points, "network_receive_megabytes_per_second") >= 0
    assert of(points, "network_transmit_megabytes_per_second") >= 0


def test_a_run_that_is_over_before_it_is_time_tells_its_load_once() -> None:
    load = NodeLoad(Ranks(), "", True, 3600.0)
    load.join()
    assert load() == {} and load(last=True) and load(last=True) == {}


def test_off_it_asks_nobody_and_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was asked")

    monkeypatch.setattr(psutil, "cpu_times", never)
    monkeypatch.setattr(Ranks, "sum", never)
    load = NodeLoad(Ranks(), "ab", True, None)
    load.join()
    assert load(last=True) == {}


def told(rank: int, world_size: int, folder: str) -> None:
    """Ranks 0 and 1 on one node, rank 2 on another of the same host."""
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    load = NodeLoad(Ranks.current(torch.device("cpu")), "aaaa1111" if rank < 2 else "bbbb2222", rank != 1, 3600.0)
    load.join()
    points = load(last=True)
    torch.save(sorted({name.split("/")[1] for name in points}), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_nodes_of_one_host_do_not_overwrite_each_other_and_rank_zero_alone_tells(tmp_path: Path) -> None:
    mp.spawn(told, (3, str(tmp_path)), nprocs=3)
    names = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert names == [[f"{HOST}-aaaa1111", f"{HOST}-bbbb2222"], [], []]


def test_gpus_are_told_as_the_driver_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is at hand: a program of the same name answers with lines as nvidia-smi prints them."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '37, 1024, 81559, 118.42'\necho '0, 2, 81559, [N/A]'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    reader = GpuReader(0.05)
    try:
        assert reader.count == 2
        first, second = reader.latest()
    finally:
        reader.close()
    assert first == pytest.approx([37, 1073.741824, 100 * 1024 / 81559, 118.42])
    assert second[0] == 0 and second[3] != second[3]  # NaN.
    program.write_text("#!/bin/sh\nexit 9\n")
    assert ask() == []


def test_a_device_is_known_by_the_name_that_its_driver_gives_it() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and list_price("NVIDIA H100 80GB HBM3") == 3.99
    assert list_price("NVIDIA A100-SXM4-40GB") == 1.99 and list_price("NVIDIA A100-SXM4-80GB") == 2.79
    assert peak_flops("") is None and list_price("Tesla T4") is None


def test_cost_goes_on_where_the_checkpoint_left_it() -> None:
    """3,600 dollars an hour are one a second; two workers, two."""
    tally = Tally(Ranks(world_size=1), 8, None, dollars_per_hour=3600.0)
    tally.load({"dollars": 100.0})
    tally.begin(10)
    time.sleep(0.05)
    metrics = {"time/step": 0.1, "eta_seconds": 7.0}
    tally.window(20, metrics, last=False)
    assert 100.05 <= metrics["cost/dollars"] < 103
    assert metrics["cost/estimated_dollars"] == pytest.approx(metrics["cost/dollars"] + 7.0)
    assert tally.to_json()["dollars"] == metrics["cost/dollars"]
    assert "eta_seconds" not in tally.metrics({}) and tally.metrics({})["images_per_second"] == pytest.approx(80.0)


def test_without_a_price_nothing_is_said_of_cost() -> None:
    tally = Tally(Ranks(), 8, None)
    tally.begin(0)
    metrics = {"time/step": 0.1, "eta_seconds": 7.0}
    tally.window(20, metrics, last=True)
    assert not [name for name in metrics if name.startswith("cost/")]
