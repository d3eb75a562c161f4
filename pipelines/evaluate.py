"""Stage `evaluate`: a model on the held-out split of a corpus -> accuracies with intervals, and one row per sample.

The pixels take the one reference path (vit_model.preprocess) that prediction and serving take too.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity, store
from pipelines.config import Strict, how, input_
from pipelines.identity import StageResult, missing_object

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.corpus.manifest import Corpus
    from pipelines.evaluation.accuracy import Accuracy, Scores
    from pipelines.identity import Attempt
    from pipelines.tracking.run import Run
    from pipelines.tracking.weights import ModelSource
    from vit_model import InputSpec, OutputSpec

__all__ = ["STAGE", "VERSION", "EvaluateRecipe", "read_predictions", "run"]

STAGE = "evaluate"
VERSION = 1

EVALUATION = "evaluation.json"
PREDICTIONS = "predictions.parquet"
TAGGED = ("top1", "top5", "loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRecipe(Strict):
    """A model on the held-out part of a corpus: top-1, top-5, loss, calibration, each class."""

    model: str = input_()  # models:/NAME/VERSION, models:/NAME@ALIAS, or the URI of safetensors weights
    corpus: str = input_()  # NAME@current, NAME@DIGEST, or the same with a URI or a folder
    split: str = "test"
    unknown_classes: Literal["fail", "wrong"] = "fail"  # Classes of the corpus that the model does not have
    batch_size: int = how(default=256)
    device: Literal["auto", "cpu", "cuda"] = how(default="auto")
    num_threads: int = how(default=2)  # Decoding threads
    num_pictures: int = how(default=24)  # Sample predictions drawn for MLflow; 0 draws none

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_threads < 1 or self.num_pictures < 0:
            raise ValueError(
                f"batch_size={self.batch_size}, num_threads={self.num_threads}, num_pictures={self.num_pictures}: "
                "at least 1, 1 and 0"
            )


def run(recipe: EvaluateRecipe) -> StageResult:
    from pipelines.corpus.manifest import open_corpus
    from pipelines.tracking.weights import find_weights

    corpus = open_corpus(recipe.corpus)
    if corpus.head.multi_label:
        raise ValueError(
            f"{corpus.reference} has several labels an image, and evaluate measures one label an image; pretrain and"
            " finetune measure top-1 of such a corpus themselves: name the split in validation.test_split"
        )
    source = find_weights(recipe.model)
    if not corpus.splits.get(recipe.split):
        held = ", ".join(f"{name} ({n:,})" for name, n in corpus.splits.items())
        raise ValueError(f"split {recipe.split!r} of {corpus.reference} has no samples; it has {held}")
    inputs = {**source.inputs(), "corpus": corpus.digest}
    return identity.run_stage(
        STAGE, VERSION, recipe, inputs, lambda attempt: _evaluate(recipe, attempt, source, corpus), missing_object
    )


def _evaluate(recipe: EvaluateRecipe, attempt: Attempt, source: ModelSource, corpus: Corpus) -> StageResult:
    from pipelines.evaluation.calibration import calibration
    from pipelines.tracking.run import track

    with track(attempt, recipe, corpus=corpus, tags={"vit.model": source.uri, **_lineage(source)}) as run:
        with tempfile.TemporaryDirectory(prefix="vit-evaluate-") as folder:
            accuracy, pictures, output_spec = _predict(recipe, source, corpus, Path(folder))
            scores, rows = accuracy.scores(), accuracy.predictions()
            reliability = calibration(rows.probability, rows.rank < 1)
            metrics = _metrics(recipe.split, scores, reliability.error)
            uri = _write(attempt, recipe, source, corpus, accuracy, scores, metrics, output_spec, Path(folder))
        run.log_metrics(metrics, step=0)
        _draw(run, accuracy, pictures, reliability, output_spec.class_names)
        if source.version is not None:
            _tag_version(source, corpus, recipe.split, metrics, scores, attempt)
        return attempt.result(
            uri=uri,
            run_id=run.id,
            metrics=metrics,
            model=source.uri,
            model_digest=source.digest,
            corpus=corpus.reference,
            split=recipe.split,
            n=scores.n,
            num_unreadable=scores.num_unreadable,
            top1_interval=list(scores.top1_interval),
            predictions=store.join(attempt.uri, PREDICTIONS),
        )


def _predict(
    recipe: EvaluateRecipe, source: ModelSource, corpus: Corpus, folder: Path
) -> tuple[Accuracy, Pictures, OutputSpec]:
    import torch

    import vit_model
    from pipelines.evaluation.accuracy import UNKNOWN, Accuracy, class_map
    from pipelines.progress import progress
    from pipelines.reader.loader import ReaderConfig, eval_batches
    from pipelines.tracking.weights import fetch_weights

    path = fetch_weights(source, folder)
    spec, output_spec = specs_of(path, source.uri)
    classes = torch.from_numpy(class_map(corpus.class_names, output_spec.class_names))
    missing = [name for name, place in zip(corpus.class_names, classes, strict=True) if place == UNKNOWN]
    if missing and recipe.unknown_classes == "fail":
        raise ValueError(
            f"{source.uri} has no class {missing[0]!r} ({len(missing)} of {len(corpus.class_names)} classes of the "
            f"corpus are unknown to it); fine-tune on this corpus, or count them as wrong with unknown_classes: wrong"
        )
    device = choose_device(recipe.device)
    model = vit_model.load_model(path).eval().to(device)
    accuracy = Accuracy(len(output_spec.class_names), output_spec.activation)
    pictures = Pictures(recipe.num_pictures)
    batches = eval_batches(
        corpus,
        split=recipe.split,
        batch_size=recipe.batch_size,
        spec=spec,
        # Threads of this process: the pixels are the same with Ray, and a held-out split is small.
        reader=ReaderConfig(backend="local", num_threads=recipe.num_threads),
    )
    done = 0
    with torch.inference_mode(), progress(f"evaluate {recipe.split}", corpus.splits[recipe.split], "images") as bar:
        for batch in batches:
            images = batch.images.to(device, non_blocking=True)
            logits = model(vit_model.normalize(images, spec)).logits
            labels = classes[batch.labels.to(torch.int64).clamp(min=0)]
            rows = accuracy.update(logits, labels, batch.weights, batch.sample_ids)
            pictures.add(batch.images[batch.weights > 0], rows)
            done += len(rows)
            bar.update(done)
    return accuracy, pictures, output_spec


@dataclass(slots=True)
class Pictures:
    """The first few images, and those on which the model is most sure and wrong."""

    limit: int
    first: list[tuple[NDArray[np.uint8], int, int, float]] = field(default_factory=list)
    wrong: list[tuple[NDArray[np.uint8], int, int, float]] = field(default_factory=list)

    def add(self, images: Any, rows: Any) -> None:
        half = self.limit // 2
        if not half:
            return
        order = rows.probability.argsort()[::-1]
        chosen = [int(place) for place in order if rows.rank[place] > 0][:half]
        for target, places in ((self.first, range(min(len(rows), half - len(self.first)))), (self.wrong, chosen)):
            for place in places:
                target.append(
                    (
                        images[place].cpu().numpy().copy(),
                        int(rows.label[place]),
                        int(rows.prediction[place]),
                        float(rows.probability[place]),
                    )
                )
        self.wrong = sorted(self.wrong, key=lambda entry: -entry[3])[:half]


def specs_of(path: Path, uri: str) -> tuple[InputSpec, OutputSpec]:
    """How the model's images are prepared and what its classes are, or a clear error."""
    import vit_model

    _, spec, output_spec = vit_model.read_specs(path)
    if spec is None or output_spec is None:
        raise ValueError(
            f"{uri} does not say how its images are prepared and what its classes are; "
            "write it with vit_model.save_weights(..., input_spec=, output_spec=)"
        )
    return spec, output_spec


def choose_device(name: str) -> Any:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': this machine has no usable CUDA device; use device: auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# What is written ----------------------------------------------------------------------------------------------------


def _metrics(split: str, scores: Scores, calibration_error: float) -> dict[str, float]:
    values = {
        "top1": scores.top1,
        "top1_low": scores.top1_interval[0],
        "top1_high": scores.top1_interval[1],
        "top5": scores.top5,
        "loss": scores.loss,
        "mean_per_class": scores.mean_per_class,
        "calibration_error": calibration_error,
        "num_images": float(scores.n),
        "num_unreadable": float(scores.num_unreadable),
    }
    return {f"{split}/{key}": value for key, value in values.items() if value == value}  # NaN is no JSON


def _write(
    attempt: Attempt,
    recipe: EvaluateRecipe,
    source: ModelSource,
    corpus: Corpus,
    accuracy: Accuracy,
    scores: Scores,
    metrics: dict[str, float],
    output_spec: OutputSpec,
    folder: Path,
) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = accuracy.predictions()
    table = pa.table({name: getattr(rows, name) for name in type(rows).__slots__})
    pq.write_table(table, folder / PREDICTIONS, compression="zstd")
    labels, predictions, counts = accuracy.confusion()
    per_class = [
        {"class": name, "accuracy": None if value != value else float(value)}
        for name, value in zip(output_spec.class_names, scores.per_class, strict=True)
    ]
    record = {
        "schema": 1,
        "model": source.uri,
        "model_digest": source.digest,
        "corpus": corpus.reference,
        "split": recipe.split,
        "metrics": metrics,
        "top1_interval": list(scores.top1_interval),
        "top5_interval": list(scores.top5_interval),
        "interval": "Wilson, 95 %, two-sided",
        "n": scores.n,
        "num_unreadable": scores.num_unreadable,
        "per_class": per_class,
        "confusion": {"label": labels.tolist(), "prediction": predictions.tolist(), "count": counts.tolist()},
        "predictions": store.join(attempt.uri, PREDICTIONS),
    }
    attempt.check()
    store.upload(folder / PREDICTIONS, store.join(attempt.uri, PREDICTIONS))
    uri = store.join(attempt.uri, EVALUATION)
    store.write_json(uri, record)
    return uri


def read_predictions(result: StageResult) -> Any:
    """The per-sample table of an evaluate result (pyarrow)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(store.read(str(result.details["predictions"]))))


def _draw(run: Run, accuracy: Accuracy, pictures: Pictures, reliability: Any, class_names: tuple[str, ...]) -> None:
    from pipelines.tracking import figures

    if (confusion := figures.confusion_figure(*accuracy.confusion(), class_names)) is not None:
        run.log_figure(confusion, "confusion_matrix")
    run.log_figure(figures.reliability_figure(reliability), "reliability")
    if chosen := [*pictures.first, *pictures.wrong]:
        names = [*class_names, "(a class the model does not have)"]  # The last one is where UNKNOWN = -1 points.
        run.log_figure(
            figures.predictions_figure(
                [image for image, *_ in chosen],
                [names[label] for _, label, _, _ in chosen],
                [names[prediction] for _, _, prediction, _ in chosen],
                [probability for *_, probability in chosen],
            ),
            "sample_predictions",
        )


def _lineage(source: ModelSource) -> dict[str, str]:
    tags = {"vit.model_digest": source.digest}
    if source.version is not None:
        kept = ("vit.pretrain_run_id", "vit.pretrain_digest", "vit.run_id")
        tags |= {f"vit.model.{key.removeprefix('vit.')}": source.version.tags.get(key, "") for key in kept}
    return {key: value for key, value in tags.items() if value}


def _tag_version(
    source: ModelSource, corpus: Corpus, split: str, metrics: dict[str, float], scores: Scores, attempt: Attempt
) -> None:
    """Held-out metrics where people look for them: on the version's page."""
    from pipelines.tracking.registry import metric_tags, tag_version

    assert source.version is not None
    low, high = scores.top1_interval
    attempt.check()
    tag_version(
        source.version,
        {
            # A few only: each tag is one request, and the rest is in the evaluation and its MLflow run.
            **metric_tags({key: metrics[key] for key in (f"{split}/{name}" for name in TAGGED) if key in metrics}),
            f"vit.{split}": f"top1 {scores.top1:.4f} ({low:.4f} to {high:.4f}, n={scores.n})",
            f"vit.{split}.corpus": corpus.reference,
            f"vit.{split}.digest": attempt.digest,
        },
    )
