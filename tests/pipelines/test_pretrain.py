"""Pretraining on the real stack: Ray Train, object store, MLflow."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import identity, pretrain, store
from pipelines.config import RecipeError, from_dict, load_recipe, packaged_recipes, to_yaml
from pipelines.finetune import FinetuneRecipe
from pipelines.pretrain import PretrainRecipe

SIZES = {"patch_size": 4, "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2}


def recipe(corpus: str, **changes: Any) -> PretrainRecipe:
    values: dict[str, Any] = {
        "corpus": corpus,
        "resolution": 16,
        "model": {**SIZES, "dropout": 0.1},
        "train": {"batch_size": 16, "total_steps": 60},
        "optimizer": {"kind": "adamw", "peak_lr": 2e-3},
        "schedule": {"warmup_steps": 5},
        "augment": {"crop": "none"},
        "validation": {"split": "val", "test_split": "test", "every_epochs": 1},
        "checkpoint": {"every_steps": 10},
        "workers": {"count": 2, "log_every_steps": 5},
    }
    return from_dict(PretrainRecipe, {**values, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {"width": 32}}, "neither a variant nor patch_size, depth"),
        ({"resolution": 18}, "resolution=18 is not divisible by model.patch_size=4; nearest: 16"),
        ({"train": {"batch_size": 16}}, "give exactly one of them"),
        ({"train": {"batch_sise": 16, "epochs": 1}}, "did you mean 'batch_size'"),
        ({"optimizer": {"kind": "adamw", "momentum": 0.9}}, "momentum"),
        ({"checkpoint": {"keep": 0}}, "keep=0 would delete the only good checkpoint"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_before_anything_starts(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe("c", **changes)
    assert text in str(error.value)


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if "pretrain" in name])
def test_every_packaged_pretrain_recipe_loads(name: str) -> None:
    assert load_recipe(PretrainRecipe, name).corpus


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if "finetune" in name])
def test_every_packaged_finetune_recipe_loads(name: str) -> None:
    assert load_recipe(FinetuneRecipe, name).corpus


def test_the_twin_from_scratch_differs_in_its_initial_weights_alone() -> None:
    tuned, twin = (
        identity.deciding_fields(load_recipe(FinetuneRecipe, f"demo/finetune{end}")) for end in ("", "_scratch")
    )
    differing = {name for name in tuned.keys() | twin.keys() if tuned.get(name) != twin.get(name)}
    assert differing == {"model", "register_as"}


def test_a_recipe_for_a_large_corpus_says_what_to_change_for_a_small_one(tmp_path: Path) -> None:
    """Before anything starts: no run is opened, no worker."""
    from tests.pipelines.tiny_corpus import write_colours

    corpus = write_colours(str(tmp_path / "colours"), train=30, held_out=3)
    large = load_recipe(PretrainRecipe, "pretrain/vit_b16_imagenet", {"corpus": corpus.reference})
    with pytest.raises(ValueError, match=r"warmup_steps=10,000 is not below the 3 steps .*--schedule.warmup-steps 0"):
        pretrain.run(large)


def test_how_it_is_run_is_no_part_of_the_identity() -> None:
    one = identity.digest_of("pretrain", 1, recipe("c"), {"corpus": "x"})
    other = recipe("d", workers={"count": 1, "log_every_steps": 1}, checkpoint={"every_seconds": 5})
    assert identity.digest_of("pretrain", 1, other, {"corpus": "x"}) == one


def test_a_tiny_recipe_keeps_its_digest() -> None:
    """Raise pretrain.VERSION if the same recipe now gives another result, or restore the result."""
    assert identity.digest_of(pretrain.STAGE, pretrain.VERSION, recipe("c"), {"corpus": "x"})[:16] == "261cac2654be96f4"


# On the stack -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colours(stack_endpoints: Any) -> Iterator[str]:
    from tests.pipelines.tiny_corpus import write_colours

    patch = pytest.MonkeyPatch()
    for name, value in stack_endpoints.environment().items():
        patch.setenv(name, value)
    yield write_colours("colours").reference
    patch.undo()


def sha256_of_tensors(uri: str) -> dict[str, str]:
    """Of every tensor, not of the file: safetensors writes its metadata in no fixed order."""
    from safetensors.numpy import load

    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in load(store.read(uri)).items()}


def wait_for(what: Callable[[], Any], seconds: float = 240.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.2)
    raise AssertionError("waited in vain")


def progress(place: str, attempt: int) -> dict[str, Any]:
    try:
        return dict(store.read_json(store.join(place, "attempts", str(attempt), "progress.json")))
    except store.NotFound:
        return {}


def points(run_id: str, key: str) -> list[int]:
    from mlflow.tracking import MlflowClient

    return [metric.step for metric in MlflowClient().get_metric_history(run_id, key)]


def place_of(given: PretrainRecipe, corpus: str) -> str:
    digest = identity.digest_of(pretrain.STAGE, pretrain.VERSION, given, {"corpus": corpus.rpartition("@")[2]})
    place = store.join(identity.runs(), "pretrain", digest)
    for item in list(store.list_objects(place)):  # Of an earlier test run on a kept stack.
        store.delete(item.uri)
    return place


@pytest.mark.stack
def test_a_killed_worker_changes_nothing_in_the_weights(stack: Any, colours: str) -> None:
    from vit_model import load_model

    given = recipe(colours, train={"batch_size": 16, "total_steps": 240}, checkpoint={"every_steps": 20})
    results: list[identity.StageResult] = []
    place = place_of(given, colours)
    thread = threading.Thread(target=lambda: results.append(pretrain.run(given)), daemon=True)
    thread.start()
    seen = wait_for(lambda: (found := progress(place, 1)).get("checkpoint", 0) >= 40 and found)
    os.kill(seen["pid"], signal.SIGKILL)
    thread.join(200)
    assert results, "the run did not end"
    killed = results[0]
    assert len(store.read_json(store.join(place, "attempts/1/starts.json"))) == 2, "the kill came too late to matter"
    assert killed.metrics["test/top1"] > 0.9 and killed.run_id is not None
    assert points(killed.run_id, "train/loss") == list(range(5, 241, 5))

    token = identity.AGAIN.set(True)
    try:
        whole = pretrain.run(given)
    finally:
        identity.AGAIN.reset(token)
    assert sha256_of_tensors(whole.uri) == sha256_of_tensors(killed.uri) and whole.uri != killed.uri

    path = store.download(whole.uri, Path(os.environ["VIT_STATE"]) / "test-weights.safetensors")
    assert load_model(path).config.resolution == 16
    path.unlink()
    assert pretrain.run(given).reused


@pytest.mark.stack
def test_ctrl_c_then_kill_9_then_the_same_command_finishes(stack: Any, colours: str, tmp_path: Path) -> None:
    given = recipe(colours, seed=1, train={"batch_size": 16, "total_steps": 2000}, checkpoint={"every_steps": 50})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(given))
    place = place_of(given, colours)
    command = [sys.executable, "-m", "pipelines", "pretrain", str(path)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = start()
    wait_for(lambda: progress(place, 1).get("step", 0) >= 60)
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=200)[0]
    assert first.returncode == 130, output
    assert "the same command resumes at step" in output

    second = start()
    wait_for(lambda: progress(place, 2).get("checkpoint", 0) >= 150)
    second.kill()
    second.communicate()

    third = start()
    output = third.communicate(timeout=200)[0]
    assert third.returncode == 0, output
    assert "resumed from the checkpoint at step" in output
    result = identity.find_result("pretrain", place.rpartition("/")[2])
    assert result is not None and result.run_id is not None
    assert points(result.run_id, "train/loss") == list(range(5, 2001, 5))


@pytest.mark.stack
def test_a_split_that_is_not_there_is_named_before_anything_starts(stack: Any, colours: str) -> None:
    with pytest.raises(ValueError, match=r"validation.split='vall' is no split .* it has train \(480\), val \(90\)"):
        pretrain.run(recipe(colours, validation={"split": "vall"}))


@pytest.mark.stack
def test_cut_over_two_workers_with_teacher_average_and_best_weights(stack: Any, colours: str, tmp_path: Path) -> None:
    """Most options in one run of Ray Train, and what it hands on: whole weights that any code reads."""
    from pipelines.corpus.manifest import open_corpus
    from vit_model import OutputSpec, ViTConfig, build_model, load_model, save_weights

    teacher = tmp_path / "teacher.safetensors"
    names = open_corpus(colours).class_names[::-1]  # The same classes in another order.
    wise = build_model(ViTConfig(resolution=16, **SIZES), len(names), seed=3)  # type: ignore[arg-type]
    save_weights(wise, teacher, output_spec=OutputSpec(class_names=names, activation="softmax"))
    given = recipe(
        colours,
        seed=2,
        train={
            "batch_size": 16,
            "total_steps": 60,
            "ema": {"decay": 0.9},
            "export": "best",
            "per_device_batch_size": 4,
        },
        validation={"split": "val", "test_split": "test", "best": {"metric": "ema/top1"}},
        parallel={"kind": "fsdp"},
        distill={"teacher": str(teacher), "weight": 0.1},
    )
    result = pretrain.run(given)
    assert result.metrics["test/top1"] > 0.8
    assert {"ema/top1", "val/top1"} <= result.metrics.keys()
    folder = Path(os.environ["VIT_STATE"])
    for name in ("weights", "weights-last", "weights-ema"):
        path = store.download(result.uri.replace("weights.", f"{name}."), folder / f"test-{name}.safetensors")
        assert load_model(path).config.resolution == 16
        path.unlink()
    place = result.uri.rpartition("/")[0]
    layouts = {
        store.read_json(item.uri)["layout"]["files"]
        for item in store.list_objects(store.join(place, "checkpoints"))
        if item.uri.endswith("state.json")
    }
    assert layouts == {2}
    assert pretrain.run(given).reused
