"""Training on Ray: what each worker does, and the driver that starts them. The only file that knows Ray Train."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines import store
from pipelines.identity import Attempt
from pipelines.progress import progress
from pipelines.reader.engines import Engine
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
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.watch import Outcome, Watcher, read_outcome, stop

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig

    from pipelines.tracking.run import Run
    from pipelines.training.reporter import Log
    from pipelines.training.session import Session
    from vit_model import InputSpec, Model, ModelConfig, OutputSpec

__all__ = ["TrainJob", "connect", "count_workers", "launch", "train_worker"]

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
    engine: Engine  # What decodes, on every node and after every resume.
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
    from pipelines.reader.engines import require
    from pipelines.reader.loader import DeviceBatches, changes_of, eval_batches, train_batches
    from pipelines.training.loop import LoopConfig
    from pipelines.training.optimizers import build_optimizers
    from pipelines.training.session import Session, SessionConfig
    from pipelines.training.state import TrainState
    from vit_model import normalize, save_weights

    require(job.engine.name, job.engine.pixels)
    corpus = open_corpus(job.corpus)
    model = build_initial(job).to(ranks.device)
    batch_size = job.validation.batch_size // ranks.world_size * ranks.world_size or ranks.world_size

    pinned = ranks.device.type == "cuda"
    opened: list[DeviceBatches] = []  # The training stream, to ask it what was bad.

    def training(start_step: int, lanes: int) -> Any:
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
            lanes=lanes,
            reader=job.reader,
            pinned=pinned,
        )
        opened[:] = [
            DeviceBatches(
                stream,
                ranks.device,
                changes=changes_of(job.augment),
                seed=job.seed,
                num_classes=len(corpus.class_names),
            )
        ]
        return opened[0]

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
        return DeviceBatches(stream, ranks.device)

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
                "engine": job.engine.key,
            },
            checkpoint=job.checkpoint,
            num_classes=len(corpus.class_names),
        ),
        TrainState(model, build_optimizers(model, job.optimizer)),
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
        bad_samples=lambda: opened[0].stats().by_reason(),
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


@contextlib.contextmanager
def open_log(job: TrainJob) -> Iterator[Log]:
    """Points of the curves straight to MLflow; what an earlier try has logged is not logged again."""
    if job.run_id is None:
        yield lambda values, step: None
        return
    from pipelines.tracking.run import Run

    run = Run.attach(job.run_id, job.attempt)
    try:
        yield _MlflowLog(run)
    finally:
        run.close()


class _MlflowLog:
    def __init__(self, run: Run) -> None:
        self._run = run
        self._last: dict[str, int] = {}  # Last step of each key that MLflow has or will be sent.

    def __call__(self, values: dict[str, float], step: int) -> None:
        for key in values.keys() - self._last.keys():
            self._last[key] = self._run.last_step(key)
        fresh = {key: value for key, value in values.items() if step > self._last[key]}
        if fresh:
            self._run.log_metrics(fresh, step)
            self._last.update(dict.fromkeys(fresh, step))

    def flush(self) -> bool:
        return self._run.flush()


# The driver ---------------------------------------------------------------------------------------------------------


def connect() -> None:
    """Join the cluster that the environment names, or start one in this process."""
    import ray

    store.root()  # Puts the endpoints into the environment if needed.
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="WARNING")


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
            self.folder = tempfile.mkdtemp(prefix="vit-group-")
            size = len(worker_group)
            backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
            path = f"{self.folder}/{uuid.uuid4().hex}"
            ray.get([worker_group.execute_single_async(rank, _join, backend, rank, size, path) for rank in range(size)])

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            with contextlib.suppress(Exception):  # Workers may be gone; their sockets went with them.
                ray.get(worker_group.execute_async(_leave), timeout=10)
            shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

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
