"""Model versions: registered once, readable by strangers, and never able to run code in our stages."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import vit_model
from pipelines import identity, store
from pipelines.tracking import registry
from pipelines.tracking.client import TrackingError, connect
from pipelines.tracking.package import check_safetensors
from pipelines.tracking.run import track
from tests.pipelines.tracking.toys import (
    CLASSES,
    INPUT,
    ToyCorpus,
    ToyRecipe,
    attempt,
    digest_named,
    own_root,
    picture,
    save_toy,
)

stack_needed = pytest.mark.stack
METRICS = {"val/top1": 0.9123, "val/loss": 0.5}


@pytest.fixture
def place(stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    own_root(monkeypatch)
    yield tmp_path


def register(folder: Path, digest: str, name: str, number: int = 1, seed: int = 0, first: int = 1) -> str:
    weights = save_toy(folder / f"toy{seed}.safetensors", seed)
    own = attempt(digest, number, first=first)
    with track(own, ToyRecipe(), corpus=ToyCorpus()) as run:
        return registry.register_version(
            run,
            name=name,
            weights=weights,
            corpus=ToyCorpus(),
            metrics=METRICS,
            tags={"vit.pretrain_digest": "cd" * 32, "vit.pretrain_run_id": "run-of-pretraining"},
            attempt=own,
        )


@stack_needed
def test_a_version_carries_lineage_metrics_and_a_readable_description(place: Path) -> None:
    digest = digest_named("lineage")
    reference = register(place, digest, "toy-lineage")
    info = registry.find_version(reference)
    assert info.uri == reference
    assert info.digest == digest
    assert info.tags["vit.pretrain_digest"] == "cd" * 32
    assert info.tags["vit.pretrain_run_id"] == "run-of-pretraining"
    assert info.tags["vit.corpus_digest"] == ToyCorpus().digest
    assert info.tags["metric.val/top1"] == "0.9123"
    assert connect().get_run(info.run_id).data.tags["vit.digest"] == digest
    description = connect().get_model_version(info.name, info.version).description
    assert "| val/top1 | 0.9123 |" in description
    assert "| pretrain run | run-of-pretraining |" in description
    client = connect()
    model_id = client.get_model_version(info.name, info.version).source.removeprefix("models:/")
    metrics = {metric.key: metric.value for metric in client.get_logged_model(model_id).metrics or []}
    assert metrics == METRICS


@stack_needed
def test_a_stage_run_registers_one_version_however_often_it_is_tried(place: Path) -> None:
    digest = digest_named("once")
    first = register(place, digest, "toy-once")
    assert register(place, digest, "toy-once", number=2, seed=1) == first
    again = register(place, digest, "toy-once", number=3, seed=1, first=3)
    assert again != first
    assert register(place, digest, "toy-once", number=4, seed=2, first=3) == again, "an --again that was interrupted"


@stack_needed
def test_an_attempt_that_lost_its_lease_registers_nothing(place: Path) -> None:
    digest = digest_named("lost")
    weights = save_toy(place / "toy.safetensors")
    own = attempt(digest)
    with pytest.raises(identity.LeaseLost), track(own, ToyRecipe()) as run:
        store.write_json(store.join(own.root, "lease.json"), {"token": "somebody else"})
        registry.register_version(
            run, name="toy-lost", weights=weights, corpus=ToyCorpus(), metrics={}, tags={}, attempt=own
        )
    with pytest.raises(registry.UnknownModel):
        registry.find_version("models:/toy-lost/1")


@stack_needed
def test_a_stranger_loads_a_version_and_gets_what_our_own_path_gives(place: Path) -> None:
    import mlflow.pyfunc

    reference = register(place, digest_named("parity"), "toy-parity")
    files = [picture(1), picture(2, 40, "JPEG"), b"not an image", picture(3, 16)]
    loaded = mlflow.pyfunc.load_model(reference)
    table = loaded.predict(pd.DataFrame({"image": files}), params={"top_k": len(CLASSES)})

    fetched = registry.fetch_version(reference, place / "fetched")
    model = vit_model.load_model(fetched.weights).eval()
    _, spec, output = vit_model.read_specs(fetched.weights)
    assert spec == INPUT
    assert output is not None
    for row, data in zip(table.itertuples(), files, strict=True):
        if data == b"not an image":
            assert (row.prediction, row.probability, row.top_classes) == ("", 0.0, [])
            assert row.error
            continue
        with torch.inference_mode():
            logits = model(vit_model.normalize(vit_model.load_image(data, spec)[None], spec)).logits
            expected = output.probabilities(logits)[0].numpy()
        order = np.argsort(-expected)
        assert list(row.top_classes) == [CLASSES[index] for index in order]
        assert row.prediction == CLASSES[order[0]]
        np.testing.assert_allclose(row.top_probabilities, expected[order], atol=1e-5)
    assert len(loaded.predict([{"image": files[0]}])) == 1
    json.dumps(table.to_dict("records"), allow_nan=False)  # What `mlflow models serve` answers with.


@stack_needed
def test_our_stages_never_run_the_code_of_a_version(place: Path) -> None:
    """The planted file runs when MLflow loads the version (the control), and not when we do."""
    import mlflow.pyfunc

    reference = register(place, digest_named("planted"), "toy-planted")
    client = connect()
    info = registry.find_version(reference)
    model_id = client.get_model_version(info.name, info.version).source.removeprefix("models:/")
    trace = place / "it-ran"
    planted = place / "pyfunc_model.py"
    source = Path(registry.__file__).with_name("pyfunc_model.py").read_text()
    planted.write_text(source + f"\nopen({str(trace)!r}, 'w').close()\n")
    overwrite(client, model_id, planted, "")
    fetched = registry.fetch_version(reference, place / "fetched")
    vit_model.load_model(fetched.weights)
    assert [path.name for path in (place / "fetched").rglob("*") if path.is_file()] == ["weights.safetensors"]
    assert not trace.exists()
    mlflow.pyfunc.load_model(reference)
    assert trace.exists()


@stack_needed
def test_changed_weights_and_pickles_are_refused(place: Path) -> None:
    reference = register(place, digest_named("pickle"), "toy-pickle")
    client = connect()
    info = registry.find_version(reference)
    model_id = client.get_model_version(info.name, info.version).source.removeprefix("models:/")
    trace = place / "it-ran"
    poisoned = place / "weights.safetensors"
    poisoned.write_bytes(pickle.dumps(_Touch(str(trace))))
    overwrite(client, model_id, poisoned, "artifacts")
    with pytest.raises(TrackingError, match="the weights differ from the sha256 in its tag"):
        registry.fetch_version(reference, place / "one")
    client.delete_model_version_tag(info.name, info.version, "vit.weights_sha256")
    with pytest.raises(ValueError, match="not a safetensors file"):
        registry.fetch_version(reference, place / "two")
    assert not trace.exists()


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def overwrite(client: Any, model_id: str, path: Path, folder: str) -> None:
    """Change an artifact of a logged model behind MLflow's back, as somebody with write access could."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    location = client.get_logged_model(model_id).artifact_location
    get_artifact_repository(location).log_artifact(str(path), folder or None)


@stack_needed
def test_unknown_versions_are_named_with_the_remedy(place: Path) -> None:
    register(place, digest_named("names"), "toy-names")
    with pytest.raises(registry.UnknownModel, match=r"nearest: .*toy-names"):
        registry.find_version("models:/toy-name/1")
    with pytest.raises(TrackingError, match=r"has no alias 'champion' .*vit promote"):
        registry.find_version("models:/toy-names@champion")
    with pytest.raises(registry.UnknownModel):
        registry.find_version("models:/toy-names/99")
    assert registry.alias_target("toy-names", "champion") is None
    assert registry.alias_target("no-such-model-at-all", "champion") is None


@pytest.mark.parametrize("reference", ["models:/x", "models:/x/latest", "models:/m-123/a/b", "x@champion"])
def test_references_that_name_no_version_are_refused(reference: str) -> None:
    with pytest.raises(TrackingError, match="models:/NAME/VERSION or models:/NAME@ALIAS"):
        registry.find_version(reference)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "'; drop", " x", "x" * 200])
def test_model_names_that_cannot_be_part_of_a_reference_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model name"):
        registry.check_model_name(name)


def test_the_description_holds_no_markup_of_a_user() -> None:
    text = registry.describe({"val/top1": 0.5}, {"vit.corpus": "<script>|`x`\n# big"})
    assert "<script>" not in text
    assert r"&lt;script&gt;\|\`x\` # big" in text


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps([1]), b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        check_safetensors(path)


def test_a_toy_is_a_safetensors_file(tmp_path: Path) -> None:
    check_safetensors(save_toy(tmp_path / "toy.safetensors"))
