"""Ray's own list of nodes that are drained is private: without it training goes on, and that is said once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray._private.state

from pipelines.training import cluster


def gone(*_: object) -> None:
    raise TypeError("get_draining_nodes() takes 1 positional argument")


@pytest.mark.parametrize("state", [SimpleNamespace(), SimpleNamespace(get_draining_nodes=gone)])
def test_a_ray_that_does_not_show_drained_nodes_is_said_once_and_breaks_nothing(
    state: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "_blind", False)
    monkeypatch.setattr(ray._private.state, "state", state)
    assert cluster.draining() == cluster.draining() == set()
    told = capsys.readouterr()
    assert (told.out + told.err).count("does not show which nodes are drained") == 1


def test_what_is_drained_is_taken_from_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.state, "state", SimpleNamespace(get_draining_nodes=lambda: {"ab": 0}))
    assert cluster.draining() == {"ab"}


def test_the_installed_ray_still_has_the_call() -> None:
    assert callable(ray._private.state.state.get_draining_nodes)
