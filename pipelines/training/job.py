"""What a rank is made of: the job as the driver resolved it, and from it model, optimizer, reader and tracking."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines import store
from pipelines.batch import Batch
from pipelines.identity import Attempt
from pipelines.reader.engines import Engine
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
from pipelines.training.curves import FreshPoints
from pipelines.training.names import TrainingError
from pipelines.training.process_group import is_noticed
from pipelines.training.schedules import ScheduleConfig

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.training.parallel import Ranks
    from pipelines.training.reporter import Log
    from pipelines.training.session import Session
    from vit_model import InputSpec, Model, ModelConfig, OutputSpec

__all__ = ["TrainJob", "build_session"]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a worker needs to know; the driver resolves it once, so that every rank and every restart agree."""

    attempt: Attempt
    run_id: str | None  # MLflow run; None logs nowhere.
    corpus: str  # Reference with its digest.
    split: str
    lanes: int
    window_pages: int
    seed: int
    total_steps: int
    num_images: int  # In the training split.
    model: ModelConfig
    head: Literal["linear", "mlp"]
    initial: str | None  # Weights to start from; None draws them from the seed.
    input_spec: InputSpec
    output_spec: OutputSpec
    macs_per_image: int
    train: TrainConfig
    optimizer: AnyOptimizer
    schedule: ScheduleConfig
    augment: AugmentConfig
    reader: ReaderConfig
    engine: Engine  # What decodes, on every node and after every resume.
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    workers: WorkerConfig
    use_gpu: bool
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    distill: DistillConfig | None = None
    teacher: str | None = None  # URI of the teacher's weights, with distill.
    head_bias: float = 0.0


def build_session(
    job: TrainJob,
    ranks: Ranks,
    local_size: int = 1,
    *,
    node: str = "",
    reads_node: bool = True,
    watch: Callable[[Batch], None] | None = None,
) -> Session:
    """Join the parts: model, optimizer, reader, tracking. `local_size`: workers of this node, `node` its id.

    `reads_node`: this worker is the one of its node that tells of the node's load.

    `watch` is called with this rank's part of each step before it is trained on.
    """
    import torch

    from pipelines.corpus.manifest import open_corpus
    from pipelines.reader.engines import EngineError, require
    from pipelines.reader.loader import DeviceBatches, changes_of, eval_batches, train_batches
    from pipelines.training.build import build_state
    from pipelines.training.hardware import list_price, peak_flops
    from pipelines.training.loop import LoopConfig
    from pipelines.training.objective import Objective, class_weight_tensor
    from pipelines.training.session import Session, SessionConfig
    from pipelines.training.teacher import load_teacher
    from vit_model import build_model, normalize, save_weights, without_masking

    try:
        require(job.engine.name, job.engine.pixels)
    except EngineError as error:
        raise TrainingError(str(error)) from None  # Final: another try would find the same.
    corpus = open_corpus(job.corpus)
    num_classes = len(corpus.class_names)
    model = build_initial(job).to(ranks.device)
    batch_size = job.validation.batch_size // ranks.world_size * ranks.world_size or ranks.world_size

    pinned = ranks.device.type == "cuda"
    device_name = torch.cuda.get_device_name(ranks.device) if pinned else ""
    opened: list[DeviceBatches] = []  # The training stream, to ask it what was bad.

    def training(start_step: int, order: Mapping[str, Any]) -> Any:
        stream = train_batches(
            corpus,
            split=job.split,
            batch_size=job.train.batch_size,
            seed=job.seed,
            spec=job.input_spec,
            augment=job.augment,
            rank=ranks.rank,
            world_size=ranks.world_size,
            start_step=start_step,
            total_steps=job.total_steps,
            lanes=order["lanes"],
            window_pages=order["window_pages"],
            reader=job.reader,
            pinned=pinned,
        )
        opened[:] = [
            DeviceBatches(
                stream,
                ranks.device,
                changes=changes_of(job.augment),
                seed=job.seed,
                num_classes=num_classes,
            )
        ]
        return opened[0] if watch is None else _watched(opened[0], watch)

    def held_out(split: str) -> Any:
        stream = eval_batches(
            corpus,
            split=split,
            batch_size=batch_size,
            spec=job.input_spec,
            rank=ranks.rank,
            world_size=ranks.world_size,
            reader=job.reader,
            pinned=pinned,
        )
        return DeviceBatches(stream, ranks.device, num_classes=num_classes)

    def export(path: Path, tensors: Mapping[str, Tensor]) -> None:
        if job.train.masked is not None:
            whole = build_model(model.config, 0, device="meta")
            whole.load_state_dict(without_masking(tensors), assign=True)
            return save_weights(whole, path, input_spec=job.input_spec)
        whole = build_model(model.config, num_classes, job.head, device="meta")
        whole.load_state_dict(dict(tensors), assign=True)
        save_weights(whole, path, input_spec=job.input_spec, output_spec=job.output_spec)

    teacher = None
    if job.distill is not None and job.teacher is not None:
        teacher = load_teacher(job.teacher, job.distill, job.train, job.output_spec, job.input_spec, ranks.device)
    class_weights = class_weight_tensor(job.train.class_weights, job.output_spec.class_names)
    class_weights = class_weights if class_weights is None else class_weights.to(ranks.device)

    return Session(
        SessionConfig(
            attempt=job.attempt,
            loop=LoopConfig(
                train=job.train,
                schedule=job.schedule,
                peak_lr=job.optimizer.peak_lr,
                total_steps=job.total_steps,
                seed=job.seed,
                log_every_steps=job.workers.log_every_steps,
                validate_every_steps=job.validation.every_steps(job.num_images, job.train.batch_size),
                macs_per_image=job.macs_per_image,
                peak_flops=1e12 * job.workers.peak_tflops if job.workers.peak_tflops else peak_flops(device_name),
            ),
            order={
                "corpus": corpus.digest,
                "split": job.split,
                "seed": job.seed,
                "batch_size": job.train.batch_size,
                "lanes": job.lanes,
                "window_pages": job.window_pages,
            },
            engine=job.engine.key,
            checkpoint=job.checkpoint,
            num_classes=num_classes,
            best=job.validation.best,
            hang_seconds=job.workers.hang_seconds,
            node_load_seconds=job.workers.node_load_seconds,
            dollars_per_hour=job.workers.dollars_per_hour or list_price(device_name),
        ),
        build_state(model, job.train, job.optimizer, ranks, job.parallel, local_size),
        ranks,
        # What autocast would make of it anyway, without the copy in fp32 between.
        prepare=partial(
            normalize,
            spec=job.input_spec,
            dtype=torch.bfloat16 if job.train.precision == "bf16" else torch.float32,
        ),
        training=training,
        validation=partial(held_out, job.validation.split) if job.validation.split is not None else None,
        test=partial(held_out, job.validation.test_split) if job.validation.test_split is not None else None,
        open_log=lambda: open_log(job),
        export=export,
        objective=Objective(job.train, class_weights, teacher),
        bad_samples=lambda: opened[0].stats().by_reason(),
        is_noticed=is_noticed,
        node=node,
        reads_node=reads_node,
    )


@contextlib.contextmanager
def _watched(batches: Any, watch: Callable[[Batch], None]) -> Iterator[Iterator[Batch]]:
    def each(opened: Iterator[Batch]) -> Iterator[Batch]:
        for batch in opened:
            watch(batch)
            yield batch

    with batches as opened:
        yield each(opened)


def build_initial(job: TrainJob) -> Model:
    """The model before the first step: the same on every rank."""
    from pipelines.training.masked import build
    from vit_model import build_model, load_model

    num_classes = len(job.output_spec.class_names)
    if job.train.masked is not None:
        return build(job.model, job.train.masked, seed=job.seed)
    if job.initial is None:
        return build_model(job.model, num_classes, job.head, head_bias=job.head_bias, seed=job.seed)
    with tempfile.TemporaryDirectory(prefix="vit-initial-") as folder:
        path = store.download(job.initial, Path(folder) / job.initial.rsplit("/", 1)[-1])
        return load_model(
            path,
            num_classes=num_classes,
            resolution=job.model.resolution,
            head=job.head,
            **_regularisation(job.model),
        )


def _regularisation(model: ModelConfig) -> dict[str, Any]:
    """What a file of weights says of the training it comes from, and not of this one."""
    names = ("dropout", "attention_dropout", "drop_path", "drop_path_schedule", "patch_dropout")
    return {name: getattr(model, name) for name in names if hasattr(model, name)}


@contextlib.contextmanager
def open_log(job: TrainJob) -> Iterator[Log]:
    """Points of the curves straight to MLflow; what an earlier try has logged is not logged again."""
    if job.run_id is None:
        yield lambda values, step: None
        return
    from pipelines.tracking.run import Run

    run = Run.attach(job.run_id, job.attempt)
    try:
        yield FreshPoints(run)
    finally:
        run.close()
