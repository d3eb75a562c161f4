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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines import store
from pipelines.identity import Attempt, CannotResume
from pipelines.progress import progress, say
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
from pipelines.training.placement import Patience, Placement, place
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.watch import Outcome, Watcher, read_outcome, stop

if TYPE_CHECKING:
    from ray.train import UserCallback
    from ray.train.torch import TorchConfig
    from torch import Tensor

    from pipelines.training.parallel import Ranks
    from pipelines.training.reporter import Log
    from pipelines.training.session import Session
    from vit_model import InputSpec, Model, ModelConfig, OutputSpec

__all__ = ["TrainJob", "choose_placement", "connect", "launch", "shown", "train_worker"]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
GROUP_TIMEOUT_SECONDS = 600.0  # Of a collective: a rank that is silent for so long is lost.


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


# The worker ---------------------------------------------------------------------------------------------------------


def train_worker(config: dict[str, Any]) -> None:
    """Runs in every rank."""
    import ray.train
    import torch

    from pipelines.training.parallel import Ranks, pick_device

    context = ray.train.get_context()
    job: TrainJob = config["job"]
    device = pick_device(context.get_local_rank()) if job.use_gpu else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, context.get_local_world_size())))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    build_session(job, Ranks.current(device), context.get_local_world_size()).run()


def build_session(job: TrainJob, ranks: Ranks, local_size: int = 1) -> Session:
    """Join the parts: model, optimizer, reader, tracking. `local_size`: workers of this node."""
    import torch

    from pipelines.corpus.manifest import open_corpus
    from pipelines.reader.engines import EngineError, require
    from pipelines.reader.loader import DeviceBatches, changes_of, eval_batches, train_batches
    from pipelines.training.build import build_state
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
    )


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


# The driver ---------------------------------------------------------------------------------------------------------


def connect() -> None:
    """Join the cluster that the environment names, or start one in this process."""
    import ray

    store.root()  # Puts the endpoints into the environment if needed.
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="WARNING")


def choose_placement(workers: WorkerConfig) -> Placement:
    """From what the cluster shows now. The embedded head is one machine; any other cluster may still grow."""
    return place(workers, *shown(), can_grow="VIT_STATE" not in os.environ)


def shown() -> tuple[float, float]:
    """CPUs and GPUs of the cluster as it is now."""
    import ray

    resources = ray.cluster_resources()
    return float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0))


def launch(job: TrainJob, placement: Placement) -> Outcome:
    """Train, showing progress. On Ctrl-C the workers store a checkpoint and end, then KeyboardInterrupt goes on."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    attempt, use_gpu = job.attempt, placement.use_gpu
    resources = {"CPU": job.workers.cpus, **({"GPU": 1.0} if use_gpu else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=placement.count, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=attempt.name,
            # Ray Train's own bookkeeping; nothing of ours is read from it.
            storage_path=store.join(attempt.uri, "ray"),
            failure_config=FailureConfig(max_failures=job.workers.max_failures),
            callbacks=[_end_on_final_error()],
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
        watcher, patience = Watcher(attempt, bar.update), Patience(placement)
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                watcher()
                if not watcher.latest and patience.is_due():
                    say(patience.word(*shown()))
        except KeyboardInterrupt:
            stop(attempt, thread, watcher)
            raise
        watcher(now=True)
    return read_outcome(attempt, failures[0] if failures else None)


def _end_on_final_error() -> UserCallback:
    """What no second try would mend ends the run at once, also when the other ranks wait for the one that failed."""
    from ray.train import UserCallback

    class EndOnFinalError(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, TrainingError | CannotResume):
                    raise error  # In the controller, which then ends all workers and does not start them again.

    return EndOnFinalError()


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
