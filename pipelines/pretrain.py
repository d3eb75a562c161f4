"""Stage `pretrain`: a corpus in, weights out. Ray Data streams the images, Ray Train runs the workers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines import identity
from pipelines.config import Strict, input_
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
    AdamW,
    CheckpointConfig,
    DistillConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    ValidationConfig,
    WorkerConfig,
)
from pipelines.training.schedules import ScheduleConfig
from pipelines.weights import Weights, fetch_teacher, named

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus

__all__ = ["STAGE", "VERSION", "PretrainRecipe", "run"]

STAGE = "pretrain"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainRecipe(Strict):
    """Train a Vision Transformer from random weights."""

    corpus: str = input_()  # NAME@current, NAME@DIGEST, or where a corpus lies.
    split: str = "train"  # Split to train on.
    model: ModelConfig  # What is trained.
    resolution: int = 224  # Image side in px.
    head: Literal["mlp", "linear"] = "mlp"  # mlp: one hidden tanh layer, as the paper pretrains.
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0  # Of initial weights, order, augmentation and dropout.
    lanes: int | None = None  # Tapes that are read side by side; null: chosen from corpus and batch_size.
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata={"how": True})
    distill: DistillConfig | None = None  # Learn from a teacher's answers too.

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"resolution={self.resolution} px shows nothing; the paper uses 224")
        if self.train.masked is not None:
            self._check_masked()
        patch_size = self.model.patch_size
        if self.model.variant is None and patch_size is not None and self.resolution % patch_size:
            near = max(patch_size, round(self.resolution / patch_size) * patch_size)
            raise ValueError(
                f"resolution={self.resolution} is not divisible by model.patch_size={patch_size}; nearest: {near}"
            )

    def _check_masked(self) -> None:
        """What reads no label leaves no classes."""
        if self.head != "linear" or self.distill is not None or self.model.head_bias is not None:
            raise ValueError(
                "head: mlp, distill and model.head_bias have no effect with train.masked, which trains no classes;"
                " set head: linear and leave the others out"
            )
        if self.augment.mixup or self.augment.cutmix:
            raise ValueError("augment.mixup and cutmix mix labels, which train.masked does not read; remove them")
        if self.model.patch_dropout or self.model.pool == "map":
            raise ValueError("train.masked asks patches: model.patch_dropout and pool: map do not fit it; remove them")


def run(recipe: PretrainRecipe) -> StageResult:
    """Train, resume, or return the finished result of the same recipe and corpus."""
    from pipelines.corpus.manifest import open_corpus

    corpus = open_corpus(recipe.corpus)
    check_splits(recipe, corpus)
    check_choices(recipe, corpus)
    check_model(recipe.train, model_config(recipe.model, recipe.resolution), recipe.optimizer)
    with tempfile.TemporaryDirectory(prefix="vit-pretrain-") as folder:
        teacher = fetch_teacher(recipe.distill, recipe.train, corpus, Path(folder))
        inputs = {"corpus": corpus.digest, **named(teacher)}
        work = partial(_work, recipe, corpus, teacher)
        return identity.run_stage(STAGE, VERSION, recipe, inputs, work, identity.missing_object)


def _work(recipe: PretrainRecipe, corpus: Corpus, teacher: Weights | None, attempt: Attempt) -> StageResult:
    from pipelines.tracking.run import track

    model = model_config(recipe.model, recipe.resolution)
    tags = teacher.lineage if teacher is not None else {}
    with track(attempt, recipe, corpus=corpus, tags=tags) as run:
        outcome = train_model(
            recipe,
            attempt,
            corpus,
            run_id=run.id,
            model=model,
            head=recipe.head,
            initial=None,
            input_spec=square_input(model),
            teacher=teacher,
            head_bias=recipe.model.head_bias,
        )
        log_pictures(run, attempt, outcome, corpus.class_names)
        return attempt.result(
            uri=outcome.weights,
            run_id=run.id,
            metrics=metrics_of(outcome),
            weights=outcome.weights,
            weights_sha256=outcome.weights_sha256,
            steps=outcome.step,
            train_seconds=outcome.train_seconds,
        )
