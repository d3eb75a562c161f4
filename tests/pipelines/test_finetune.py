"""Fine-tuning on the real stack: weights in, a model version out."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from pipelines import finetune, identity, store
from pipelines.config import RecipeError, from_dict
from pipelines.finetune import FinetuneRecipe
from pipelines.weights import fetch_weights
from tests.pipelines.tracking.toys import save_toy

SIZES = {"patch_size": 4, "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2}


def recipe(corpus: str, **changes: Any) -> FinetuneRecipe:
    values: dict[str, Any] = {
        "corpus": corpus,
        "resolution": 24,
        "train": {"batch_size": 16, "total_steps": 20},
        "optimizer": {"kind": "adamw", "peak_lr": 1e-3},
        "augment": {"crop": "none"},
        "validation": {"split": "val", "test_split": "test", "every_epochs": None},
        "workers": {"count": 2, "log_every_steps": 5},
    }
    return from_dict(FinetuneRecipe, {**values, **changes})


def test_neither_weights_nor_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="weights=null trains from scratch and needs model"):
        finetune.run(recipe("nowhere"))


def test_weights_and_a_model_are_refused() -> None:
    with pytest.raises(ValueError, match="model has no effect with weights="):
        finetune.run(recipe("nowhere", weights="w.safetensors", model=SIZES))


def test_a_dropout_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(RecipeError, match="set dropout beside model"):
        recipe("nowhere", model={**SIZES, "dropout": 0.1})


def test_a_bad_model_name_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="model name"):
        finetune.run(recipe("nowhere", weights="w", register_as="a/b"))


def pretrained(root: Path, attempt: int, seed: int, **details: Any) -> str:
    """Weights as the attempt of a pretrain run leaves them, and that run's result."""
    place = root / "runs" / "pretrain" / ("a" * 64)
    weights = place / "attempts" / str(attempt) / "weights.safetensors"
    save_toy(weights, seed)
    result = {"stage": "pretrain", "uri": str(weights), "digest": "a" * 64, "run_id": "run"}
    record = {"attempt": attempt, "result": {**result, "details": {"weights": str(weights), **details}}}
    store.write_json(str(place / "result.json"), record)
    return str(weights)


def test_the_identity_takes_the_content_of_the_weights_and_not_the_run_that_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pretrain --again` with other code gives other weights under the same digest."""
    monkeypatch.setenv("VIT_ROOT", str(tmp_path))
    first = fetch_weights(pretrained(tmp_path, 1, seed=1), tmp_path / "here")
    other = fetch_weights(pretrained(tmp_path, 2, seed=2), tmp_path / "here")
    same = fetch_weights(pretrained(tmp_path, 3, seed=1), tmp_path / "here")
    assert first.digest == same.digest != other.digest
    assert first.lineage["vit.pretrain_digest"] == other.lineage["vit.pretrain_digest"] == "a" * 64
    found = identity.digest_of("finetune", finetune.VERSION, recipe("c"), {"corpus": "x", "weights": "w" * 64})
    assert found[:16] == "ed5e1ca72fce472b", "raise VERSION if the same recipe now gives another result"


def test_what_is_evaluated_or_predicted_with_is_known_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.tracking.weights import find_weights

    monkeypatch.setenv("VIT_ROOT", str(tmp_path))
    reference = pretrained(tmp_path, 1, seed=1)
    content = hashlib.sha256(Path(reference).read_bytes()).hexdigest()
    assert find_weights(reference).digest == content, "results of before the hash was kept"
    assert find_weights(pretrained(tmp_path, 1, seed=1, weights_sha256="as the run says")).digest == "as the run says"
    assert find_weights(f"{tmp_path}/runs/pretrain/{'a' * 64}").digest == "as the run says"


@pytest.mark.stack
def test_weights_become_a_version_that_names_where_it_comes_from(stack: Any, tmp_path: Path) -> None:
    import torch
    from mlflow.tracking import MlflowClient

    from pipelines.tracking.registry import fetch_version
    from tests.pipelines.tiny_corpus import write_colours
    from vit_model import ViTConfig, build_model, load_model, read_specs, save_weights

    corpus = write_colours("colours-finetune", train=160, held_out=60).reference
    model = build_model(ViTConfig(resolution=16, **SIZES, patch_dropout=0.5), 7, "mlp", seed=3)
    source = tmp_path / "pretrained.safetensors"
    save_weights(model, source)
    result = finetune.run(recipe(corpus, weights=str(source), register_as="colours"))
    assert result.uri == "models:/colours/1"
    assert result.metrics["test/top1_low"] <= result.metrics["test/top1"] <= result.metrics["test/top1_high"]

    version = fetch_version(result.uri, tmp_path / "version")
    config, input_spec, output_spec = read_specs(version.weights)
    assert config.resolution == 24 and config.patch_dropout == 0.0  # type: ignore[union-attr]
    assert input_spec is not None and (input_spec.height, input_spec.width) == (24, 24)
    assert output_spec is not None and output_spec.class_names == ("blue", "green", "red")
    assert load_model(version.weights)(torch.zeros(1, 3, 24, 24)).logits.shape == (1, 3)
    assert version.tags["vit.weights"] == str(source) and "vit.weights_digest" in version.tags
    assert {"figures/confusion.png", "figures/samples.png"} <= {
        item.path for item in MlflowClient().list_artifacts(version.run_id, "figures")
    }

    again = finetune.run(recipe(corpus, weights=str(source), register_as="colours"))
    assert again.reused and again.uri == result.uri
    store.delete(store.join(os.environ["VIT_ROOT"], "runs", "finetune", result.digest, "result.json"))
    third = finetune.run(recipe(corpus, weights=str(source), register_as="colours"))
    assert not third.reused and third.uri == result.uri, "one stage run has one version"
