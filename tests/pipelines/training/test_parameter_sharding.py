"""FSDP2 and HSDP over gloo: the same losses and weights as one process, saved on some ranks and resumed on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines import identity, store
from pipelines.training.build import build_state
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.config import AdamW, EmaConfig, ParallelConfig, ScheduleFree, TrainConfig
from pipelines.training.loop import Hooks, LoopConfig, train
from pipelines.training.parallel import Ranks
from pipelines.training.parameter_sharding import ParameterSharding
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.state import TrainState
from tests.pipelines.training.tiny import TinyModel, make_batches, make_config, prepare

STEPS = 6
OPTIONS = TrainConfig(batch_size=8, total_steps=STEPS, ema=EmaConfig(decay=0.8), grad_clip=0.5)


def build(ranks: Ranks, parallel: ParallelConfig, **changes: Any) -> TrainState:
    torch.manual_seed(7)
    return build_state(
        TinyModel(0.0), dataclasses.replace(OPTIONS, **changes), AdamW(peak_lr=1e-2), ranks, parallel, local_size=2
    )


def losses_of(
    state: TrainState, ranks: Ranks, steps: int = STEPS, config: LoopConfig | None = None, **changes: Any
) -> list[float]:
    each = 8 // ranks.world_size
    part = slice(ranks.rank * each, (ranks.rank + 1) * each)
    if config is None:
        config = make_config(STEPS, log_every_steps=1)
        config = dataclasses.replace(config, train=dataclasses.replace(OPTIONS, **changes))
    seen: list[float] = []
    hooks = Hooks(window=lambda _, metrics: seen.append(metrics["train/loss"]), wants_stop=lambda: state.step >= steps)
    train(state, make_batches(state.step, part=part), config, ranks, prepare, hooks)
    return seen


def in_group(rank: int, world_size: int, folder: str, body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    result = body(Ranks.current(torch.device("cpu")), *arguments)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def together(world_size: int, folder: Path, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    folder.mkdir(exist_ok=True)
    mp.spawn(in_group, (world_size, str(folder), body, arguments), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def train_and_gather(ranks: Ranks, kind: Any, changes: dict[str, Any]) -> dict[str, Any]:
    state = build(ranks, ParallelConfig(kind=kind), **changes)
    losses = losses_of(state, ranks, **changes)
    gradients = state.gradients
    assert isinstance(gradients, ParameterSharding) and state.ema is not None
    before = {name: tensor.clone() for name, tensor in state.weights().items()}
    with state.using(state.ema.tensors):
        averaged = gradients.gather(state.weights())
    assert all(torch.equal(before[name], tensor) for name, tensor in state.weights().items())
    return {
        "losses": losses,
        "weights": gradients.gather(state.weights()),
        "ema": gradients.gather(state.ema.tensors),
        "averaged": averaged,
        "held": sum(tensor.numel() for tensor in state.weights().values()),
    }


@pytest.mark.parametrize(
    ("kind", "ranks", "changes"),
    [("fsdp", 2, {}), ("hsdp", 4, {}), ("fsdp", 2, {"per_device_batch_size": 2})],
    ids=["fsdp on 2", "hsdp on 2 x 2", "fsdp in pieces"],
)
def test_sharded_parameters_train_as_whole_ones_do(
    kind: str, ranks: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    results = together(ranks, tmp_path / "group", train_and_gather, kind, changes)
    alone = build(Ranks(), ParallelConfig())
    losses = losses_of(alone, Ranks())
    assert alone.ema is not None
    total = sum(tensor.numel() for tensor in alone.weights().values())
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        assert result["held"] < 0.7 * total
    for name, tensor in alone.weights().items():
        torch.testing.assert_close(results[0]["weights"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(results[0]["ema"][name], alone.ema.tensors[name], rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(results[0]["averaged"][name], results[0]["ema"][name])


def test_one_worker_has_nothing_to_cut() -> None:
    with pytest.raises(ValueError, match="cuts the weights over workers and there is one; use ddp"):
        build(Ranks(), ParallelConfig(kind="fsdp"))


def schedule_free(ranks: Ranks, root: str, steps: int, resume: bool, save: bool) -> dict[str, Any]:
    """Six classes: on two ranks the head's bias has as many rows as Schedule-Free's clock has numbers."""
    torch.manual_seed(7)
    model = TinyModel(0.0)
    model.head = torch.nn.Linear(8, 6)
    options = TrainConfig(batch_size=8, total_steps=STEPS)
    state = build_state(model, options, ScheduleFree(peak_lr=1e-2), ranks, ParallelConfig(kind="fsdp"), local_size=2)
    attempt = identity.Attempt("pretrain", "d" * 64, 1, root, "t1", 1)
    assert state.gradients is not None
    checkpoints = Checkpoints(attempt, 2, state.gradients.part)
    if resume:
        loaded = checkpoints.newest()
        assert loaded is not None
        state.load(loaded.tensors, loaded.found.step)
    losses = losses_of(
        state,
        ranks,
        steps,
        config=LoopConfig(
            train=options, schedule=ScheduleConfig(decay="constant"), peak_lr=1e-2, total_steps=STEPS, log_every_steps=1
        ),
    )
    if save:
        tensors = state.tensors()
        rows = state.gradients.rows(tensors)
        assert not [key for key in rows if key.endswith("/schedule")]
        for turn in (1, 0):  # Rank 0 commits once all parts have come.
            if ranks.rank == turn:
                checkpoints.save(state.step, tensors, {"order": {}}, rows, "token")
            dist.barrier()
    return {"losses": losses}


def test_schedule_free_resumes_where_its_clock_has_the_shape_of_a_cut_tensor(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    store.write_json(store.join(root, "lease.json"), {"token": "t1"})
    whole = together(2, tmp_path / "whole", schedule_free, root, STEPS, False, False)
    first = together(2, tmp_path / "first", schedule_free, root, 3, False, True)
    second = together(2, tmp_path / "second", schedule_free, root, STEPS, True, False)
    for rank in range(2):
        assert first[rank]["losses"] + second[rank]["losses"] == whole[rank]["losses"]
