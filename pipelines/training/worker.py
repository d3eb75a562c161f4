"""Training on Ray: what each worker does, and the driver that starts them. The only file that knows Ray Train."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pipelines import identity, store
from pipelines.identity import Attempt
from pipelines.progress import progress, say
from pipelines.reader.loader import AugmentConfig, ReaderConfig
from pipelines.training.config import (
    Adam,
    AdamW,
    CheckpointConfig,
    MuonAdamW,
    Sgd,
    TrainConfig,
    ValidationConfig,
    WorkerConfig,
)
from pipelines.training.config import ModelConfig as SizeConfig
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.watch import Outcome, Watcher, read_outcome, stop

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig

    from pipelines.corpus.manifest import Corpus
    from pipelines.tracking.run import Run
    from pipelines.training.reporter import Log
    from pipelines.training.session import Session
    from vit_model import InputSpec, Model, ModelConfig, OutputSpec

__all__ = [
    "TrainJob",
    "check_splits",
    "connect",
    "launch",
    "log_pictures",
    "model_config",
    "square_input",
    "train_model",
    "train_worker",
]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
GROUP_TIMEOUT_SECONDS = 600.0  # Of a collective: a rank that is silent for so long is lost.


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a worker needs to know; the driver resolves it once, so that every rank and every restart agree."""

    attempt: Attempt
    first_attempt: int = 1  # Checkpoints of earlier attempts are ignored (`--again`).
    run_id: str | None  # MLflow run; None logs nowhere.
    corpus: str  # Reference with its digest.
    split: str
    lanes: int
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
    optimizer: AdamW | Adam | Sgd | MuonAdamW
    schedule: ScheduleConfig
    augment: AugmentConfig
    reader: ReaderConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    workers: WorkerConfig


# The worker ---------------------------------------------------------------------------------------------------------


def train_worker(config: dict[str, Any]) -> None:
    """Runs in every rank."""
    import ray.train
    import torch

    from pipelines.training.parallel import Ranks, pick_device

    context = ray.train.get_context()
    device = pick_device(context.get_local_rank())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, context.get_local_world_size())))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    build_session(config["job"], Ranks.current(device)).run()


def build_session(job: TrainJob, ranks: Any) -> Session:
    """Join the parts: model, optimizer, reader, tracking."""
    import torch

    from pipelines.corpus.manifest import open_corpus
    from pipelines.reader.loader import eval_batches, train_batches
    from pipelines.training.loop import LoopConfig
    from pipelines.training.optimizers import build_optimizers
    from pipelines.training.session import Session, SessionConfig
    from pipelines.training.state import TrainState
    from vit_model import normalize, save_weights

    corpus = open_corpus(job.corpus)
    model = build_initial(job).to(ranks.device)
    batch_size = job.validation.batch_size // ranks.world_size * ranks.world_size or ranks.world_size

    def training(start_step: int, lanes: int) -> Any:
        return train_batches(
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
            lanes=lanes,
            reader=job.reader,
        )

    def validation() -> Any:
        assert job.validation.split is not None
        return eval_batches(
            corpus,
            split=job.validation.split,
            batch_size=batch_size,
            spec=job.input_spec,
            rank=ranks.rank,
            world_size=ranks.world_size,
            reader=job.reader,
        )

    def export(path: Path) -> None:
        save_weights(model, path, input_spec=job.input_spec, output_spec=job.output_spec)

    return Session(
        SessionConfig(
            attempt=job.attempt,
            first_attempt=job.first_attempt,
            loop=LoopConfig(
                train=job.train,
                schedule=job.schedule,
                peak_lr=job.optimizer.peak_lr,
                total_steps=job.total_steps,
                seed=job.seed,
                log_every_steps=job.workers.log_every_steps,
                validate_every_steps=job.validation.every_steps(job.num_images, job.train.batch_size),
                macs_per_image=job.macs_per_image,
            ),
            order={
                "corpus": corpus.digest,
                "split": job.split,
                "seed": job.seed,
                "batch_size": job.train.batch_size,
                "lanes": job.lanes,
            },
            checkpoint=job.checkpoint,
            num_classes=len(corpus.class_names),
            keep_samples=True,
        ),
        TrainState(model, build_optimizers(model, job.optimizer)),
        ranks,
        prepare=lambda images: normalize(images, job.input_spec, torch.float32),
        training=training,
        validation=validation if job.validation.split is not None else None,
        make_log=lambda: make_log(job),
        export=export,
    )


def build_initial(job: TrainJob) -> Model:
    """The model before the first step: the same on every rank."""
    from vit_model import build_model, load_model

    num_classes = len(job.output_spec.class_names)
    if job.initial is None:
        return build_model(job.model, num_classes, job.head, seed=job.seed)
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
    return {name: getattr(model, name) for name in ("dropout", "patch_dropout") if hasattr(model, name)}


def make_log(job: TrainJob) -> Log:
    """Points of the curves straight to MLflow; what an earlier try has logged is not logged again."""
    if job.run_id is None:
        return lambda values, step: None
    from pipelines.tracking.run import Run

    run = Run.attach(job.run_id, job.attempt)
    last: dict[str, int] = {}

    def write(values: dict[str, float], step: int) -> None:
        for key in values.keys() - last.keys():
            last[key] = run.last_step(key)
        fresh = {key: value for key, value in values.items() if step > last[key]}
        if fresh:
            run.log_metrics(fresh, step)

    return write


# The driver ---------------------------------------------------------------------------------------------------------


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
    def optimizer(self) -> AdamW | Adam | Sgd | MuonAdamW: ...
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


def check_splits(recipe: TrainingRecipe, corpus: Corpus) -> None:
    """The splits that the recipe names must be there, before anything starts."""
    for field, split in (("split", recipe.split), ("validation.split", recipe.validation.split)):
        if split is not None and not corpus.splits.get(split):
            known = ", ".join(f"{name} ({count:,})" for name, count in corpus.splits.items())
            off = "; null switches validation off" if field != "split" else ""
            raise ValueError(f"{field}={split!r} is no split of {corpus.uri}; it has {known}{off}")


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
) -> Outcome:
    """Work out the job, say what will be done, and do it on the cluster."""
    import ray

    from pipelines.reader.loader import choose_lanes
    from vit_model import OutputSpec, build_model, count_parameters, forward_macs

    connect()
    num_workers, use_gpu = count_workers(recipe.workers)
    num_images = corpus.splits[recipe.split]
    total_steps = recipe.train.steps(num_images)
    recipe.schedule.check(total_steps)
    batch_size, num_classes = recipe.train.batch_size, len(corpus.class_names)
    # At least two, so that one worker and two see the same order.
    lanes = choose_lanes(corpus.pages(recipe.split), batch_size, max(2, num_workers), recipe.lanes)
    free = float(ray.cluster_resources().get("CPU", 1.0)) - num_workers * recipe.workers.cpus
    # Each rank reads by itself; on a small machine their read tasks must fit beside each other.
    reader = replace(recipe.reader, num_cpus=max(0.05, min(recipe.reader.num_cpus, free / num_workers)))
    job = TrainJob(
        attempt=attempt,
        first_attempt=attempt.number if identity.AGAIN.get() else 1,
        run_id=run_id,
        corpus=corpus.reference,
        split=recipe.split,
        lanes=lanes,
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
        macs_per_image=forward_macs(model, num_classes, head),
        train=recipe.train,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        augment=recipe.augment,
        reader=reader,
        validation=recipe.validation,
        checkpoint=recipe.checkpoint,
        workers=recipe.workers,
    )
    parameters = count_parameters(build_model(model, num_classes, head, device="meta"))
    say(
        f"{attempt.stage}: batch {batch_size} over {num_workers} {'GPU' if use_gpu else 'CPU'} workers, "
        f"{total_steps:,} steps = {total_steps * batch_size / num_images:.3g} epochs of {num_images:,} images, "
        f"{parameters:,} parameters; {identity.code_origin()}"
    )
    return launch(job, num_workers, use_gpu)


def connect() -> None:
    """Join the cluster that the environment names, or start one in this process."""
    import ray

    store.root()  # Puts the endpoints into the environment if needed.
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)


def count_workers(workers: WorkerConfig) -> tuple[int, bool]:
    """How many workers, and whether each takes a GPU."""
    import ray

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if gpus and workers.count is not None and workers.count > gpus:
        raise ValueError(f"workers.count={workers.count} is more than the cluster's {gpus} GPUs; nearest: {gpus}")
    if gpus:
        return workers.count or gpus, True
    return workers.count or min(2, max(1, int(resources.get("CPU", 1)))), False


def launch(job: TrainJob, num_workers: int, use_gpu: bool) -> Outcome:
    """Train, showing progress. On Ctrl-C the workers store a checkpoint and end, then KeyboardInterrupt goes on."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    attempt = job.attempt
    resources = {"CPU": job.workers.cpus, **({"GPU": 1.0} if use_gpu else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=attempt.name,
            # Ray Train's own bookkeeping; nothing of ours is read from it.
            storage_path=store.join(attempt.uri, "ray"),
            failure_config=FailureConfig(max_failures=job.workers.max_failures),
        ),
        torch_config=_torch_config(),
    )
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    # In a thread: Ray Train's own SIGINT handler aborts without a last checkpoint, and is only set in the main thread.
    thread = threading.Thread(target=fit, name="trainer", daemon=True)
    thread.start()
    with progress(attempt.stage, job.total_steps, "steps") as bar:
        watcher = Watcher(attempt, bar.update)
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                watcher()
        except KeyboardInterrupt:
            stop(attempt, thread, watcher)
            raise
        watcher(now=True)
    return read_outcome(attempt, failures[0] if failures else None)


def log_pictures(run: Run, outcome: Outcome, class_names: Sequence[str]) -> None:
    """Confusion matrix and sample predictions of the last validation, as figures of the MLflow run."""
    import numpy as np

    from pipelines.tracking.figures import confusion_figure, predictions_figure

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
            [class_names[label] for label in samples["labels"]],
            [class_names[label] for label in best],
            samples["probabilities"].max(axis=1).tolist(),
        )
        run.log_figure(figure, "samples")


# The process group --------------------------------------------------------------------------------------------------


def _torch_config() -> TorchConfig:
    """On a loopback cluster the ranks meet at a file and talk over the loopback device.

    torch's own meeting point, a TCPStore, listens on all interfaces and answers anybody.
    """
    import ray
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    if not ray.util.get_node_ip_address().startswith("127."):
        return TorchConfig(timeout_s=int(GROUP_TIMEOUT_SECONDS))

    class MeetAtFile(Backend):
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            folder = tempfile.mkdtemp(prefix="vit-group-")
            size = len(worker_group)
            backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
            path = f"{folder}/{uuid.uuid4().hex}"
            ray.get([worker_group.execute_single_async(rank, _join, backend, rank, size, path) for rank in range(size)])

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            with contextlib.suppress(Exception):  # Workers may be gone; their sockets went with them.
                ray.get(worker_group.execute_async(_leave), timeout=10)

    @dataclass
    class LoopbackTorchConfig(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return MeetAtFile

    return LoopbackTorchConfig(timeout_s=int(GROUP_TIMEOUT_SECONDS))


def _join(backend: str, rank: int, world_size: int, path: str) -> None:
    import torch.distributed as dist

    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    dist.init_process_group(
        backend,
        init_method=f"file://{path}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_SECONDS),
    )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
