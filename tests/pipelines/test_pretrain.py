"""Pretraining on the real stack: Ray Train, object store, MLflow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import identity, pretrain, store
from pipelines.config import RecipeError, from_dict, load_recipe, packaged_recipes
from pipelines.finetune import FinetuneRecipe
from pipelines.pretrain import PretrainRecipe

BUDGET = {"batch_size": 16, "total_steps": 60}
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
        ({"checkpoint": {"keep": 0}}, "keep=0 would leave nothing to resume from"),
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


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train": {**BUDGET, "packing": {"smallest": 0.5}}}, "train.packing packs the tokens of a ViT"),
        ({"train": {**BUDGET, "activation_checkpointing": True}}, "activation_checkpointing has no effect on a ResNet"),
        ({"parallel": {"kind": "fsdp"}, "workers": {"count": [1, 4]}}, "there may be one alone"),
    ],
)
def test_what_no_worker_could_build_is_refused_before_the_run_begins(
    changes: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lease, no run in MLflow, no worker."""
    from tests.pipelines.tiny_corpus import write_colours

    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "root"))
    corpus = write_colours(str(tmp_path / "colours"), train=30, held_out=3)
    given = recipe(corpus.reference, model={"variant": "R50x1"}, resolution=32, **changes)
    with pytest.raises(ValueError, match=text):
        pretrain.run(given)
    assert not list(store.list_objects(identity.runs()))


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


@pytest.mark.stack
def test_every_window_tells_speed_memory_time_left_cost_and_the_load_of_the_node(stack: Any, colours: str) -> None:
    """On a CPU the device's peak and its price are the recipe's; what a GPU has of its own is told apart."""
    from mlflow.tracking import MlflowClient

    result = pretrain.run(
        recipe(
            colours,
            seed=3,
            workers={
                "count": 2,
                "log_every_steps": 5,
                "node_load_seconds": 0.2,
                "dollars_per_hour": 2.0,
                "peak_tflops": 0.1,
            },
        )
    )
    client = MlflowClient()
    assert result.run_id is not None
    logged = client.get_run(result.run_id).data.metrics
    every_window = {
        "images_per_second",
        "mfu",
        "time/data_wait",
        "time/step",
        "memory/peak_gib",
        "grad_norm",
        "lr",
        "exaflops",
        "eta_seconds",
        "cost/dollars",
        "cost/estimated_dollars",
    }
    assert every_window <= logged.keys()
    for name in every_window:
        assert [point.step for point in client.get_metric_history(result.run_id, name)] == list(range(5, 61, 5)), name
    assert logged["eta_seconds"] == 0 and logged["cost/estimated_dollars"] == logged["cost/dollars"] > 0
    assert 0 < logged["mfu"] < 1 and logged["memory/peak_gib"] > 0.05
    assert client.get_metric_history(result.run_id, "time/checkpoint")
    loads = {name for name in logged if name.startswith("system/")}
    assert len({name.split("/")[1] for name in loads}) == 1, "both workers are on one node, which is told once"
    kinds = {name.split("/")[2] for name in loads}
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= kinds
    assert {"network_receive_megabytes_per_second", "network_transmit_megabytes_per_second"} <= kinds
    steps = [point.step for point in client.get_metric_history(result.run_id, sorted(loads)[0])]
    assert steps == sorted(set(steps)), "points in order, none twice"
    assert not [name for name in result.metrics if name.startswith("system/")]
