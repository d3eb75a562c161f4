"""One MLflow run per stage run, against a real MLflow server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pipelines import config, identity, store
from pipelines.tracking import metrics as metrics_module
from pipelines.tracking.client import connect
from pipelines.tracking.run import Run, TrackingError, as_params, track
from tests.pipelines.tracking.door import Door
from tests.pipelines.tracking.toys import ToyCorpus, ToyRecipe, attempt, digest_named, own_root

stack_needed = pytest.mark.stack


@pytest.fixture
def place(stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The real MLflow server, and a store root of this test's own."""
    own_root(monkeypatch)
    yield tmp_path


@stack_needed
def test_a_run_carries_recipe_tags_corpus_and_curves(place: Path) -> None:
    digest = digest_named("carries")
    with track(attempt(digest), ToyRecipe(), corpus=ToyCorpus(), tags={"vit.extra": "1"}) as run:
        for step in range(2500):
            run.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
    client = connect()
    found = client.get_run(run.id)
    assert found.info.status == "FINISHED"
    tags = found.data.tags
    assert (tags["vit.stage"], tags["vit.digest"], tags["vit.attempt"], tags["vit.extra"]) == (
        "toystage",
        digest,
        "1",
        "1",
    )
    assert tags["vit.code"] == identity.code_fingerprint()
    assert tags["vit.corpus"] == f"s3://vit/corpora/toy@{'ab' * 32}"
    assert found.data.params["name"] == "toy"
    assert found.data.params["workers"] == "1"
    (dataset,) = [row.dataset for row in found.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("toy", ("ab" * 32)[:36])
    history = client.get_metric_history(run.id, "train/loss")
    assert sorted(point.step for point in history) == list(range(2500))
    assert config.from_dict(ToyRecipe, _yaml(client, run.id, place)) == ToyRecipe()


def _yaml(client: Any, run_id: str, folder: Path) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(Path(client.download_artifacts(run_id, "recipe.yaml", str(folder))).read_text()))


@stack_needed
def test_an_unfinished_run_is_continued_and_how_fields_may_change(place: Path) -> None:
    digest = digest_named("continued")
    with pytest.raises(ZeroDivisionError), track(attempt(digest), ToyRecipe()) as first:
        first.log_metrics({"train/loss": 1.0}, 7)
        raise ZeroDivisionError("planted")
    client = connect()
    failed = client.get_run(first.id)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["vit.error"] == "ZeroDivisionError: planted"
    with track(attempt(digest, 2), ToyRecipe(workers=9)) as second:
        assert second.id == first.id
        assert second.last_step("train/loss") == 7
        assert second.last_step("never") == -1
    again = client.get_run(first.id)
    assert again.info.status == "FINISHED"
    assert again.data.tags["vit.attempt"] == "2"
    assert again.data.tags["vit.changed.a2"] == '{"workers": "9"}'
    assert again.data.params["workers"] == "1"


@stack_needed
def test_an_interrupt_ends_the_run_as_killed_and_a_lost_lease_leaves_it_alone(place: Path) -> None:
    digest = digest_named("killed")
    with pytest.raises(KeyboardInterrupt), track(attempt(digest), ToyRecipe()) as run:
        raise KeyboardInterrupt
    assert connect().get_run(run.id).info.status == "KILLED"
    with pytest.raises(identity.LeaseLost), track(attempt(digest, 2), ToyRecipe()) as run:
        raise identity.LeaseLost("taken")
    assert connect().get_run(run.id).info.status == "RUNNING"


@stack_needed
def test_compute_again_opens_a_new_run(place: Path) -> None:
    digest = digest_named("again")
    with track(attempt(digest), ToyRecipe()) as first:
        pass
    with track(attempt(digest, 2), ToyRecipe()) as reopened:
        assert reopened.id == first.id
    with track(attempt(digest, 3, first=3), ToyRecipe()) as new:
        assert new.id != first.id
    with track(attempt(digest, 4, first=3), ToyRecipe()) as resumed:
        assert resumed.id == new.id


@stack_needed
def test_a_worker_attaches_by_run_id(place: Path) -> None:
    with track(attempt(digest_named("attach")), ToyRecipe()) as run:
        worker = Run.attach(run.id)
        worker.log_metrics({"train/loss": 0.5}, 3)
        worker.close()
        assert run.last_step("train/loss") == 3
        assert run.id in run.url


@stack_needed
def test_pictures_and_texts_are_artifacts(place: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2])
    with track(attempt(digest_named("pictures")), ToyRecipe()) as run:
        run.log_figure(figure, "curve")
        run.log_text("hello", "notes/hello.txt")
    names = {item.path for folder in ("figures", "notes") for item in connect().list_artifacts(run.id, folder)}
    assert names == {"figures/curve.png", "notes/hello.txt"}


@pytest.fixture
def door(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    server = urlsplit(os.environ["MLFLOW_TRACKING_URI"])
    door = Door(server.hostname or "", server.port or 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{door.port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(metrics_module, "CLOSE_SECONDS", 0.0)
    yield door
    door.close()


@stack_needed
def test_a_server_that_goes_away_neither_stops_the_stage_nor_loses_a_point(door: Door) -> None:
    digest = digest_named("down")
    with track(attempt(digest), ToyRecipe()) as run:
        run.log_metrics({"train/loss": 2.0}, 0)
        assert run.flush()
        door.shut()
        run.log_metrics({"train/loss": 1.0}, 1)
        assert not run.flush()
        run.log_text("lost", "lost.txt")
    assert len(list(store.list_objects(attempt(digest).uri))) == 1
    door.open()
    with track(attempt(digest, 2), ToyRecipe()) as second:
        assert second.id == run.id
    points = connect().get_metric_history(run.id, "train/loss")
    assert sorted((point.step, point.value) for point in points) == [(0, 2.0), (1, 1.0)]
    assert not list(store.list_objects(attempt(digest).uri))


@stack_needed
def test_a_server_that_comes_back_gets_what_was_kept(door: Door) -> None:
    with track(attempt(digest_named("back")), ToyRecipe()) as run:
        door.shut()
        for step in range(5):
            run.log_metrics({"train/loss": 1.0}, step)
        assert not run.flush()
        door.open()
    assert len(connect().get_metric_history(run.id, "train/loss")) == 5
    assert connect().get_run(run.id).info.status == "FINISHED"


def test_no_server_at_the_start_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 does not answer.*vit up"), track(attempt("0" * 64), 0):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI is not set"), track(attempt("0" * 64), 0):
        pass


def test_long_values_say_that_they_are_cut_and_names_stay_apart() -> None:
    params = as_params({"text": "y" * 7000, "a$b": 1, "a#b": 2, "flag": True, "none": None})
    assert params["text"].startswith("y" * 200)
    assert params["text"].endswith("(7,000 characters; the whole value is in recipe.yaml)")
    assert len(params) == 5
    assert (params["flag"], params["none"]) == ("true", "null")


def test_a_bad_metric_name_is_refused_where_it_is_logged() -> None:
    sender = metrics_module.MetricSender(None, "run", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"metric name 'a\$b'"):
        sender.add({"a$b": 1.0}, 0)
