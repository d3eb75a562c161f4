"""Stage `finetune`: pretrained weights and a downstream corpus in, a model version out (paper, section 3.2)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import identity, store
from pipelines.config import RecipeError, Strict, input_
from pipelines.fit import (
    check_choices,
    check_model,
    check_splits,
    log_pictures,
    metrics_of,
    model_config,
    square_input,
    train_model,
)
from pipelines.identity import Attempt, StageResult
from pipelines.reader.loader import AugmentConfig, ReaderConfig
from pipelines.training.config import (
    CheckpointConfig,
    DistillConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Sgd,
    TrainConfig,
    ValidationConfig,
    WorkerConfig,
)
from pipelines.training.schedules import ScheduleConfig
from pipelines.weights import Weights, fetch_teacher, fetch_weights, named

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus
    from pipelines.tracking.run import Run
    from pipelines.training.watch import Outcome

__all__ = ["STAGE", "VERSION", "FinetuneRecipe", "check", "run"]

STAGE = "finetune"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRecipe(Strict):
    """Transfer pretrained weights to a downstream corpus, usually at a higher resolution."""

    corpus: str = input_()  # NAME@current, NAME@DIGEST, or where a corpus lies.
    weights: str | None = input_(default=None)  # URI or path of weights, models:/NAME/VERSION; null: from scratch.
    split: str = "train"  # Split to train on.
    model: ModelConfig | None = None  # From scratch: what is trained. With weights the file says it.
    resolution: int = 384  # Image side in px; the position embedding is interpolated to it.
    dropout: float = 0.0  # The paper's places; whatever the weights were trained with.
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=Sgd)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0  # Of order, augmentation, dropout, and of initial weights from scratch.
    lanes: int | None = None  # Tapes that are read side by side; null: chosen from corpus and batch_size.
    register_as: str | None = None  # Name of the registered model that gets a new version; null: none.
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata={"how": True})
    distill: DistillConfig | None = None  # Learn from a teacher's answers too.

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"resolution={self.resolution} px shows nothing; the paper uses 384")
        if self.train.masked is not None:
            raise ValueError("train.masked belongs to pretrain; its weights are what finetune starts from")
        if self.model is not None and {"dropout", "patch_dropout"} & self.model.overrides().keys():
            raise ValueError(
                "model.dropout and model.patch_dropout have no effect in finetune; set dropout beside model"
            )


def check(recipe: FinetuneRecipe) -> None:
    """What the fields ask of each other once the workflow or the command has filled them in. Raises RecipeError."""
    if recipe.weights is None and recipe.model is None:
        raise RecipeError(
            "weights=null trains from scratch and needs model; give weights, or model.variant, or its sizes"
        )
    if recipe.weights is not None and recipe.model is not None:
        raise RecipeError(f"model has no effect with weights={recipe.weights!r}, which say what they are; remove one")
    if recipe.register_as is not None:
        from pipelines.tracking.registry import check_model_name

        check_model_name(recipe.register_as)


def run(recipe: FinetuneRecipe) -> StageResult:
    """Train, resume, or return the finished result of the same recipe, weights and corpus."""
    from pipelines.corpus.manifest import open_corpus

    check(recipe)
    corpus = open_corpus(recipe.corpus)
    check_splits(recipe, corpus)
    check_choices(recipe, corpus)
    if recipe.model is not None:
        scratch = model_config(recipe.model, recipe.resolution, dropout=recipe.dropout)
        check_model(recipe.train, scratch, recipe.optimizer)
    with tempfile.TemporaryDirectory(prefix="vit-finetune-") as folder:
        weights = fetch_weights(recipe.weights, Path(folder)) if recipe.weights is not None else None
        teacher = fetch_teacher(recipe.distill, recipe.train, corpus, Path(folder))
        inputs = {"corpus": corpus.digest, "weights": weights.digest if weights else "none", **named(teacher)}
        work = partial(_work, recipe, corpus, weights, teacher, Path(folder))
        return identity.run_stage(STAGE, VERSION, recipe, inputs, work, _lost)


def _lost(result: StageResult) -> str | None:
    """A version that was deleted from the registry is registered again; MLflow out of reach says nothing."""
    if not result.uri.startswith("models:/"):
        return identity.missing_object(result)
    from pipelines.tracking.client import TrackingError
    from pipelines.tracking.registry import UnknownModel, find_version

    try:
        find_version(result.uri)
    except UnknownModel:
        return f"{result.uri} is not in the registry any more"
    except TrackingError:
        return None
    return None


def _work(
    recipe: FinetuneRecipe,
    corpus: Corpus,
    weights: Weights | None,
    teacher: Weights | None,
    folder: Path,
    attempt: Attempt,
) -> StageResult:
    from pipelines.tracking.run import track

    initial = None
    if weights is None:
        assert recipe.model is not None
        model = model_config(recipe.model, recipe.resolution, dropout=recipe.dropout)
    else:
        from vit_model import load_model

        loaded = load_model(
            weights.path,
            num_classes=len(corpus.class_names),
            resolution=recipe.resolution,
            dropout=recipe.dropout,
            patch_dropout=0.0,
        )
        model = loaded.config
        check_model(recipe.train, model, recipe.optimizer)
        # Workers anywhere must reach it, and a later attempt must find the same.
        initial = store.join(attempt.uri, "initial" + weights.path.suffix)
        store.upload(weights.path, initial)
    lineage = weights.lineage if weights else {"vit.weights": "none (from scratch)"}
    lineage = lineage | (teacher.lineage if teacher else {})
    with track(attempt, recipe, corpus=corpus, tags=lineage) as run:
        outcome = train_model(
            recipe,
            attempt,
            corpus,
            run_id=run.id,
            model=model,
            head="linear",
            initial=initial,
            input_spec=square_input(model),
            teacher=teacher,
            head_bias=recipe.model.head_bias if recipe.model is not None else None,
        )
        log_pictures(run, attempt, outcome, corpus.class_names)
        return _result(recipe, corpus, attempt, run, outcome, lineage, folder)


def _result(
    recipe: FinetuneRecipe,
    corpus: Corpus,
    attempt: Attempt,
    run: Run,
    outcome: Outcome,
    lineage: dict[str, str],
    folder: Path,
) -> StageResult:
    uri, metrics = outcome.weights, metrics_of(outcome)
    if recipe.register_as is not None:
        from pipelines.tracking.registry import register_version

        uri = register_version(
            run,
            name=recipe.register_as,
            weights=store.download(outcome.weights, folder / "trained.safetensors"),
            corpus=corpus,
            metrics={key: value for key, value in metrics.items() if key.startswith(("val/", "test/"))},
            tags=lineage,
            attempt=attempt,
        )
    details: dict[str, Any] = {
        "weights": outcome.weights,
        "weights_sha256": outcome.weights_sha256,
        "pretrain_digest": lineage.get("vit.pretrain_digest"),
        "pretrain_run_id": lineage.get("vit.pretrain_run_id"),
        "steps": outcome.step,
        "train_seconds": outcome.train_seconds,
    }
    return attempt.result(uri=uri, run_id=run.id, metrics=metrics, **details)
