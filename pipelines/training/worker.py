"""Training on Ray: what each worker does, and the driver that starts them. The only file that knows Ray Train."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipelines import store
from pipelines.identity import CannotResume
from pipelines.progress import progress, say
from pipelines.training.cluster import nodes, room_for, shown
from pipelines.training.job import TrainJob, build_session
from pipelines.training.names import TrainingError
from pipelines.training.placement import MakingWay, Patience, Placement, count_room
from pipelines.training.process_group import GROUP_TIMEOUT_SECONDS, join_at_file, leave, listen
from pipelines.training.watch import (
    GroupLost,
    MadeWay,
    Outcome,
    Watcher,
    ask_to_make_way,
    forget_round,
    read_outcome,
    stop,
)

if TYPE_CHECKING:
    from ray.train import UserCallback
    from ray.train.torch import TorchConfig

__all__ = ["launch", "train_worker"]

POLL_SECONDS = 0.5
LOOK_SECONDS = 2.0  # Between two looks at the cluster's nodes.
FREED_SECONDS = 2.0  # Until what a group held shows as free.


# The worker ---------------------------------------------------------------------------------------------------------


def train_worker(config: dict[str, Any]) -> None:
    """Runs in every rank."""
    import ray
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
    node = ray.get_runtime_context().get_node_id()
    try:
        session = build_session(
            job,
            Ranks.current(device),
            context.get_local_world_size(),
            node=node,
            reads_node=context.get_local_rank() == 0,
            watch=config.get("watch"),
        )
    except ValueError as error:  # What the recipe asks for cannot be built, on any later try no more than on this.
        raise TrainingError(str(error)) from error
    session.run()


# The driver ---------------------------------------------------------------------------------------------------------


def launch(job: TrainJob, placement: Placement) -> Outcome:
    """Train, showing progress. On Ctrl-C the workers store a checkpoint and end, then KeyboardInterrupt goes on.

    Rounds: in each, Ray Train runs one group of workers. It ends with the run, or when the workers make way: a node is
    about to be taken away, or there is room for more of them. With a range of workers also when any of them is lost,
    since Ray would wait for as many as before; with a fixed number Ray starts the group again by itself.
    """
    attempt, lost = job.attempt, 0
    with progress(attempt.stage, job.total_steps, "steps") as bar:
        watcher, taken = Watcher(attempt, bar.update), 0
        for number in itertools.count(1):
            forget_round(attempt)
            group = _Round(job, placement, number, watcher, taken)
            failure = group.run()
            try:
                return read_outcome(attempt, failure)
            except MadeWay as way:
                say(f"{way}: the workers have stored a checkpoint and start again")
                placement, before = _wait_for_room(job, placement), placement
                taken = group.room if placement.count <= before.count else 0
            except GroupLost as error:
                lost += 1
                if placement.limits is None or lost > job.workers.max_failures:
                    raise
                say(f"the workers were lost ({error})")
                placement = _wait_for_room(job, placement)
    raise AssertionError("unreachable")


def _need(job: TrainJob, placement: Placement) -> dict[str, float]:
    return {"CPU": job.workers.cpus, **({"GPU": 1.0} if placement.use_gpu else {})}


def _wait_for_room(job: TrainJob, placement: Placement) -> Placement:
    """As many workers as there is room for, once it is enough for the fewest."""
    if placement.limits is None:
        return placement
    patience, began = Patience(replace(placement, count=placement.limits[0])), time.monotonic()
    while True:
        room = room_for(_need(job, placement))
        if room >= placement.limits[0] and time.monotonic() - began >= FREED_SECONDS:
            resized = placement.resized(room)
            say(f"going on with {resized.count} worker{'s' if resized.count != 1 else ''}")
            return resized
        if patience.is_due():
            say(patience.word(*shown()))
        time.sleep(POLL_SECONDS)


class _Round:
    """One group of workers, from its start to its end."""

    def __init__(self, job: TrainJob, placement: Placement, number: int, watcher: Watcher, taken: int) -> None:
        self.job, self.placement, self.number, self.watcher = job, placement, number, watcher
        self.room = 0  # Seen when the workers were asked to make way.
        self._way: MakingWay | None = MakingWay(placement, job.workers.resize_seconds, taken)
        self._looked = time.monotonic()
        self._failure: BaseException | None = None

    def run(self) -> BaseException | None:
        """Until the group has ended; returns what Ray Train raised."""
        trainer = self._trainer()

        ended = threading.Event()  # Ctrl-C in Thread.join() makes Python 3.12 and older take a thread for ended.

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                self._failure = error
            finally:
                ended.set()

        # In a thread: Ray Train's own SIGINT handler aborts without a last checkpoint, and is only set in the main one.
        threading.Thread(target=fit, name="trainer", daemon=True).start()
        before, patience = self.watcher.latest, Patience(self.placement)
        try:
            while not ended.wait(POLL_SECONDS):
                self.watcher()
                if self.watcher.latest == before:
                    if patience.is_due():
                        say(patience.word(*shown()))
                else:
                    self._look()
        except KeyboardInterrupt:
            stop(self.job.attempt, ended, self.watcher)
            raise
        self.watcher(now=True)
        return self._failure

    def _look(self) -> None:
        """Whether the workers must make way; asked once."""
        now = time.monotonic()
        if self._way is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        import ray

        standing, need = nodes(), _need(self.job, self.placement)
        # CPUs are never all free while the workers read; whether others hold them shows once ours are given back.
        free = ray.available_resources() if self.placement.use_gpu else None
        self.room = count_room(standing, free, need, self.placement.count)
        reason = self._way.reason(standing, self.watcher.latest.get("nodes", ()), self.room, now)
        if reason is not None:
            with contextlib.suppress(store.StoreError):  # Asked again at the next look.
                ask_to_make_way(self.job.attempt, reason)
                self._way = None

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        job, placement, attempt = self.job, self.placement, self.job.attempt
        elastic = placement.limits is not None
        return TorchTrainer(
            train_worker,
            train_loop_config={"job": self._with_room_to_read()},
            scaling_config=ScalingConfig(
                num_workers=placement.count, use_gpu=placement.use_gpu, resources_per_worker=_need(job, placement)
            ),
            run_config=RunConfig(
                name=attempt.name if self.number == 1 else f"{attempt.name}-r{self.number}",
                # Ray Train's own bookkeeping; nothing of ours is read from it.
                storage_path=store.join(attempt.uri, "ray"),
                failure_config=FailureConfig(
                    max_failures=0 if elastic else job.workers.max_failures,
                    max_preemption_failures=0 if elastic else -1,
                    controller_failure_limit=0 if elastic else -1,
                ),
                callbacks=[_end_on_final_error()],
            ),
            torch_config=_torch_config(),
        )

    def _with_room_to_read(self) -> TrainJob:
        """Each rank reads by itself; on a small machine their read tasks must fit beside each other."""
        if self.placement.waits:
            return self.job
        free = shown()[0] - self.placement.count * self.job.workers.cpus
        num_cpus = max(0.05, min(self.job.reader.num_cpus, free / self.placement.count))
        return replace(self.job, reader=replace(self.job.reader, num_cpus=num_cpus))


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
    """Every worker listens for notice. On a loopback cluster the ranks meet at a file and talk over loopback.

    torch's own meeting point, a TCPStore, listens on all interfaces and answers anybody.
    """
    import ray
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class MeetAtFile(Backend):
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            self.folder = tempfile.mkdtemp(prefix="vit-group-")
            size = len(worker_group)
            backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
            path = f"{self.folder}/{uuid.uuid4().hex}"
            ranks = range(size)
            ray.get(
                [worker_group.execute_single_async(rank, join_at_file, backend, rank, size, path) for rank in ranks]
            )

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            with contextlib.suppress(Exception):  # Workers may be gone; their sockets went with them.
                ray.get(worker_group.execute_async(leave), timeout=10)
            shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    is_loopback = ray.util.get_node_ip_address().startswith("127.")
    base: type[Backend] = MeetAtFile if is_loopback else TorchConfig().backend_cls

    class Listening(base):  # type: ignore[valid-type, misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            ray.get(worker_group.execute_async(listen))
            super().on_start(worker_group, backend_config)

    @dataclass
    class ListeningConfig(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Listening

    return ListeningConfig(timeout_s=int(GROUP_TIMEOUT_SECONDS))
