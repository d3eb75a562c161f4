"""The main job on a tiny corpus and the real stack: raw images to a champion, again, and after a loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import store
from pipelines.config import find_recipe
from pipelines.identity import find_result
from pipelines.messages import report
from pipelines.why import main as why
from pipelines.workflow.home import state_folder
from pipelines.workflow.runner import NotRun, StepFailed
from tests.integration.conftest import run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
STEPS = ("shard", "pretrain", "finetune", "evaluate", "promote", "predict")


def test_raw_images_become_a_champion(first: dict[str, Any]) -> None:
    from pipelines.tracking.client import connect

    assert tuple(first) == STEPS
    assert not any(outcome.result.reused for outcome in first.values())
    client = connect()
    champion = client.get_model_version_by_alias("smoke", "champion")
    assert first["promote"].result.uri == f"models:/smoke/{champion.version}"
    assert champion.tags["vit.digest"] == first["finetune"].result.digest
    for name in ("shard", "pretrain", "finetune", "evaluate", "predict"):
        logged = client.get_run(first[name].result.run_id)
        assert logged.info.status == "FINISHED"
        assert logged.data.tags["vit.digest"] == first[name].result.digest
        assert logged.data.tags["vit.code"]
    params = client.get_run(first["pretrain"].result.run_id).data.params
    assert params["train.batch_size"] == "16"
    assert params["model.width"] == "32"


def test_the_model_learned_something(first: dict[str, Any]) -> None:
    metrics = first["evaluate"].result.metrics
    assert metrics["test/top1_low"] <= metrics["test/top1"] <= metrics["test/top1_high"]
    assert metrics["test/top1"] > 0.45  # Three classes: chance is a third.


def test_predictions_are_a_table_with_a_row_for_every_image(first: dict[str, Any], images: Path) -> None:
    import io

    import pyarrow.parquet as pq

    parts = [item.uri for item in store.list_objects(first["predict"].result.uri) if item.uri.endswith(".parquet")]
    rows = [row for uri in parts for row in pq.read_table(io.BytesIO(store.read(uri))).to_pylist()]
    assert len(rows) == len(list((images / "digit-1").iterdir()))
    assert {row["prediction"] for row in rows} <= {"digit-0", "digit-1", "digit-2"}


@pytest.mark.parametrize("flags", [(), ("--plain",)], ids=["dagster", "plain"])
def test_the_second_run_reuses_every_stage(first: dict[str, Any], images: Path, flags: tuple[str, ...]) -> None:
    shutil.rmtree(state_folder() / "dagster", ignore_errors=True)  # What is kept here decides nothing.
    second = run(images, *flags)
    assert all(outcome.result.reused for outcome in second.values()), {
        name: outcome.result.reused for name, outcome in second.items()
    }
    assert {name: outcome.result.digest for name, outcome in second.items()} == {
        name: outcome.result.digest for name, outcome in first.items()
    }


@pytest.mark.parametrize("lost", ["evaluate", "promote", "shard"])
def test_a_lost_result_makes_exactly_that_stage_run_again(first: dict[str, Any], images: Path, lost: str) -> None:
    result = first[lost].result
    store.delete(store.join(store.root(), "runs", lost, result.digest, "result.json"))
    assert find_result(lost, result.digest) is None
    second = run(images, "--plain")
    assert [name for name, outcome in second.items() if not outcome.result.reused] == [lost]
    assert second[lost].result.uri.split("/attempts/")[0] == result.uri.split("/attempts/")[0]


def test_a_refused_promotion_ends_cleanly_with_predict_not_run(
    first: dict[str, Any], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # Decided, then found decided.
        with pytest.raises(StepFailed) as caught:
            run(images, promote={"minimum": 0.999, "alias": "flawless"})
        assert isinstance(caught.value.__cause__, NotRun)
        assert report(caught.value, debug=False) == 3
        told = capsys.readouterr()
        assert "below the minimum 0.999" in told.out
        assert "step predict was not run: nothing was promoted" in told.err


def test_why_says_what_is_finished_and_what_differs(
    first: dict[str, Any], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = yaml.safe_load(find_recipe("workflows/smoke").read_text())
    given["steps"]["shard"]["set"] = {"source": str(images)}
    given["steps"]["predict"]["set"] = {"images": str(images / "digit-1"), "split": None}
    workflow = tmp_path / "mine.yaml"
    workflow.write_text(yaml.safe_dump(given))
    assert why([str(workflow)], lambda: None) == 0
    assert capsys.readouterr().out.count("finished") >= len(STEPS)
    given["steps"]["pretrain"]["set"] = {"train.total_steps": 41}
    workflow.write_text(yaml.safe_dump(given))
    assert why([str(workflow)], lambda: None) == 0
    told = capsys.readouterr().out
    assert "total_steps" in told and "missing" in told
