"""What `vit runs` says of places in the store: finished, running, left."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from pipelines import identity, store
from pipelines.config import RecipeError
from pipelines.runs import compare, find, find_one, lines, main, stop, tail

DIGESTS = {name: name * 64 for name in "abc"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "root"))
    return tmp_path


def put(stage: str, digest: str, name: str, value: Any) -> None:
    store.write_json(store.join(identity.runs(), stage, digest, name), value)


def finished(digest: str, top1: float, lr: float = 0.1) -> None:
    result = {"metrics": {"val/top1": top1}, "stage": "pretrain", "uri": "u", "digest": digest, "run_id": None}
    recipe = {"optimizer": {"peak_lr": lr}, "seed": 0}
    put("pretrain", digest, "result.json", {"result": result, "recipe": recipe, "started": 1000.0, "seconds": 60.0})
    put("pretrain", digest, "attempts/1/checkpoints/000000010/manifest.json", {})


def leave(digest: str, step: int, **progress: Any) -> None:
    put("pretrain", digest, "attempts/2/progress.json", {"step": step, "metrics": {"train/loss": 1.25}, **progress})


def hold(digest: str) -> identity.Lease:
    held = identity.Lease(store.join(identity.runs(), "pretrain", digest, "lease.json"), "pretrain")
    held.take()
    return held


def test_each_run_is_a_line_that_says_where_it_stands() -> None:
    finished(DIGESTS["a"], 0.75)
    leave(DIGESTS["b"], 30)
    put("pretrain", DIGESTS["b"], "attempts/2/fault.json", {"error": "RuntimeError: the disk is on fire\nmore"})
    leave(DIGESTS["c"], 40)
    hold(DIGESTS["c"])
    shown = list(lines(find("pretrain"), now=8200.0))
    assert shown[0] == "pretrain  aaaaaaaaaaaa  finished    2 h ago, 60 s  val/top1 0.75"
    assert "unfinished  step 30  train/loss 1.25  RuntimeError: the disk is on fire" in shown[1]
    assert f"running     step 40  train/loss 1.25  process {os.getpid()} on {socket.gethostname()}" in shown[2]
    assert find("finetune") == []


def test_a_run_is_named_by_the_start_of_its_digest_or_as_logs_name_it() -> None:
    finished(DIGESTS["a"], 0.7)
    finished("ab" * 32, 0.7)
    assert find_one("aaaaa").digest == DIGESTS["a"]
    assert find_one(f"pretrain-{'ab' * 6}-a3").digest == "ab" * 32
    assert find_one(f"pretrain-{'ab' * 6}").digest == find_one(f"pretrain-{'ab' * 6}-a3-r2").digest == "ab" * 32
    with pytest.raises(RecipeError, match="no run begins with 'ffff'"):
        find_one("ffff")
    finished("aaaa" + "b" * 60, 0.7)
    with pytest.raises(RecipeError, match="give more digits"):
        find_one("aaaa")


def test_two_results_are_compared_field_by_field() -> None:
    finished(DIGESTS["a"], 0.70, lr=0.1)
    finished(DIGESTS["b"], 0.75, lr=0.2)
    shown = [line.split() for line in compare(find_one("aaaa"), find_one("bbbb"))]
    assert ["optimizer.peak_lr", "0.1", "0.2"] in shown and ["val/top1", "0.7", "0.75", "+0.05"] in shown
    assert not any(row[0] == "seed" for row in shown)
    leave(DIGESTS["c"], 3)
    with pytest.raises(RecipeError, match="cccccccccccc has no result yet"):
        list(compare(find_one("aaaa"), find_one("cccc")))


def test_a_running_training_is_asked_to_stop_and_nothing_else_is() -> None:
    leave(DIGESTS["c"], 40)
    with pytest.raises(RecipeError, match="is not running"):
        stop(find_one("cccc"))
    held = hold(DIGESTS["c"])
    assert "is asked to stop" in stop(find_one("cccc"))
    assert store.exists(store.join(identity.runs(), "pretrain", DIGESTS["c"], "attempts/2/stop.json"))
    held.release()
    with pytest.raises(RecipeError, match="is not running"):
        stop(find_one("cccc"))


def test_tail_tells_what_comes_until_the_run_ends() -> None:
    leave(DIGESTS["c"], 10, notes=["resumed"])
    held = hold(DIGESTS["c"])

    def follow() -> None:
        leave(DIGESTS["c"], 20, notes=["resumed", "a checkpoint could not be stored"])
        if follow.calls:  # type: ignore[attr-defined]
            finished(DIGESTS["c"], 0.9)
        follow.calls += 1  # type: ignore[attr-defined]

    follow.calls = 0  # type: ignore[attr-defined]
    told = list(tail(find_one("cccc"), follow))
    held.release()
    assert told == [
        "resumed",
        "step 10  train/loss 1.25",
        "a checkpoint could not be stored",
        "step 20  train/loss 1.25",
        "pretrain cccccccccccc is finished",
    ]


@pytest.mark.parametrize("words", [["compare", "aaaa"], ["what"], ["tail"], ["list", "a", "b"]])
def test_a_wrong_command_is_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="vit runs takes"):
        main(words)


def test_nothing_is_said_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and "no runs here yet" in capsys.readouterr().out
