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
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipelines import store
from pipelines.identity import CannotResume
from pipelines.progress import progress, say
from pipelines.training.config import WorkerConfig
from pipelines.training.job import TrainJob, build_session
from pipelines.training.names import TrainingError
from pipelines.training.placement import Patience, Placement, place
from pipelines.training.watch import Outcome, Watcher, read_outcome, stop

if TYPE_CHECKING:
    from ray.train import UserCallback
    from ray.train.torch import TorchConfig

__all__ = ["choose_placement", "connect", "launch", "shown", "train_worker"]

POLL_SECONDS = 0.5
GROUP_TIMEOUT_SECONDS = 600.0  # Of a collective: a rank that is silent for so long is lost.


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
