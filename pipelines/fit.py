"""What `pretrain` and `finetune` share: from a recipe and a corpus to trained weights and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pipelines import identity, store
from pipelines.config import RecipeError
from pipelines.identity import Attempt
from pipelines.progress import say
from pipelines.reader.loader import AugmentConfig, ReaderConfig
from pipelines.training.config import (
    AnyOptimizer,
    CheckpointConfig,
    DistillConfig,
    ParallelConfig,
    TrainConfig,
    ValidationConfig,
    WorkerConfig,
)
from pipelines.training.config import ModelConfig as SizeConfig
from pipelines.training.schedules import ScheduleConfig
from pipelines.weights import Weights

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus
    from pipelines.reader.engines import Engine, Wanted
    from pipelines.tracking.run import Run
    from pipelines.training.watch import Outcome
    from vit_model import InputSpec, ModelConfig

__all__ = [
    "TrainingRecipe",
    "check_choices",
    "check_model",
    "check_splits",
    "log_pictures",
    "metrics_of",
    "model_config",
    "square_input",
    "train_model",
]


class TrainingRecipe(Protocol):
    """What the recipes of `pretrain` and `finetune` have in common."""

    @property
    def split(self) -> str: ...
    @property
    def lanes(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optimizer(self) -> AnyOptimizer: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def augment(self) -> AugmentConfig: ...
    @property
    def reader(self) -> ReaderConfig: ...
    @property
    def validation(self) -> ValidationConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def workers(self) -> WorkerConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def distill(self) -> DistillConfig | None: ...


def check_splits(recipe: TrainingRecipe, corpus: Corpus) -> None:
    """The splits that the recipe names must be there and fit its budget, before anything starts."""
    named = {
        "split": recipe.split,
        "validation.split": recipe.validation.split,
        "validation.test_split": recipe.validation.test_split,
    }
    for field, split in named.items():
        if split is not None and not corpus.splits.get(split):
            known = ", ".join(f"{name} ({count:,})" for name, count in corpus.splits.items())
            off = "; null switches it off" if field != "split" else ""
            raise ValueError(f"{field}={split!r} is no split of {corpus.uri}; it has {known}{off}")
    recipe.schedule.check(recipe.train.steps(corpus.splits[recipe.split]))


def check_choices(recipe: TrainingRecipe, corpus: Corpus) -> None:
    """What the settings ask of each other and of the corpus; raises ValueError (RecipeError) with the remedy."""
    from pipelines.training.rules import check_together

    check_together(recipe.train, recipe.optimizer, recipe.schedule, recipe.validation, recipe.parallel, recipe.workers)
    if corpus.head.multi_label and recipe.train.loss == "softmax" and recipe.train.masked is None:
        raise RecipeError(
            f"{corpus.uri} has several labels an image, and train.loss: softmax asks for the one right class; set"
            " train.loss: sigmoid, which asks of every class whether it is there"
        )
    if unknown := sorted((recipe.train.class_weights or {}).keys() - set(corpus.class_names)):
        raise ValueError(f"train.class_weights names {', '.join(unknown)}, which {corpus.uri} has not")


def check_model(train: TrainConfig, model: ModelConfig, optimizer: AnyOptimizer | None = None) -> None:
    """What the settings ask of the model; raises ValueError with the remedy."""
    from pipelines.training.masked import num_outputs

    if model.kind == "resnet":
        if train.activation_checkpointing:
            raise ValueError("train.activation_checkpointing has no effect on a ResNet; remove it")
        if (layer_decay := getattr(optimizer, "layer_decay", None)) is not None:
            raise ValueError(f"optimizer.layer_decay={layer_decay} needs a model of blocks; a ResNet has none: null")
        if getattr(optimizer, "kind", "") == "muon":
            raise ValueError("optimizer kind: muon is for the matrices inside blocks; a ResNet has none: adamw or sgd")
    if train.masked is not None:
        num_outputs(train.masked, model)
    if train.packing is not None and (model.kind == "resnet" or model.drop_path):
        raise ValueError(
            "train.packing packs the tokens of a ViT into one row, which drop_path would drop whole; take a ViT with"
            " drop_path: 0, or train.progressive"
        )


def model_config(config: SizeConfig, resolution: int, **overrides: Any) -> ModelConfig:
    """The model that a recipe describes."""
    from vit_model import ViTConfig, variant

    given = {**config.overrides(), **overrides, "resolution": resolution}
    return ViTConfig(**given) if config.variant is None else variant(config.variant, **given)


def square_input(model: ModelConfig) -> InputSpec:
    """Images straight to the model's size, -1..1: the paper's code resizes to a square without a centre crop."""
    from vit_model import InputSpec

    height, width = model.size
    channels = model.channels
    return InputSpec(channels=channels, height=height, width=width, mean=(0.5,) * channels, std=(0.5,) * channels)


def train_model(
    recipe: TrainingRecipe,
    attempt: Attempt,
    corpus: Corpus,
    *,
    run_id: str | None,
    model: ModelConfig,
    head: Literal["linear", "mlp"],
    initial: str | None,
    input_spec: InputSpec,
    teacher: Weights | None = None,
    head_bias: float | None = None,
) -> Outcome:
    """Work out the job, say what will be done, and do it on the cluster."""
    from pipelines.reader.loader import WINDOW_PAGES, choose_lanes
    from pipelines.training import masked
    from pipelines.training.cluster import choose_placement, connect
    from pipelines.training.compute import macs_per_image
    from pipelines.training.job import TrainJob
    from pipelines.training.rules import check_workers
    from pipelines.training.worker import launch
    from vit_model import OutputSpec, build_model, count_parameters

    task = recipe.train.masked
    connect()
    placement = choose_placement(recipe.workers)
    check_workers(recipe.parallel, *(placement.limits or (placement.count, placement.count)))
    num_images = corpus.splits[recipe.split]
    total_steps = recipe.train.steps(num_images)
    batch_size, num_classes = recipe.train.batch_size, len(corpus.class_names)
    # At least two, so that one worker and two see the same order.
    most = placement.limits[1] if placement.limits else placement.count
    lanes = choose_lanes(corpus.pages(recipe.split), batch_size, max(2, most), recipe.lanes)
    placement = placement.at_most(_kept_lanes(attempt) or lanes)
    engine = _engine(recipe.reader.wanted_engine, attempt, run_id)
    reader = recipe.reader if engine.name == "nvjpeg" else replace(recipe.reader, engine=engine.name)
    job = TrainJob(
        attempt=attempt,
        run_id=run_id,
        corpus=corpus.reference,
        split=recipe.split,
        lanes=lanes,
        window_pages=WINDOW_PAGES,
        seed=recipe.seed,
        total_steps=total_steps,
        num_images=num_images,
        model=model,
        head=head,
        initial=initial,
        input_spec=input_spec,
        output_spec=OutputSpec(
            class_names=corpus.class_names, activation="softmax" if recipe.train.loss == "softmax" else "sigmoid"
        ),
        macs_per_image=macs_per_image(model, num_classes, head, recipe.train),
        train=recipe.train,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        augment=recipe.augment,
        reader=reader,
        engine=engine,
        validation=recipe.validation,
        checkpoint=recipe.checkpoint,
        workers=recipe.workers,
        use_gpu=placement.use_gpu,
        parallel=recipe.parallel,
        distill=recipe.distill,
        teacher=_put_teacher(teacher, attempt),
        head_bias=head_bias or 0.0,
    )
    built = masked.build(model, task, device="meta") if task else build_model(model, num_classes, head, device="meta")
    parameters = count_parameters(built)
    say(
        f"{attempt.stage}: batch {batch_size} over {placement}, "
        f"{total_steps:,} steps = {total_steps * batch_size / num_images:.3g} epochs of {num_images:,} images, "
        f"{parameters:,} parameters; {identity.code_origin()}"
    )
    return launch(job, placement)


def _kept_lanes(attempt: Attempt) -> int | None:
    """Of the checkpoint that will be resumed: no more workers than these can take part."""
    from pipelines.training.checkpoint import Checkpoints

    lanes = Checkpoints(attempt).newest_state().get("order", {}).get("lanes")
    return None if lanes is None else int(lanes)


def _put_teacher(teacher: Weights | None, attempt: Attempt) -> str | None:
    """Workers anywhere must reach it, and a later attempt must find the same."""
    if teacher is None:
        return None
    uri = store.join(attempt.uri, "teacher" + teacher.path.suffix)
    store.upload(teacher.path, uri)
    return uri


def _engine(wanted: Wanted, attempt: Attempt, run_id: str | None) -> Engine:
    """What decodes: the engine of the checkpoint that will be resumed, else the recipe's choice; on all nodes."""
    from pipelines.reader.engines import check_nodes, choose
    from pipelines.tracking.run import Run
    from pipelines.training.checkpoint import Checkpoints

    engine = choose(wanted, Checkpoints(attempt).newest_state().get("engine"))
    check_nodes(engine)
    say(f"{attempt.stage}: images are decoded by {engine}")
    if run_id is not None:
        run = Run.attach(run_id, attempt)
        run.set_tags({"vit.decode_engine": str(engine)})
        run.close()
    return engine


def metrics_of(outcome: Outcome) -> dict[str, float]:
    """The metrics, and 95 % intervals of every held-out accuracy."""
    from pipelines.evaluation.accuracy import wilson

    metrics = dict(outcome.metrics)
    for split, images in outcome.measured_images.items():
        low, high = wilson(round(metrics[f"{split}/top1"] * images), images)
        metrics |= {f"{split}/top1_low": low, f"{split}/top1_high": high, f"{split}/images": float(images)}
    return metrics


def log_pictures(run: Run, attempt: Attempt, outcome: Outcome, class_names: Sequence[str]) -> None:
    """Figures of the MLflow run: all of it on one page, confusion and sample predictions of the last validation.

    With several labels an image there is no confusion figure; a sample is right when the best class is one of its own.
    """
    import numpy as np

    from pipelines.tracking.figures import PANELS, confusion_figure, predictions_figure, summary_figure

    facts = {name: f"{value:.6g}" for name, value in sorted(metrics_of(outcome).items()) if name != "eta_seconds"}
    facts = {
        "code": identity.code_origin(),
        "steps": f"{outcome.step:,}",
        "seconds": f"{outcome.train_seconds:.0f}",
    } | facts
    curves = {key: run.history(key) for keys in PANELS.values() for key in keys}
    run.log_figure(summary_figure(attempt.name, facts, curves), "summary")

    if outcome.confusion is not None:
        matrix = np.asarray(outcome.confusion, np.int64)
        labels, predictions = np.nonzero(matrix)
        figure = confusion_figure(labels, predictions, matrix[labels, predictions], class_names)
        if figure is not None:
            run.log_figure(figure, "confusion")
    if outcome.samples is not None:
        from safetensors.numpy import load

        samples = load(store.read(outcome.samples))
        best = samples["probabilities"].argmax(axis=1)
        figure = predictions_figure(
            list(samples["images"]),
            [_true_name(label, own, class_names) for label, own in zip(samples["labels"], best, strict=True)],
            [class_names[label] for label in best],
            samples["probabilities"].max(axis=1).tolist(),
        )
        run.log_figure(figure, "samples")


def _true_name(label: Any, best: int, class_names: Sequence[str]) -> str:
    """Of a class number; of a multi-hot row the best class if it is one of the row's, else all of the row's."""
    if not label.shape:
        return class_names[int(label)]
    if label[best]:
        return class_names[best]
    return ", ".join(class_names[own] for own in label.nonzero()[0])
