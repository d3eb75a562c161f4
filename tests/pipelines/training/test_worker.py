"""The driver's side on real Ray: what no second try would mend ends a run at once, whichever rank it comes from."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines import identity, store
from pipelines.reader.loader import ReaderConfig
from pipelines.training import cluster, worker
from pipelines.training.config import WorkerConfig
from pipelines.training.names import TrainingError
from pipelines.training.placement import Placement
from tests.pipelines.tracking.toys import attempt, own_root


def fail_beside_a_waiting_rank(config: dict[str, Any]) -> None:
    """Rank 0 waits for the others in a collective, rank 1 cannot go on."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 1:
        store.write(store.join(config["job"].attempt.uri, "failed"), str(time.time()).encode())
        raise TrainingError("the reader gave step 7 where step 3 is due")
    dist.all_reduce(torch.zeros(1))


@pytest.mark.stack
def test_a_final_error_of_rank_one_does_not_leave_rank_zero_waiting(
    stack: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own_root(monkeypatch)
    cluster.connect()
    monkeypatch.setattr(worker, "train_worker", fail_beside_a_waiting_rank)
    own = attempt("f" * 64, stage="pretrain")
    job = Job(own)
    with pytest.raises(TrainingError, match="the reader gave step 7 where step 3 is due"):
        worker.launch(job, Placement(2, use_gpu=False, why="a test"))  # type: ignore[arg-type]
    waited = time.time() - float(store.read(store.join(own.uri, "failed")))
    assert waited < 45, "the collective's own limit is 600 s"


@dataclass
class Job:
    """What `launch` itself needs of a job."""

    attempt: identity.Attempt
    total_steps: int = 10
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
