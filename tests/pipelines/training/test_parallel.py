"""Several gloo processes: the update is the same as one process makes of the whole batch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.training.loop import Hooks, train
from pipelines.training.parallel import Ranks
from pipelines.training.validation import validate
from tests.pipelines.training.tiny import CLASSES, make_batch, make_batches, make_config, make_state, prepare

STEPS = 6


def run(rank: int, world_size: int, cuts: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    ranks = Ranks.current(torch.device("cpu"))
    state = make_state(dropout=0.0)
    part = slice(cuts[rank], cuts[rank + 1])
    seen: list[float] = []
    hooks = Hooks(
        window=lambda _, metrics: seen.append(metrics["train/loss"]), wants_stop=lambda: rank == world_size - 1
    )
    config = make_config(STEPS, log_every_steps=STEPS)
    train(state, make_batches(0, part=part), config, ranks, prepare, hooks)
    held_out = [make_batch(100 + step) for step in range(5)]
    measured = validate(state.model, held_out[rank::world_size], config.train, prepare, ranks, CLASSES)
    torch.save({"tensors": state.tensors(), "losses": seen, "top1": measured.top1}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("cuts", [[0, 4, 8], [0, 3, 6, 8]], ids=["two ranks", "three ranks, uneven"])
def test_ranks_together_make_the_update_of_one_process(cuts: list[int], tmp_path: Path) -> None:
    world_size = len(cuts) - 1
    mp.spawn(run, (world_size, cuts, str(tmp_path)), nprocs=world_size)
    alone, losses = make_state(dropout=0.0), []
    config = make_config(STEPS, log_every_steps=STEPS)
    hooks = Hooks(window=lambda _, metrics: losses.append(metrics["train/loss"]))
    train(alone, make_batches(0), config, Ranks(), prepare, hooks)
    held_out = [make_batch(100 + step) for step in range(5)]
    measured = validate(alone.model, held_out, config.train, prepare, Ranks(), CLASSES)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        assert result["top1"] == measured.top1
        for name, tensor in alone.tensors().items():
            torch.testing.assert_close(result["tensors"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
            assert torch.equal(result["tensors"][name], results[0]["tensors"][name]), f"{name} differs between ranks"
