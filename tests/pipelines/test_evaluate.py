"""Evaluation is exact on models whose every answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import evaluate, identity, store
from pipelines.config import load_recipe
from pipelines.evaluate import EvaluateRecipe, read_predictions
from pipelines.evaluation.accuracy import wilson
from pipelines.tracking.client import TrackingError, connect
from pipelines.tracking.registry import find_version
from tests.pipelines.tracking.toys import own_root
from tests.pipelines.worlds import CLASSES, levels_corpus, register_threshold, threshold_weights

LEVELS = range(64, 192)  # 64 dark, 64 light


@pytest.fixture
def place(stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    own_root(monkeypatch)
    yield tmp_path


@pytest.mark.stack
def test_a_version_is_evaluated_exactly_and_its_page_says_so(place: Path) -> None:
    corpus = levels_corpus("levels", LEVELS)
    version = register_threshold(place, "toy-evaluate", 100.5, corpus)  # wrong on 101 ... 127
    recipe = EvaluateRecipe(model=version, corpus="levels@current", batch_size=24, num_pictures=6)
    result = evaluate.run(recipe)
    expected = (128 - 27) / 128
    assert result.metrics["test/top1"] == pytest.approx(expected)
    assert result.metrics["test/num_images"] == 128
    assert (result.metrics["test/top1_low"], result.metrics["test/top1_high"]) == pytest.approx(wilson(101, 128))
    record = store.read_json(result.uri)
    assert record["n"] == 128
    assert record["per_class"] == [
        {"class": "dark", "accuracy": pytest.approx(37 / 64)},
        {"class": "light", "accuracy": 1.0},
    ]
    confusion = record["confusion"]
    assert list(zip(confusion["label"], confusion["prediction"], confusion["count"], strict=True)) == [
        (0, 0, 37),
        (0, 1, 27),
        (1, 1, 64),
    ]
    table = read_predictions(result)
    first = corpus.first_sample("test")
    assert table["sample_id"].to_pylist() == list(range(first, first + 128))
    wrong = {level for level, rank in zip(LEVELS, table["rank"].to_pylist(), strict=True) if rank}
    assert wrong == set(range(101, 128))

    tags = find_version(version).tags
    assert tags["metric.test/top1"] == f"{expected:.6g}"
    assert tags["vit.test.corpus"] == corpus.reference
    client = connect()
    run = client.get_run(str(result.run_id))
    assert run.data.metrics["test/top1"] == pytest.approx(expected)
    assert run.data.tags["vit.model.pretrain_run_id"] == "pretrain-run"
    pictures = {item.path for item in client.list_artifacts(str(result.run_id), "figures")}
    assert pictures == {f"figures/{name}.png" for name in ("confusion_matrix", "reliability", "sample_predictions")}


@pytest.mark.stack
def test_the_same_question_is_answered_once_and_batches_do_not_matter(place: Path) -> None:
    corpus = levels_corpus("levels", LEVELS)
    version = register_threshold(place, "toy-reuse", 120.5, corpus)
    first = evaluate.run(EvaluateRecipe(model=version, corpus="levels@current", batch_size=7, num_pictures=0))
    again = evaluate.run(EvaluateRecipe(model=version, corpus=corpus.reference, batch_size=128))
    assert (again.reused, again.uri, again.metrics) == (True, first.uri, first.metrics)
    store.delete(store.join(identity.runs(), "evaluate", first.digest, "result.json"))
    computed = evaluate.run(EvaluateRecipe(model=version, corpus=corpus.reference, batch_size=50))
    assert not computed.reused
    assert computed.metrics == first.metrics
    assert computed.run_id == first.run_id


@pytest.mark.stack
def test_weights_without_a_version_are_evaluated_too(place: Path) -> None:
    levels_corpus("levels", LEVELS)
    uri = str(threshold_weights(place / "here" / "w.safetensors", 127.5))
    result = evaluate.run(EvaluateRecipe(model=uri, corpus="levels@current"))
    assert result.metrics["test/top1"] == 1.0
    assert result.details["model"] == uri


@pytest.mark.stack
def test_classes_go_by_name_and_unknown_ones_by_choice(place: Path) -> None:
    levels_corpus("levels", LEVELS)
    swapped = str(threshold_weights(place / "swapped.safetensors", 127.5, ("light", "dark")))
    assert evaluate.run(EvaluateRecipe(model=swapped, corpus="levels@current")).metrics["test/top1"] == 1.0
    levels_corpus("grown", LEVELS, (*CLASSES, "newt"))
    model = str(threshold_weights(place / "w.safetensors", 127.5))
    with pytest.raises(ValueError, match=r"has no class 'newt' \(1 of 3 classes"):
        evaluate.run(EvaluateRecipe(model=model, corpus="grown@current"))
    lenient = EvaluateRecipe(model=model, corpus="grown@current", unknown_classes="wrong")
    assert evaluate.run(lenient).metrics["test/top1"] == 1.0


@pytest.mark.stack
def test_what_cannot_be_evaluated_is_said_before_anything_starts(place: Path) -> None:
    levels_corpus("levels", LEVELS)
    model = str(threshold_weights(place / "w.safetensors", 127.5))
    with pytest.raises(ValueError, match=r"split 'held' of .* has no samples; it has train \(2\), test \(128\)"):
        evaluate.run(EvaluateRecipe(model=model, corpus="levels@current", split="held"))
    with pytest.raises(store.NotFound):
        evaluate.run(EvaluateRecipe(model=model + "x", corpus="levels@current"))
    with pytest.raises(TrackingError, match="not found"):
        evaluate.run(EvaluateRecipe(model="models:/never-registered/1", corpus="levels@current"))
    pickled = place / "w.pt"
    pickled.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="not a safetensors file"):
        evaluate.run(EvaluateRecipe(model=str(pickled), corpus="levels@current"))


@pytest.mark.parametrize("name", ["demo/evaluate", "demo/evaluate_scratch", "smoke/evaluate", "evaluate/held_out"])
def test_packaged_recipes_load(name: str) -> None:
    load_recipe(EvaluateRecipe, name)


def test_the_digest_of_a_recipe_stays_what_it_was() -> None:
    """Fails when the same recipe would be computed anew: raise VERSION if that is meant, or restore the fields."""
    recipe = EvaluateRecipe(model="m", corpus="c", split="val", batch_size=7)
    found = identity.digest_of("evaluate", evaluate.VERSION, recipe, {"model": "a", "corpus": "b"})
    assert found == "aa0b4c6cd57217239c2fcea5987b148d207104c3677f87ffa7e8e0d77d72a068"
